"""Signals of a CLIP tower, for the LLaVA family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Nüwa averages hidden states 16..24 of CLIP-L's 24 layers: the last third, both ends included.
SIMILARITY_FROM = 2 / 3


def check_clip_features(strategy: str, layer: int | list[int]) -> None:
    """Refuse a configuration whose features are not one layer's patches without CLS."""
    if strategy != "default" or not isinstance(layer, int):
        raise ValueError(
            f"model.vision_feature_select_strategy {strategy!r} with layer "
            f"{layer!r}: only one layer and 'default' (no CLS) are supported"
        )


def clip_widths(config: Any) -> dict[str, int]:
    """How many numbers each signal has a token, from the configuration of a LLaVA-like model."""
    width = config.vision_config.hidden_size
    return {"features": width, "cls_attention": 1, "keys": width, "similarity": width}


def clip_features(tower: nn.Module, pixels: Tensor, feature_layer: int) -> Tensor:
    """Features of smaller images, ``(batch, tokens, dim)``: position embeddings are interpolated to their grid."""
    states = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    return states[feature_layer][:, 1:]


def clip_signals(tower: nn.Module, pixels: Tensor, feature_layer: int) -> dict[str, Tensor]:
    """Signals of ``(batch, 3, side, side)`` crops; :class:`nuwa.signals.VisionSignals` has names and shapes.

    CLS attention is recomputed from the layer's input for its one query row, so no layer runs eager attention.
    """
    states = tower(pixels, output_hidden_states=True).hidden_states
    at = feature_layer % len(states)
    layer, entering = tower.encoder.layers[at - 1], states[at - 1]
    attention = layer.self_attn
    normed = layer.layer_norm1(entering)
    keys = attention.k_proj(normed)
    heads, head_dim = attention.num_heads, attention.head_dim
    query = attention.q_proj(normed[:, :1]).view(len(pixels), 1, heads, head_dim).transpose(1, 2)
    per_head = keys.view(len(pixels), -1, heads, head_dim).transpose(1, 2)
    weights = (query @ per_head.transpose(2, 3) * attention.scale).softmax(dim=-1, dtype=torch.float32)
    first = round(SIMILARITY_FROM * (len(states) - 1))
    return {
        "features": states[at][:, 1:],
        "cls_attention": weights.mean(dim=1)[:, 0, 1:],
        "keys": keys[:, 1:],
        "similarity": torch.stack(states[first:]).mean(dim=0)[:, 1:],
    }
