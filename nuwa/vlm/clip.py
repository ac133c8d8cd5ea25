"""Signals of a CLIP tower, and what LLaVA's families make of one."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nuwa.vlm.adapter import Adapter, UnavailableSignal
from nuwa.vlm.checkpoint import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Nüwa averages hidden states 16..24 of CLIP-L's 24 layers: the last third, both ends included.
SIMILARITY_FROM = 2 / 3
# Of CLIP-L's 24 layers, counted from 1: VScan reads the CLS attention of the 6th, HiPrune attention received at the 9th.
FURTHER_LAYERS = {"early_attention": 6 / 24, "received_middle": 9 / 24}
LLAVA_TURN = "<s>{system}USER: <image>\n{text} ASSISTANT:"  # of the published conversions on Vicuna


def check_clip_features(strategy: str, layer: int | list[int]) -> None:
    """Refuse a configuration whose features are not one layer's patches without CLS, with :class:`CheckpointError`."""
    if strategy != "default" or not isinstance(layer, int):
        raise CheckpointError(
            f"model.vision_feature_select_strategy {strategy!r} with layer "
            f"{layer!r}: only one layer and 'default' (no CLS) are supported"
        )


def check_clip_config(config: Any, encoder: str) -> None:
    """Refuse the configuration of a LLaVA-like model with another tower, or features of a layer there is none of."""
    tower = config.vision_config.model_type
    if tower != "clip_vision_model":
        raise CheckpointError(
            f"config.vision_config.model_type = {tower!r}: {encoder} is read as clip_vision_model; "
            "other towers are not supported"
        )
    check_clip_features(config.vision_feature_select_strategy, config.vision_feature_layer)
    depth = config.vision_config.num_hidden_layers
    if not -depth <= config.vision_feature_layer <= depth or config.vision_feature_layer == 0:
        raise CheckpointError(
            f"config.vision_feature_layer = {config.vision_feature_layer}: the tower has {depth} layers; "
            f"allowed: 1 to {depth} and -{depth} to -1"
        )


def clip_widths(config: Any) -> dict[str, int]:
    """How many numbers each signal has a token, from the configuration of a LLaVA-like model."""
    width = config.vision_config.hidden_size
    return {"features": width, "cls_attention": 1, "keys": width, "similarity": width, "last_keys": width}


def clip_sizes(config: Any) -> dict[str, Any]:
    """Sizes an image processor of CLIP makes pictures of, as its keyword arguments."""
    side = config.vision_config.image_size
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


class ClipAdapter(Adapter):
    """What LLaVA's families have in common: a CLIP tower, a projector of its features, Vicuna's turn."""

    offers_cls = True
    offers_last = True
    pairs_text = True
    turn = LLAVA_TURN

    def __init__(self, model: PreTrainedModel, processor: Any, **framing: Any) -> None:
        self.check_config(model.config)
        super().__init__(model, processor, **framing)
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector

    @property
    def heads(self) -> int:
        return self.tower.config.num_attention_heads

    @classmethod
    def signal_widths(cls, config: Any) -> dict[str, int]:
        return clip_widths(config)

    @classmethod
    def check_config(cls, config: Any) -> None:
        check_clip_config(config, cls.encoder)
        super().check_config(config)

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        return self.projector(features.to(self.device, self.language.embed_tokens.weight.dtype))

    @property
    def encoder_modules(self) -> dict[str, nn.Module]:
        return {"tower": self.tower}


def clip_features(tower: PreTrainedModel, pixels: Tensor, feature_layer: int) -> Tensor:
    """Features of smaller images, ``(batch, tokens, dim)``: position embeddings are interpolated to their grid."""
    states = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    return states[feature_layer][:, 1:]


