"""Qwen2.5-VL (``Qwen2_5_VLForConditionalGeneration``): a grid of its own for every image, and three position ids a token.

Stage 1 works behind the 2x2 merger, on the tokens the language model sees. The encoder has no CLS token: the salience
of a token is the attention it receives in the last block, mean over heads and queries and over its four patches; it
stands in the signals as ``cls_attention``. ``similarity`` is the merger's output for the mean of the block outputs
7...23 of 32. The encoder works window by window; all signals are put back in raster order.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from nuwa.grid import PatchGrid
from nuwa.image_rules import PUBLISHED
from nuwa.layout import View, VisualLayout
from nuwa.vlm.adapter import Adapter, EncodedImage, FromTransformers, UnavailableSignal
from nuwa.vlm.shapes import QWEN_PATCHES, SHAPES, qwen2_7b

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SIMILARITY_BLOCKS = (7 / 32, 23 / 32)  # first and last, as shares of the encoder's depth
QUERY_ROWS = 1024  # attention is summed over this many query rows at a time


class Qwen2_5VLAdapter(Adapter):
    model_class = FromTransformers("Qwen2_5_VLForConditionalGeneration")
    encoder = "Qwen2.5-VL's vision encoder"
    offers_cls = False
    turn = (
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<|vision_start|><image><|vision_end|>{text}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    usual_system = "You are a helpful assistant."

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: Any, **framing: Any) -> None:
        super().__init__(model, processor, **framing)
        self.visual = model.model.visual
        self.merge = model.config.vision_config.spatial_merge_size

    @property
    def heads(self) -> int:
        return self.visual.config.num_heads

    @classmethod
    def layout_for(cls, config: Any, image_processor: Any, size: tuple[int, int]) -> VisualLayout:
        width, height = size
        vision, limits = config.vision_config, image_processor.size
        cell = vision.patch_size * vision.spatial_merge_size
        if first := _first_resize(image_processor, cell, size):
            width, height = first
        rows, columns = _resized(height, width, cell, limits["shortest_edge"], limits["longest_edge"])
        return cls.layout_on(config, PatchGrid(rows // cell, columns // cell))

    @classmethod
    def layout_on(cls, config: Any, grid: PatchGrid) -> VisualLayout:
        """The layout of an image whose merged tokens stand on ``grid``."""
        return VisualLayout((View(grid),), axes=3)

    @classmethod
    def usual_image_processor(cls, config: Any) -> Qwen2VLImageProcessorPil:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        least, most = PUBLISHED  # the class's defaults stop at a million pixels, the family's checkpoints do not
        return Qwen2VLImageProcessorPil(
            size={"shortest_edge": least, "longest_edge": most},
            patch_size=config.vision_config.patch_size,
            merge_size=config.vision_config.spatial_merge_size,
        )

    @classmethod
    def seen_size(cls, config: Any, image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Images are resized to whole merged patches, and boxes are told on those."""
        cell = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        (view,) = cls.layout_for(config, image_processor, size).views
        return view.grid.width * cell, view.grid.height * cell

    @classmethod
    def signal_widths(cls, config: Any) -> dict[str, int]:
        vision = config.vision_config
        merged = vision.out_hidden_size
        return {"features": merged, "cls_attention": 1, "keys": vision.hidden_size, "similarity": merged}

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image], further: Collection[str] = ()) -> list[EncodedImage]:
        image_processor = self.processor.image_processor
        cell = self.visual.config.patch_size * self.merge
        images = [
            image.resize(size) if (size := _first_resize(image_processor, cell, image.size)) else image
            for image in images
        ]
        inputs = image_processor(list(images), return_tensors="pt")
        thw = inputs["image_grid_thw"]
        pixels = inputs["pixel_values"].to(self.device, self.visual.dtype)
        out = self.visual(pixels, grid_thw=thw.to(self.device), output_hidden_states=True)
        states = out.hidden_states  # what enters the first block, then every block's output

        depth = len(self.visual.blocks)
        first, last = (round(share * depth) for share in SIMILARITY_BLOCKS)
        similarity = self.visual.merger(torch.stack(states[first + 1 : last + 2]).mean(dim=0))
        grids = [PatchGrid(height // self.merge, width // self.merge) for _, height, width in thw.tolist()]
        counts = [grid.tokens for grid in grids]
        patches = [count * self.merge**2 for count in counts]
        entering = states[depth - 1].split(patches)
        read = {name: states[number].split(patches) for name, number in self._further_blocks(further).items()}
        parts = zip(grids, self.entering_text(out).split(counts), entering, similarity.split(counts), strict=True)
        return [
            self._image(*part, {name: held[number] for name, held in read.items()}, further)
            for number, part in enumerate(parts)
        ]

    def entering_text(self, encoded: Any) -> Tensor:
        """What of the stock encoder's output enters the language model, ``(tokens, dim)`` of all images."""
        return encoded.pooler_output

    def _further_blocks(self, further: Collection[str]) -> dict[str, int]:
        """Which block each earlier signal is read in: the first that attends to the whole image, and the middle one.

        The released codes name blocks 8 and 16 of 32, both of which do. Raises :class:`UnavailableSignal`.
        """
        depth, whole = len(self.visual.blocks), self._whole_blocks
        middle = min(whole, key=lambda number: (abs(number + 1 - depth / 2), number), default=depth)
        blocks = {"early_attention": min(whole, default=depth), "received_middle": middle}
        wanted = {name: number for name, number in blocks.items() if name in further}
        for name, number in wanted.items():
            if number >= depth - 1:
                raise UnavailableSignal(
                    f"signal {name} is read in a block below the last that attends to the whole image; of {depth} blocks "
                    f"those that do are {', '.join(str(block + 1) for block in sorted(whole)) or 'none'}"
                )
        return wanted

    def _image(
        self,
        grid: PatchGrid,
        features: Tensor,
        entering: Tensor,
        similarity: Tensor,
        earlier: Mapping[str, Tensor],
        further: Collection[str],
    ) -> EncodedImage:
        """One image; all but ``features`` is in window order, ``entering`` and ``earlier`` patch by patch.

        ``earlier``: what enters the blocks that further signals are read in.
        """
        order, windows = self._windows(grid)
        received, keys = self._received(len(self.visual.blocks) - 1, grid, entering, order, windows)
        raster = order.argsort().to(features.device)
        signals = {
            "features": features,
            "cls_attention": received[raster],
            "keys": keys[raster],
            "similarity": similarity[raster],
        }
        blocks = self._further_blocks(earlier)
        for name, states in earlier.items():
            signals[name] = self._received(blocks[name], grid, states, order, windows)[0][raster]

        if "received_late" in further:
            signals["received_late"] = signals["cls_attention"]
        return EncodedImage(self.layout_on(self.model.config, grid), signals)

    @property
    def _whole_blocks(self) -> Sequence[int]:
        """Numbers of the blocks that attend to the whole image, ascending."""
        return self.visual.fullatt_block_indexes

    def _windows(self, grid: PatchGrid) -> tuple[Tensor, list[int]]:
        """The merged tokens in window order, ``(tokens,)``, and how many each window has."""
        side = self.visual.window_size // self.merge // self.visual.patch_size
        _, windows = grid.regions(side).unique(return_inverse=True)
        return windows.argsort(stable=True), windows.bincount().tolist()

    def _received(
        self, number: int, grid: PatchGrid, entering: Tensor, order: Tensor, windows: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Attention received in block ``number``, ``(tokens,)`` float32, and its keys ``(tokens, dim)``, of the merged
        tokens in window order."""
        block, patches = self.visual.blocks[number], self.merge**2
        attention = block.attn

        heads = attention.num_heads
        projected = attention.qkv(block.norm1(entering)).view(len(entering), 3, heads, -1)
        query, key, _ = projected.unbind(1)
        keys = key.flatten(1).view(grid.tokens, patches, -1).float().mean(dim=1).to(entering.dtype)

        cos, sin = self._rotation(grid, order.to(query.device))
        query, key = _rotate(query, cos, sin).transpose(0, 1), _rotate(key, cos, sin).transpose(0, 1)

        # Blocks that do not see the whole image see one window at a time.
        whole = number in self._whole_blocks
        lengths = [len(entering)] if whole else [count * patches for count in windows]
        received = [
            _received(*part, attention.scaling)
            for part in zip(query.split(lengths, 1), key.split(lengths, 1), strict=True)
        ]
        return torch.cat(received).view(grid.tokens, patches).mean(dim=1), keys

    def _rotation(self, grid: PatchGrid, order: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines of every patch, in window order: ``(patches, 1, head_dim)``."""
        merged = grid.coordinates.to(order.device)[order]
        inner = PatchGrid(self.merge, self.merge).coordinates.to(order.device)
        places = (merged[:, None] * self.merge + inner).flatten(0, 1)
        frequencies = self.visual.rotary_pos_emb.inv_freq.to(order.device, torch.float32)
        angles = (places[:, :, None] * frequencies).flatten(1).repeat(1, 2)[:, None]
        return angles.cos(), angles.sin()

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        """The merger has projected them already."""
        return features.to(self.device, self.language.embed_tokens.weight.dtype)

    @property
    def encoder_modules(self) -> dict[str, nn.Module]:
        return {"visual": self.visual}

    @property
    def encoder_settings(self) -> list[Any]:
        return [*SIMILARITY_BLOCKS, self.visual.window_size, list(self.visual.fullatt_block_indexes)]


def _rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = values.float().chunk(2, dim=-1)
    return (values.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(values.dtype)


def _received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Mean over heads and queries of the attention every key receives, ``(keys,)`` float32."""
    total = torch.zeros(key.shape[1], dtype=torch.float32, device=key.device)
    for rows in query.split(QUERY_ROWS, dim=1):
        total += (rows @ key.transpose(1, 2) * scaling).softmax(dim=-1, dtype=torch.float32).sum(dim=(0, 1))
    return total / (query.shape[0] * query.shape[1])


def _first_resize(image_processor: Any, cell: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Width and height to which an image of ``size`` is resized before the processor resizes it again; None: it is not.

    See :class:`nuwa.image_rules.Pins`; Pillow's usual filter for that, bicubic, is also ``qwen_vl_utils``'s.
    """
    limits = getattr(image_processor, "first_resize", None)
    if limits is None:
        return None
    # That library gives a side below half a cell a whole one before it looks at the limits; the processor, after.
    width, height = (max(cell, round(side / cell) * cell) for side in size)
    if min(size) >= cell / 2 or width * height < limits[0]:
        height, width = _resized(size[1], size[0], cell, *limits)
    return width, height


def _resized(height: int, width: int, cell: int, least: int, most: int) -> tuple[int, int]:
    """Height and width of whole cells that the stock processor makes of a picture, between ``least`` and ``most`` pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    return smart_resize(height, width, cell, least, most)


@functools.partial(SHAPES.add, "Qwen/Qwen2.5-VL-7B-Instruct")
def _shape() -> Qwen2_5_VLConfig:
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        # As config.json of the checkpoint has it; what is not named is the default of transformers.
        text_config=qwen2_7b(128000),
        vision_config=QWEN_PATCHES
        | {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    )
