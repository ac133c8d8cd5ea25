"""LLaVA-NeXT (``LlavaNextForConditionalGeneration``): a base crop and a local grid stitched from the image's own crops.

As in the stock model the local grid loses the rows or columns that are padding only, and every row of it ends in the
learned ``image_newline``. Stage 1 prunes the two grids on their own; the newline of every row is put back.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout
from nuwa.selection import Selection
from nuwa.vlm.adapter import WHOLE, EncodedImage, Frame, FromTransformers
from nuwa.vlm.clip import (
    SIMILARITY_FROM,
    ClipAdapter,
    clip_signals,
    clip_sizes,
)
from nuwa.vlm.shapes import CLIP_L_336, SHAPES, VICUNA_7B

if TYPE_CHECKING:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil


class LlavaNextAdapter(ClipAdapter):
    model_class = FromTransformers("LlavaNextForConditionalGeneration")
    encoder = "LLaVA-NeXT's CLIP tower"
    joint: ClassVar[str | None] = " "  # as LLaVA-1.5

    def __init__(self, model: LlavaNextForConditionalGeneration, processor: Any, **framing: Any) -> None:
        super().__init__(model, processor, **framing)
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        self.crop_grid = PatchGrid(side, side)

    def crops_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of local crops of an image of ``size`` (height, width)."""
        return _crops(self.model.config, self.processor.image_processor, size)

    @classmethod
    def layout_for(cls, config: Any, image_processor: Any, size: tuple[int, int]) -> VisualLayout:
        width, height = size
        side = config.vision_config.image_size // config.vision_config.patch_size
        rows, columns = _crops(config, image_processor, (height, width))
        whole = torch.empty(1, rows * side, columns * side, device="meta")
        _, shown_rows, shown_columns = _unpadded(whole, (height, width), image_processor).shape
        base = View(PatchGrid(side, side))
        if not shown_rows:  # so wide that its local grid is all padding: the stock model sees the base crop alone
            return VisualLayout((base,))
        if not shown_columns:
            raise ValueError("so tall that no column of its local grid is left without the padding, only ends of lines")
        local = cls.local_grid(config, PatchGrid(shown_rows, shown_columns))
        return VisualLayout((base, View(local, crops=rows * columns, newline=True)))

    @classmethod
    def local_grid(cls, config: Any, stitched: PatchGrid) -> PatchGrid:
        """The local grid as the language model sees it, of the one that was ``stitched`` and cut from its padding."""
        return stitched

    @classmethod
    def usual_image_processor(cls, config: Any) -> LlavaNextImageProcessorPil:
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        return LlavaNextImageProcessorPil(**clip_sizes(config), image_grid_pinpoints=config.image_grid_pinpoints)

    @classmethod
    def view_frames(cls, config: Any, layout: VisualLayout, size: tuple[int, int]) -> tuple[Frame, ...]:
        """The image is fitted into its crops, centred; the local grid is what is left of theirs without padding."""
        if len(layout.views) == 1:
            return (WHOLE,)
        (width, height), local = size, layout.views[1].grid
        rows, columns = _grid_of((height, width), config.image_grid_pinpoints, config.vision_config.image_size)
        wide = width / height > columns / rows  # padded above and below, else at the sides
        cell = width / local.width if wide else height / local.height
        shares = cell * local.width / width, cell * local.height / height
        return WHOLE, ((1 - shares[0]) / 2, (1 - shares[1]) / 2, *shares)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image], further: Collection[str] = ()) -> list[EncodedImage]:
        inputs = self.processor.image_processor(list(images), return_tensors="pt")
        sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
        counts = [1 + rows * columns for rows, columns in map(self.crops_of, sizes)]
        # The processor pads every image to the batch's largest number of crops.
        crops = torch.cat([own[:count] for own, count in zip(inputs["pixel_values"], counts, strict=True)])
        encoded = self.encode_crops(crops.to(self.device, self.tower.dtype), further)
        parts = zip(*(value.split(counts) for value in encoded.values()), strict=True)
        return [
            self._image(dict(zip(encoded, part, strict=True)), size) for part, size in zip(parts, sizes, strict=True)
        ]

    def encode_crops(self, crops: Tensor, further: Collection[str]) -> dict[str, Tensor]:
        """Signals of crops ``(crops, 3, side, side)``, each ``(crops, tokens, ...)``."""
        return clip_signals(self.tower, crops, self.model.config.vision_feature_layer, further)

    def _image(self, crops: dict[str, Tensor], size: tuple[int, int]) -> EncodedImage:
        base = {name: value[0] for name, value in crops.items()}
        stitched = {name: self._stitch(value[1:], size) for name, value in crops.items()}
        height, width = stitched["cls_attention"].shape
        if not height:
            return EncodedImage(VisualLayout((View(self.crop_grid),)), base)
        local = View(PatchGrid(height, width), crops=len(crops["features"]) - 1, newline=True)
        signals = {name: torch.cat([base[name], value.flatten(0, 1)]) for name, value in stitched.items()}
        return EncodedImage(VisualLayout((View(self.crop_grid), local)), signals)

    def _stitch(self, crops: Tensor, size: tuple[int, int]) -> Tensor:
        """``(crops, tokens, ...)`` of the local crops → ``(height, width, ...)`` without rows or columns of padding."""
        rows, columns = self.crops_of(size)
        side = self.crop_grid.height
        grid = crops.view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        shown = _unpadded(grid, size, self.processor.image_processor)
        stitched = self.resample(shown).permute(1, 2, 0)
        return stitched.reshape(*stitched.shape[:2], *crops.shape[2:])

    def resample(self, stitched: Tensor) -> Tensor:
        """``(dim, height, width)`` of a stitched grid → the same on its :meth:`local_grid`."""
        return stitched

    @torch.inference_mode()
    def embed_visual(self, selection: Selection, layout: VisualLayout) -> Tensor:
        embedded = super().embed_visual(selection, layout)
        at_newline = layout.fixed.to(embedded.device)[selection.indices.to(embedded.device)]
        with _loaded(self.model.model):
            newline = self.model.model.image_newline.to(embedded)
        return torch.where(at_newline[..., None], newline, embedded)

    @property
    def encoder_settings(self) -> list[Any]:
        config = self.model.config
        return [config.vision_feature_layer, SIMILARITY_FROM, config.image_grid_pinpoints]


