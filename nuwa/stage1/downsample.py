"""Downsampling: the image is made smaller before the encoder, so that the encoder itself yields the budget.

The one baseline that spares the encoder too. Position embeddings of the encoder are interpolated to the smaller grid.
Grid and places are those of pooling, so it may keep fewer tokens than asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nuwa.grid import PatchGrid
from nuwa.selection import Selection
from nuwa.signals import VisionSignals
from nuwa.stage1.pooling import cell_centres, pooled_shape
from nuwa.stage1.registry import register


@dataclass(frozen=True)
class Downsample:
    """No hyper-parameters."""


@register(
    "downsample",
    Downsample,
    reads_images=True,
    kept=lambda grid, keep, config=None: math.prod(pooled_shape(grid, keep)),
)
def select(signals: VisionSignals, keep: int, config: Downsample, seed: int = 0) -> Selection:
    """A token stands at the patch in the centre of what it shows; all are as the encoder gave them.

    Raises ``ValueError`` where the images are not at hand.
    """
    if signals.resized is None:
        raise ValueError("downsample encodes smaller images; give the images, cached features do not hold them")
    shape = pooled_shape(signals.grid, keep)
    features = signals.resized(PatchGrid(*shape)).to(signals.features)
    indices = cell_centres(signals.grid, *shape, features.device).expand(len(features), -1)
    return Selection(indices, features, torch.ones_like(indices, dtype=torch.bool))
