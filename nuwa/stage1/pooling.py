"""Adaptive average pooling to a coarser grid (Nüwa, Algorithm 2).

The pooled grid keeps the image's aspect ratio and never exceeds the budget, so it may keep fewer tokens than asked
(30 of 32 on a square image); the realised number is what every record carries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nuwa.grid import PatchGrid
from nuwa.selection import Selection
from nuwa.signals import VisionSignals
from nuwa.stage1.registry import register


@dataclass(frozen=True)
class Pooling:
    """No hyper-parameters."""


def pooled_shape(grid: PatchGrid, keep: int) -> tuple[int, int]:
    """``W = round(sqrt(k / a))``, ``H = round(a * W)`` with a = height / width, shrunk along its longer side to fit."""
    aspect = grid.height / grid.width
    width = min(max(round(math.sqrt(keep / aspect)), 1), grid.width)
    height = min(max(round(aspect * width), 1), grid.height)
    while height * width > keep:
        if width == 1 or (height / grid.height >= width / grid.width and height > 1):
            height -= 1
        else:
            width -= 1
    return height, width


def cell_centres(grid: PatchGrid, height: int, width: int, device: torch.device) -> Tensor:
    """Indices of the patches in the centres of ``height x width`` cells, ``(height * width,)`` int64.

    The centre of cell i of n lies at ``(2i + 1) * size / 2n`` patches.
    """
    rows = (2 * torch.arange(height, device=device) + 1) * grid.height // (2 * height)
    columns = (2 * torch.arange(width, device=device) + 1) * grid.width // (2 * width)
    return (rows[:, None] * grid.width + columns).flatten()


@register("pooling", Pooling, kept=lambda grid, keep, config=None: math.prod(pooled_shape(grid, keep)))
def select(signals: VisionSignals, keep: int, config: Pooling, seed: int = 0) -> Selection:
    """A pooled token stands at the patch in the centre of its cell."""
    grid = signals.grid
    height, width = pooled_shape(grid, keep)
    batch, _, dim = signals.features.shape
    image = signals.features.reshape(batch, grid.height, grid.width, dim).permute(0, 3, 1, 2)  # channels last, no copy
    pooled = F.adaptive_avg_pool2d(image.float(), (height, width)).to(image.dtype).permute(0, 2, 3, 1).flatten(1, 2)
    indices = cell_centres(grid, height, width, image.device)
    untouched = height * width == grid.tokens
    return Selection(
        indices.expand(batch, -1),
        pooled,
        torch.full((batch, height * width), untouched, dtype=torch.bool, device=signals.features.device),
    )
