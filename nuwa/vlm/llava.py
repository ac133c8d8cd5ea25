"""LLaVA-1.5 and every other ``LlavaForConditionalGeneration`` with a CLIP tower: one grid, the same for all images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout
from nuwa.signals import VisionSignals
from nuwa.vlm.adapter import EncodedImage, FromTransformers, view_signals
from nuwa.vlm.clip import (
    SIMILARITY_FROM,
    ClipAdapter,
    clip_features,
    clip_signals,
    clip_sizes,
)
from nuwa.vlm.shapes import CLIP_L_336, SHAPES, VICUNA_7B, VICUNA_13B

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class LlavaAdapter(ClipAdapter):
    model_class = FromTransformers("LlavaForConditionalGeneration")
    encoder = "LLaVA's CLIP tower"
    resizes = True
    dynamic = False
    pads = True
    joint = " "  # LLaVA's own code, and lmms-eval with it: "<image> <image>" and a line break before the text
    layout: VisualLayout

    def __init__(self, model: LlavaForConditionalGeneration, processor: Any, **framing: Any) -> None:
        super().__init__(model, processor, **framing)
        self.layout = self.layout_of((0, 0))
        self.grid = self.layout.views[0].grid

    @classmethod
    def layout_for(cls, config: Any, image_processor: Any, size: tuple[int, int]) -> VisualLayout:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return VisualLayout((View(PatchGrid(side, side)),))

    @classmethod
    def usual_image_processor(cls, config: Any) -> CLIPImageProcessorPil:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return CLIPImageProcessorPil(**clip_sizes(config))

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocessed ``(batch, 3, height, width)``."""
        processor = self.processor.image_processor
        if self.image_aspect_ratio == "pad":
            colour = tuple(int(255 * mean) for mean in processor.image_mean)
            images = [pad_to_square(image, colour) for image in images]
        return processor(list(images), return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def encode(self, pixels: Tensor, further: Collection[str] = ()) -> dict[str, Tensor]:
        """The cached signals of a batch of images: see :class:`nuwa.signals.VisionSignals` for names and shapes."""
        pixels = pixels.to(self.device, self.tower.dtype)
        return clip_signals(self.tower, pixels, self.model.config.vision_feature_layer, further)

    @torch.inference_mode()
    def encode_resized(self, images: Sequence[Image.Image], grid: PatchGrid) -> Tensor:
        """The preprocessed images, bicubically made smaller, through the same tower."""
        pixels = self.pixels(images).to(self.device, self.tower.dtype)
        patch = self.model.config.vision_config.patch_size
        size = (grid.height * patch, grid.width * patch)
        if size != tuple(pixels.shape[2:]):
            pixels = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
        return clip_features(self.tower, pixels, self.model.config.vision_feature_layer)

    def signals(
        self,
        encoded: dict[str, Tensor],
        image_ids: tuple[str, ...],
        resized: Callable[[PatchGrid], Tensor] | None = None,
    ) -> VisionSignals:
        """Signals of :meth:`encode` as stage 1 reads them."""
        (whole,) = view_signals(
            self.layout,
            encoded,
            image_ids,
            resized=resized,
            encoder=self.encoder_identity,
            heads=self.heads,
            project=self.project,
        )
        return whole

    def encode_images(self, images: Sequence[Image.Image], further: Collection[str] = ()) -> list[EncodedImage]:
        encoded = self.encode(self.pixels(images), further)
        rows = range(len(images))
        return [EncodedImage(self.layout, {name: value[row] for name, value in encoded.items()}) for row in rows]

    @property
    def encoder_settings(self) -> list[Any]:
        return [self.model.config.vision_feature_layer, SIMILARITY_FROM, self.image_aspect_ratio]


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square as wide as its longer side; an odd pixel goes right or below."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _shape(language: dict[str, Any]) -> LlavaConfig:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_L_336), text_config=LlamaConfig(**language), image_token_id=32000
    )


SHAPES.add("llava-hf/llava-1.5-7b-hf", lambda: _shape(VICUNA_7B))
SHAPES.add("llava-hf/llava-1.5-13b-hf", lambda: _shape(VICUNA_13B))