def clip_signals(
    tower: PreTrainedModel, pixels: Tensor, feature_layer: int, further: Collection[str] = ()
) -> dict[str, Tensor]:
    """Signals of ``(batch, 3, side, side)`` crops; :class:`nuwa.signals.VisionSignals` has names and shapes.

    CLS attention is recomputed from the layer's input for its one query row, so no layer runs eager attention.
    """
    states = tower(pixels, output_hidden_states=True).hidden_states
    at = feature_layer % len(states)
    layer, entering = tower.encoder.layers[at - 1], states[at - 1]
    first = round(SIMILARITY_FROM * (len(states) - 1))
    signals = {
        "features": states[at][:, 1:],
        "cls_attention": _cls_attention(layer, entering),
        "keys": layer.self_attn.k_proj(layer.layer_norm1(entering))[:, 1:],
        "similarity": torch.stack(states[first:]).mean(dim=0)[:, 1:],
    }

    if "received_late" in further:
        signals["received_late"] = _received(layer, entering)
    if {"last_attention", "last_keys"} & set(further):
        attention, keys = _as_one_head(tower.encoder.layers[-1], states[-2])
        signals |= {name: one for name, one in (("last_attention", attention), ("last_keys", keys)) if name in further}
    for name, share in FURTHER_LAYERS.items():
        if name in further:
            early = earlier_layer(name, share, len(states) - 1, at)
            read = _cls_attention if name == "early_attention" else _received
            signals[name] = read(tower.encoder.layers[early - 1], states[early - 1])
    return signals


def earlier_layer(name: str, share: float, layers: int, late: int) -> int:
    """The layer that stands for ``share`` of ``layers``, counted from 1; raises :class:`UnavailableSignal`."""
    layer = max(1, round(share * layers))
    if layer >= late:
        raise UnavailableSignal(
            f"signal {name} is read at {share:g} of the encoder's layers; of {layers} that is layer {layer}, which must "
            f"lie below layer {late}, where the features come from"
        )
    return layer


def _per_head(layer: Any, values: Tensor) -> Tensor:
    """``(batch, heads, tokens, head_dim)`` of ``(batch, tokens, dim)``."""
    attention = layer.self_attn
    return values.view(*values.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)


def _cls_attention(layer: Any, entering: Tensor) -> Tensor:
    """Attention from CLS to each patch, mean over heads, ``(batch, tokens)`` float32; ``entering`` has CLS first."""
    attention, normed = layer.self_attn, layer.layer_norm1(entering)
    query = _per_head(layer, attention.q_proj(normed[:, :1]))
    keys = _per_head(layer, attention.k_proj(normed))
    weights = (query @ keys.transpose(2, 3) * attention.scale).softmax(dim=-1, dtype=torch.float32)
    return weights.mean(dim=1)[:, 0, 1:]


def _as_one_head(layer: Any, entering: Tensor) -> tuple[Tensor, Tensor]:
    """Attention from CLS to each patch, ``(batch, tokens)`` float32, and keys, with all heads taken for one."""
    attention, normed = layer.self_attn, layer.layer_norm1(entering)
    query, keys = attention.q_proj(normed[:, :1]), attention.k_proj(normed)
    weights = (query @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5).softmax(dim=-1, dtype=torch.float32)
    return weights[:, 0, 1:], keys[:, 1:]


def _received(layer: Any, entering: Tensor) -> Tensor:
    """Attention that each patch receives, mean over heads and all queries, ``(batch, tokens)`` float32."""
    attention, normed = layer.self_attn, layer.layer_norm1(entering)
    query, keys = (_per_head(layer, project(normed)) for project in (attention.q_proj, attention.k_proj))
    total = torch.zeros(entering.shape[:2], dtype=torch.float32, device=entering.device)
    for head in range(attention.num_heads):  # one head at a time: all maps at once are the largest tensor of the tower
        scores = query[:, head] @ keys[:, head].transpose(1, 2) * attention.scale
        total += scores.softmax(dim=-1, dtype=torch.float32).sum(dim=1)
    return total[:, 1:] / (attention.num_heads * entering.shape[1])
