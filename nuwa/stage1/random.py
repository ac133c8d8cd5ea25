"""Uniformly random tokens without replacement, seeded per image: the control every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import VisionSignals, random_scores, top_indices
from nuwa.stage1.registry import register


@dataclass(frozen=True)
class Random:
    """No hyper-parameters beside the seed."""


@register("random", Random, seeded=True)
def select(signals: VisionSignals, keep: int, config: Random, seed: int = 0) -> Selection:
    """The ``keep`` tokens that drew the largest numbers."""
    scores = random_scores(seed, signals.image_ids, signals.grid.tokens, signals.features.device)
    return keep_unmerged(signals, top_indices(scores, keep))
