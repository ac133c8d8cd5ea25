"""Qwen2-VL (``Qwen2VLForConditionalGeneration``): Qwen2.5-VL with an encoder whose every block sees the whole image.

What the two share, grids, merger, three position ids and the signals of :mod:`nuwa.vlm.qwen2_5_vl`, is inherited. Here
nothing is in window order; the encoder's width is ``embed_dim``, and ``hidden_size`` of its configuration is the language
model's (transformers, ``models/qwen2_vl``). The merger normalises the four patches one by one before it joins them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nuwa.grid import PatchGrid
from nuwa.vlm.adapter import FromTransformers
from nuwa.vlm.qwen2_5_vl import SIMILARITY_BLOCKS, Qwen2_5VLAdapter
from nuwa.vlm.shapes import QWEN_PATCHES, SHAPES, qwen2_7b

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig


class Qwen2VLAdapter(Qwen2_5VLAdapter):
    model_class = FromTransformers("Qwen2VLForConditionalGeneration")
    encoder = "Qwen2-VL's vision encoder"

    @classmethod
    def signal_widths(cls, config: Any) -> dict[str, int]:
        vision = config.vision_config
        merged = vision.hidden_size
        return {"features": merged, "cls_attention": 1, "keys": vision.embed_dim, "similarity": merged}

    @property
    def _whole_blocks(self) -> Sequence[int]:
        return range(len(self.visual.blocks))

    def _windows(self, grid: PatchGrid) -> tuple[Tensor, list[int]]:
        return torch.arange(grid.tokens), [grid.tokens]

    @property
    def encoder_settings(self) -> list[Any]:
        return list(SIMILARITY_BLOCKS)


@functools.partial(SHAPES.add, "Qwen/Qwen2-VL-7B-Instruct")
def _shape() -> Qwen2VLConfig:
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        # As config.json of the checkpoint has it; what is not named is the default of transformers.
        text_config=qwen2_7b(32768),
        vision_config=QWEN_PATCHES
        | {
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 3584,
            "mlp_ratio": 4,
        },
    )