def _crops(config: Any, image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of local crops of an image of ``size`` (height, width), as the processor cuts them.

    Of grids that fit alike the first counts, so their order decides: see :class:`nuwa.image_rules.ImageRules`.
    """
    return _grid_of(size, image_processor.image_grid_pinpoints, config.vision_config.image_size)


def _grid_of(size: tuple[int, int], pinpoints: Any, side: int) -> tuple[int, int]:
    """The stock model's own choice of rows and columns of crops for an image of ``size`` (height, width)."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    return get_anyres_image_grid_shape(size, pinpoints, side)


def _unpadded(grid: Tensor, size: tuple[int, int], image_processor: Any) -> Tensor:
    """``(dim, height, width)`` of the crops without the padding of an image of ``size`` (height, width), as the stock model
    cuts it; on the grid ``llava`` as LLaVA's own code does.

    The two differ where rounding leaves a whole number just below itself: of 893 rows at 24/376 the stock model keeps 57,
    which LLaVA truncates to 56.
    """
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    if getattr(image_processor, "grid", None) != "llava":
        return unpad_image(grid, size)
    (height, width), (rows, columns) = size, grid.shape[1:]
    if width / height > columns / rows:
        padding = (rows - int(height * (columns / width))) // 2
        return grid[:, padding : rows - padding]
    padding = (columns - int(width * (rows / height))) // 2
    return grid[:, :, padding : columns - padding]


def _loaded(module: nn.Module) -> AbstractContextManager:
    """Where Accelerate keeps a module's own weights elsewhere, they are at hand inside this context."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device  # only a model dispatched by Accelerate has hooks

    return align_module_device(module)


@functools.partial(SHAPES.add, "llava-hf/llava-v1.6-vicuna-7b-hf")
def _shape() -> LlavaNextConfig:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP_L_336),
        text_config=LlamaConfig(**VICUNA_7B),
        image_token_id=32000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )
