"""VisPruner, one token at a time: the most attended tokens, then rounds in which near-duplicates of the others go."""

from __future__ import annotations

from fractions import Fraction

from oracles.nuwa import Outcome
from oracles.pictures import Picture, best_first, similarity


def select(picture: Picture, keep: int, important_share: float = 0.5, drop_per_round: int = 8) -> Outcome:
    """Deal the rest alternately to two groups, drop the first group's tokens that are likest to one of the second."""
    order = best_first([float(value) for value in picture.attention])
    important = int(Fraction(str(important_share)) * keep)
    rest = order[important:]
    while len(rest) > keep - important:
        first, second = rest[0::2], rest[1::2]
        likeness = {}
        for token in first:
            pairs = [similarity(picture.features[token], picture.features[other]) for other in second]
            likeness[token] = max(pairs, default=float("-inf"))
        drop = min(drop_per_round, len(rest) - (keep - important), len(first))
        # Likest first; of equally like ones that dealt later.
        falling = sorted(first, key=lambda token: (-likeness[token], -first.index(token)))
        rest = falling[drop:] + second
    kept = sorted(order[:important] + rest)
    return Outcome(kept, [True] * keep, picture.features[kept].astype(float))
