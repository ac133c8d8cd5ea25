"""PruMerge+, one token at a time: outliers of attention, evenly spaced others, and weighted merging of the dropped."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from oracles.nuwa import Outcome
from oracles.pictures import Picture, best_first, quantile, similarity


def outliers(picture: Picture, outlier_range: float) -> list[int]:
    """Tokens above Q3 + range · (Q3 - Q1), in exact arithmetic."""
    values = [float(value) for value in picture.attention]
    first, third = quantile(values, 0.25), quantile(values, 0.75)
    bound = third + Fraction(str(outlier_range)) * (third - first)
    return [token for token, value in enumerate(values) if Fraction(value) > bound]


def chosen(picture: Picture, keep: int, outlier_range: float) -> list[int]:
    """The most attended outliers that fit; the missing ones stand at the middles of equal parts of what is left."""
    above = set(outliers(picture, outlier_range))
    important = [token for token in best_first([float(value) for value in picture.attention]) if token in above][:keep]
    left = [token for token in range(picture.tokens) if token not in important]
    missing = keep - len(important)
    spaced = [left[(2 * place + 1) * len(left) // (2 * missing)] for place in range(missing)]
    return sorted(important + spaced)


def weight_row(picture: Picture, token: int, kept: list[int], neighbours: int, weights: str) -> list[float]:
    """What one kept token takes of every token."""
    dropped = [other for other in range(picture.tokens) if other not in kept]
    likeness = {other: similarity(picture.keys[token], picture.keys[other]) for other in dropped}
    near = sorted(dropped, key=lambda other: (-likeness[other], other))[:neighbours]
    row = [0.0] * picture.tokens
    for other in near:
        row[other] = float(picture.attention[other])
    if weights == "sum":
        row[token] = 1.0
        return row
    row[token] = float(picture.attention[token])
    total = sum(row)
    if total == 0:
        row[token] = total = 1.0
    return [weight / total for weight in row]


def select(
    picture: Picture, keep: int, outlier_range: float = 1.5, neighbours: int = 32, weights: str = "mean"
) -> Outcome:
    kept = chosen(picture, keep, outlier_range)
    merges = keep < picture.tokens and neighbours > 0
    features = []
    for token in kept:
        value = picture.features[token].astype(np.float64)
        if merges:
            value = np.zeros_like(value)
            for other, weight in enumerate(weight_row(picture, token, kept, neighbours, weights)):
                value += weight * picture.features[other].astype(np.float64)
        features.append(value)
    return Outcome(kept, [not merges] * keep, np.stack(features))
