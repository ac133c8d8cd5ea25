"""FasterVLM, one token at a time: the most attended tokens."""

from __future__ import annotations

from oracles.nuwa import Outcome
from oracles.pictures import Picture, best_first


def select(picture: Picture, keep: int) -> Outcome:
    kept = sorted(best_first([float(value) for value in picture.attention])[:keep])
    return Outcome(kept, [True] * keep, picture.features[kept].astype(float))
