"""LLaVA-1.5 and every other ``LlavaForConditionalGeneration`` with a CLIP tower, as stock transformers ships it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from nuwa.grid import PatchGrid
from nuwa.signals import VisionSignals

# Nüwa averages hidden states 16..24 of CLIP-L's 24 layers: the last third, both ends included.
SIMILARITY_FROM = 2 / 3
SIGNAL_NAMES = ("features", "cls_attention", "keys", "similarity")


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids before and after the image placeholder; the part before is the same for every question."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class LlavaAdapter:
    """One loaded model. It is used as it is: nothing is patched, hooked or replaced."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: Any) -> None:
        config = model.config
        if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
            raise ValueError(
                f"model.vision_feature_select_strategy {config.vision_feature_select_strategy!r} with layer "
                f"{config.vision_feature_layer!r}: only one layer and 'default' (no CLS) are supported"
            )
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.language = model.model.language_model
        side = config.vision_config.image_size // config.vision_config.patch_size
        self.grid = PatchGrid(side, side)
        self.image_token = config.image_token_id
        self.end_tokens = _end_tokens(model)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlavaAdapter:
        """Model and processor from a folder or hub id, with plain ``from_pretrained``."""
        model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        return cls(model.to(device), AutoProcessor.from_pretrained(path))

    @property
    def device(self) -> torch.device:
        return self.language.embed_tokens.weight.device

    @property
    def layers(self) -> int:
        return len(self.language.layers)

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Preprocessed ``(batch, 3, height, width)``."""
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """The cached signals of a batch of images: see :class:`nuwa.signals.VisionSignals` for names and shapes.

        CLS attention is recomputed from the layer's input for its one query row, so no layer runs eager attention.
        """
        config = self.model.config
        states = self.tower(pixels.to(self.device, self.tower.dtype), output_hidden_states=True).hidden_states
        at = config.vision_feature_layer % len(states)
        layer, entering = self.tower.encoder.layers[at - 1], states[at - 1]
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

    def signals(self, encoded: dict[str, Tensor], image_ids: tuple[str, ...]) -> VisionSignals:
        return VisionSignals(self.grid, **{name: encoded[name] for name in SIGNAL_NAMES}, image_ids=image_ids)

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        """Encoder features ``(batch, kept, vision_dim)`` → language embeddings ``(batch, kept, dim)``."""
        return self.projector(features.to(self.device, self.language.embed_tokens.weight.dtype))

    def encode_prompt(self, text: str) -> EncodedPrompt:
        """The model's own chat template around ``text`` and one image, split at the image placeholder."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        full = self.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        ids = self.processor.tokenizer(full).input_ids
        if ids.count(self.image_token) != 1:
            raise ValueError(f"the prompt {full!r} must hold exactly one image placeholder")
        at = ids.index(self.image_token)
        return EncodedPrompt(tuple(ids[:at]), tuple(ids[at + 1 :]))

    def decode_text(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def encoder_fingerprint(self) -> str:
        """Digest of what decides the signals: tower weights, layers read and image preprocessing."""
        preprocessing = self.processor.image_processor.to_dict()
        digest = hashlib.sha256(json.dumps(preprocessing, sort_keys=True, default=str).encode())
        digest.update(json.dumps([self.model.config.vision_feature_layer, SIMILARITY_FROM]).encode())
        _digest_weights(digest, self.tower.state_dict())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Digest of all weights and of the prompt format."""
        digest = hashlib.sha256(self.encoder_fingerprint().encode())
        digest.update(json.dumps(self.encode_prompt("?").__dict__).encode())
        _digest_weights(digest, self.model.state_dict())
        return digest.hexdigest()


def _digest_weights(digest: Any, state: dict[str, Tensor]) -> None:
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def _end_tokens(model: LlavaForConditionalGeneration) -> tuple[int, ...]:
    end = model.generation_config.eos_token_id
    end = end if end is not None else model.config.text_config.eos_token_id
    return tuple(end) if isinstance(end, (list, tuple)) else (end,)
