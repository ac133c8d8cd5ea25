"""Evenly spaced tokens: a coarser grid, blind to content."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nuwa.grid import PatchGrid
from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import VisionSignals
from nuwa.stage1.registry import register


@dataclass(frozen=True)
class Uniform:
    """No hyper-parameters."""


def even_indices(grid: PatchGrid, keep: int) -> list[int]:
    """Exactly ``keep`` raster indices on evenly spaced rows, each row's tokens evenly spaced in turn."""
    fewest_rows = math.ceil(keep / grid.width)
    rows = min(max(round(math.sqrt(keep * grid.height / grid.width)), fewest_rows, 1), grid.height, keep)
    indices = []
    for row in range(rows):
        count = keep * (row + 1) // rows - keep * row // rows
        line = int((row + 0.5) * grid.height / rows)
        indices += [line * grid.width + int((column + 0.5) * grid.width / count) for column in range(count)]
    return indices


@register("uniform", Uniform)
def select(signals: VisionSignals, keep: int, config: Uniform, seed: int = 0) -> Selection:
    indices = torch.tensor(even_indices(signals.grid, keep), device=signals.features.device)
    return keep_unmerged(signals, indices.expand(len(signals.image_ids), -1))
