"""LLaVA-OneVision (``LlavaOnevisionForConditionalGeneration``): LLaVA-NeXT's layout over SigLIP, pooled behind the projector.

A base crop and a local grid that is stitched from up to 36 crops and cut from its padding. Where the local grid has more
than 1.1² · 9 crops' worth of tokens (``vision_aspect_ratio`` ``anyres_max_9``), the stock model shrinks it bilinearly to
nine, *behind* the projector. Pooling and a projector that is not linear do not commute, so ``features`` are what the
language model sees, projected and pooled, and every other signal is pooled alike (transformers 5.23,
``models/llava_onevision/modeling_llava_onevision.py``, ``pack_image_features``).

An image that is one of several in a question is shown otherwise: the whole of it, padded to a square with the processor's
mean colour, as one crop that one newline token ends. So it is where the processor is given a list of images for every text,
as its chat template gives them (``image_processing_pil_llava_onevision.py``, ``need_patching``); of a flat list of images it
says nothing about which text they belong to, and shows each with its crops.

SigLIP has no CLS token: ``cls_attention`` is the attention a token receives in the layer of the features, mean over heads
and queries; ``early_attention`` and ``received_middle`` are the same of the layers that CLIP's are read in.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout
from nuwa.vlm.adapter import EncodedImage, Frame, FromTransformers
from nuwa.vlm.checkpoint import CheckpointError
from nuwa.vlm.clip import FURTHER_LAYERS, SIMILARITY_FROM, ClipAdapter, earlier_layer
from nuwa.vlm.llava_next import LlavaNextAdapter
from nuwa.vlm.received import received
from nuwa.vlm.shapes import QWEN2_7B, SHAPES

if TYPE_CHECKING:
    from transformers import LlavaOnevisionConfig
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

ENOUGH = 1.1  # a grid is pooled where each side would shrink by more than this
CROPS = 16  # that pass the tower at once; an image may have 37
ASPECT_RATIO = re.compile(r"anyres_max_([1-9]\d*)")


class LlavaOnevisionAdapter(LlavaNextAdapter):
    model_class = FromTransformers("LlavaOnevisionForConditionalGeneration")
    encoder = "LLaVA-OneVision's SigLIP tower"
    offers_cls = False
    pairs_text = False
    alike = False
    joint = None
    turn = "{system}<|im_start|>user <image>\n{text}<|im_end|><|im_start|>assistant\n"

    @classmethod
    def check_config(cls, config: Any) -> None:
        tower, layer = config.vision_config.model_type, config.vision_feature_layer
        if tower != "siglip_vision_model":
            raise CheckpointError(
                f"config.vision_config.model_type = {tower!r}: {cls.encoder} is read as siglip_vision_model; "
                "other towers are not supported"
            )
        if config.vision_feature_select_strategy != "full" or not isinstance(layer, int):
            raise CheckpointError(
                f"config.vision_feature_select_strategy = {config.vision_feature_select_strategy!r} with "
                f"vision_feature_layer {layer!r}: only one layer and 'full' are supported"
            )

        depth = config.vision_config.num_hidden_layers
        if not -depth <= layer <= depth or layer == 0:
            raise CheckpointError(
                f"config.vision_feature_layer = {layer}: the tower has {depth} layers; "
                f"allowed: 1 to {depth} and -{depth} to -1"
            )
        if not ASPECT_RATIO.fullmatch(config.vision_aspect_ratio):
            raise CheckpointError(
                f"config.vision_aspect_ratio = {config.vision_aspect_ratio!r}: only anyres_max_<crops> is supported, as "
                "anyres_max_9"
            )
        super(ClipAdapter, cls).check_config(config)  # not those of a CLIP tower

    @classmethod
    def local_grid(cls, config: Any, stitched: PatchGrid) -> PatchGrid:
        side = config.vision_config.image_size // config.vision_config.patch_size
        crops = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(stitched.tokens / (crops * side**2))
        if ratio <= ENOUGH:
            return stitched
        return PatchGrid(int(stitched.height // ratio), int(stitched.width // ratio))

    def resample(self, stitched: Tensor) -> Tensor:
        height, width = stitched.shape[1:]
        if not height * width:
            return stitched
        grid = self.local_grid(self.model.config, PatchGrid(height, width))
        if (grid.height, grid.width) == (height, width):
            return stitched
        return F.interpolate(stitched[None], (grid.height, grid.width), mode="bilinear")[0]

    @classmethod
    def signal_widths(cls, config: Any) -> dict[str, int]:
        width = config.vision_config.hidden_size
        return {"features": config.text_config.hidden_size, "cls_attention": 1, "keys": width, "similarity": width}

    @classmethod
    def view_frames(cls, config: Any, layout: VisualLayout, size: tuple[int, int]) -> tuple[Frame, ...]:
        if not layout.views[0].closing:
            return super().view_frames(config, layout, size)
        width, height = size
        side = max(size)  # of the square that the image stands in the middle of
        return ((-((side - width) // 2) / width, -((side - height) // 2) / height, side / width, side / height),)

    @classmethod
    def usual_image_processor(cls, config: Any) -> LlavaOnevisionImageProcessorPil:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        side = config.vision_config.image_size
        return LlavaOnevisionImageProcessorPil(
            size={"height": side, "width": side}, image_grid_pinpoints=config.image_grid_pinpoints
        )

    def layout_among(self, size: tuple[int, int]) -> VisualLayout:
        return VisualLayout((View(self.crop_grid, closing=True),))

    @torch.inference_mode()
    def encode_among(self, images: Sequence[Image.Image], further: Collection[str] = ()) -> list[EncodedImage]:
        # The processor is told that they are several; which they stand beside makes no difference.
        several = [*images, images[0]]
        crops = self.processor.image_processor([several], return_tensors="pt")["pixel_values"][: len(images), 0]
        encoded = self.encode_crops(crops.to(self.device, self.tower.dtype), further)
        return [
            EncodedImage(self.layout_among(image.size), {name: held[number] for name, held in encoded.items()})
            for number, image in enumerate(images)
        ]

    def encode_crops(self, crops: Tensor, further: Collection[str]) -> dict[str, Tensor]:
        parts = [self._encode(part, further) for part in crops.split(CROPS)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode(self, crops: Tensor, further: Collection[str]) -> dict[str, Tensor]:
        states = self.tower(crops, output_hidden_states=True).hidden_states
        at = self.model.config.vision_feature_layer % len(states)
        attention, keys = self._received(at, states)
        first = round(SIMILARITY_FROM * (len(states) - 1))
        signals = {
            "features": self.projector(states[at]),
            "cls_attention": attention,
            "keys": keys,
            "similarity": torch.stack(states[first:]).mean(dim=0),
        }

        if "received_late" in further:
            signals["received_late"] = attention
        for name, share in FURTHER_LAYERS.items():
            if name in further:
                signals[name] = self._received(earlier_layer(name, share, len(states) - 1, at), states)[0]
        return signals

    def _received(self, number: int, states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Attention received in layer ``number``, counted from 1, ``(crops, tokens)``, and its keys ``(crops, tokens, dim)``."""
        layer = self.tower.encoder.layers[number - 1]
        attention, normed = layer.self_attn, layer.layer_norm1(states[number - 1])
        query, key = attention.q_proj(normed), attention.k_proj(normed)
        split = (*key.shape[:2], attention.num_heads, attention.head_dim)
        return received(query.view(split).transpose(1, 2), key.view(split).transpose(1, 2), attention.scale), key

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        """They are projected already."""
        return features.to(self.device, self.language.embed_tokens.weight.dtype)

    @property
    def encoder_modules(self) -> dict[str, nn.Module]:
        return {"tower": self.tower, "projector": self.projector}

    @property
    def encoder_settings(self) -> list[Any]:
        return [*super().encoder_settings, self.model.config.vision_aspect_ratio]


@functools.partial(SHAPES.add, "llava-hf/llava-onevision-qwen2-7b-ov-hf")
def _shape() -> LlavaOnevisionConfig:
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        # As config.json of the checkpoint has it; what is not named is the default of transformers.
        text_config=QWEN2_7B | {"vocab_size": 152128},
    )
