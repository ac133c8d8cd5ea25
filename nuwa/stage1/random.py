"""Uniformly random tokens without replacement, seeded per image: the control every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import VisionSignals, seeded_generator
from nuwa.stage1.registry import register


@dataclass(frozen=True)
class Random:
    """No hyper-parameters beside the seed."""


@register("random", Random, seeded=True)
def select(signals: VisionSignals, keep: int, config: Random, seed: int = 0) -> Selection:
    tokens = signals.grid.tokens
    drawn = [seeded_generator(seed, image).permutation(tokens)[:keep] for image in signals.image_ids]
    indices = torch.from_numpy(np.sort(np.stack(drawn), axis=1)).to(signals.features.device)
    return keep_unmerged(signals, indices)
