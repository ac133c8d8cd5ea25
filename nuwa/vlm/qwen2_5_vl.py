"""Qwen2.5-VL (``Qwen2_5_VLForConditionalGeneration``): a grid of its own for every image, and three position ids a token.

Stage 1 works behind the 2x2 merger, on the tokens the language model sees. The encoder has no CLS token: the salience
of a token is the attention it receives in the last block, mean over heads and queries and over its four patches; it
stands in the signals as ``cls_attention``. ``similarity`` is the merger's output for the mean of the block outputs
7...23 of 32. The encoder works window by window; all signals are put back in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout
from nuwa.vlm.adapter import Adapter, EncodedImage

SIMILARITY_BLOCKS = (7 / 32, 23 / 32)  # first and last, as shares of the encoder's depth
QUERY_ROWS = 1024  # attention is summed over this many query rows at a time


class Qwen2_5VLAdapter(Adapter):
    model_class = Qwen2_5_VLForConditionalGeneration
    encoder = "Qwen2.5-VL's vision encoder"
    offers_cls = False

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: Any, **framing: str) -> None:
        super().__init__(model, processor, **framing)
        self.visual = model.model.visual
        self.merge = self.visual.spatial_merge_size

    @classmethod
    def layout_for(cls, config: Any, image_processor: Any, size: tuple[int, int]) -> VisualLayout:
        width, height = size
        vision, limits = config.vision_config, image_processor.size
        cell = vision.patch_size * vision.spatial_merge_size
        rows, columns = smart_resize(height, width, cell, limits["shortest_edge"], limits["longest_edge"])
        return VisualLayout((View(PatchGrid(rows // cell, columns // cell)),), axes=3)

    @classmethod
    def signal_widths(cls, config: Any) -> dict[str, int]:
        vision = config.vision_config
        merged = vision.out_hidden_size
        return {"features": merged, "cls_attention": 1, "keys": vision.hidden_size, "similarity": merged}

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        inputs = self.processor.image_processor(list(images), return_tensors="pt")
        thw = inputs["image_grid_thw"]
        pixels = inputs["pixel_values"].to(self.device, self.visual.dtype)
        out = self.visual(pixels, grid_thw=thw.to(self.device), output_hidden_states=True)
        states = out.hidden_states  # what enters the first block, then every block's output
        depth = len(self.visual.blocks)
        first, last = (round(share * depth) for share in SIMILARITY_BLOCKS)
        similarity = self.visual.merger(torch.stack(states[first + 1 : last + 2]).mean(dim=0))
        grids = [PatchGrid(height // self.merge, width // self.merge) for _, height, width in thw.tolist()]
        counts = [grid.tokens for grid in grids]
        patches = self.merge**2
        entering = states[depth - 1].split([count * patches for count in counts])
        parts = zip(grids, out.pooler_output.split(counts), entering, similarity.split(counts), strict=True)
        return [self._image(*part) for part in parts]

    def _image(self, grid: PatchGrid, features: Tensor, entering: Tensor, similarity: Tensor) -> EncodedImage:
        """One image; all but ``features`` is in window order, ``entering`` patch by patch."""
        order, windows = self._windows(grid)
        received, keys = self._last_block(grid, entering, order, windows)
        raster = order.argsort().to(features.device)
        signals = {
            "features": features,
            "cls_attention": received[raster],
            "keys": keys[raster],
            "similarity": similarity[raster],
        }
        return EncodedImage(VisualLayout((View(grid),), axes=3), signals)

    def _windows(self, grid: PatchGrid) -> tuple[Tensor, list[int]]:
        """The merged tokens in window order, ``(tokens,)``, and how many each window has."""
        side = self.visual.window_size // self.merge // self.visual.patch_size
        _, windows = grid.regions(side).unique(return_inverse=True)
        return windows.argsort(stable=True), windows.bincount().tolist()

    def _last_block(
        self, grid: PatchGrid, entering: Tensor, order: Tensor, windows: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Attention received, ``(tokens,)`` float32, and keys ``(tokens, dim)`` of the merged tokens, in window order."""
        block, patches = self.visual.blocks[-1], self.merge**2
        attention = block.attn
        heads = attention.num_heads
        projected = attention.qkv(block.norm1(entering)).view(len(entering), 3, heads, -1)
        query, key, _ = projected.unbind(1)
        keys = key.flatten(1).view(grid.tokens, patches, -1).float().mean(dim=1).to(entering.dtype)
        cos, sin = self._rotation(grid, order.to(query.device))
        query, key = _rotate(query, cos, sin).transpose(0, 1), _rotate(key, cos, sin).transpose(0, 1)
        whole = len(self.visual.blocks) - 1 in self.visual.fullatt_block_indexes
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

    def rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.language.rotary_emb(hidden, position_ids=positions.to(hidden.device))

    def head_rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotation(hidden, positions)
        if cos.ndim == 3:
            return cos, sin
        # Before transformers 5.20 the three axes are only put together inside the attention.
        sections = self.language.config.rope_parameters["mrope_section"] * 2
        cos, sin = (
            torch.cat([part[at % 3] for at, part in enumerate(table.split(sections, dim=-1))], dim=-1)
            for table in (cos, sin)
        )
        return cos, sin

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
