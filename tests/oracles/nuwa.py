"""Nüwa stage 1 from equations 3-7 and Algorithm 1, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oracles.pictures import Picture, best_first, cosine, norm, quantile

EPSILON = 1e-8


@dataclass(frozen=True)
class Outcome:
    """``kept`` tokens in raster order, which of them are pillars, and their features ``(K, D)`` float64."""

    kept: list[int]
    pillars: list[bool]
    features: np.ndarray


def saliences(picture: Picture, salience: str) -> list[float]:
    """Equation 3, ``α_i · ‖k_i‖``, in the float32 the signals are kept in; or ``α_i`` alone."""
    if salience == "cls_attention":
        return [float(value) for value in picture.attention]
    return [
        float(np.float32(value) * np.float32(norm(key)))
        for value, key in zip(picture.attention, picture.keys, strict=True)
    ]


def regions(height: int, width: int, side: int) -> list[list[int]]:
    """Separation: non-overlapping blocks of ``side x side`` patches; those at the far edges may be smaller."""
    blocks = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            block = []
            for row in range(top, min(top + side, height)):
                for column in range(left, min(left + side, width)):
                    block.append(row * width + column)
            blocks.append(block)
    return blocks


def candidates(
    picture: Picture, scores: list[float], keep: int, side: int, per_region: int | None
) -> tuple[list[int], int]:
    """Alignment: the n best of every region, and n, which grows until there are at least ``keep`` of them."""
    n = per_region or 1
    while True:
        found = []
        for block in regions(picture.height, picture.width, side):
            found += best_first(scores, block)[:n]
        if len(found) >= keep:
            return found, n
        n += 1


def pillar_flags(picture: Picture, scores: list[float], kept: list[int], signal: str, share: float) -> list[bool]:
    """Equation 4: a pillar's signal is at or above its quantile among the kept tokens."""
    values = {
        "salience": lambda token: scores[token],
        "key_norm": lambda token: norm(picture.keys[token]),
        "feature_norm": lambda token: norm(picture.features[token]),
    }
    found = [float(np.float32(values[signal](token))) for token in kept]
    threshold = quantile(found, share)
    return [value >= threshold for value in found]


def reach_in_patches(height: int, width: int, threshold: float, convention: str) -> float:
    """``d_thresh``: in patches, or a share of the largest distance, of its square, or of that on an even grid."""
    if convention == "patches":
        return threshold
    if convention == "plain_even":
        height, width = -(-height // 2) * 2, -(-width // 2) * 2
    squared = (height - 1) ** 2 + (width - 1) ** 2
    return (threshold * squared) ** 0.5 if convention == "squared" else threshold * squared**0.5


def weight_row(picture: Picture, token: int, threshold: float, convention: str, reset: bool) -> list[float]:
    """Equations 5-7: one collector's weights over all tokens, ``ReLU(cos) · (1 - min(1, d / d_thresh))``."""
    reach = reach_in_patches(picture.height, picture.width, threshold, convention)
    row, column = picture.place(token)
    weights = []
    for other in range(picture.tokens):
        other_row, other_column = picture.place(other)
        distance = ((row - other_row) ** 2 + (column - other_column) ** 2) ** 0.5
        proximity = 1.0 if distance == 0 else (1 - min(1.0, distance / reach))
        affinity = max(0.0, cosine(picture.similarity[token], picture.similarity[other]))
        weights.append(affinity * proximity)
    total = sum(weights) + EPSILON
    weights = [weight / total for weight in weights]
    if reset:
        weights[token] = 1.0
    return weights


def select(
    picture: Picture,
    keep: int,
    *,
    separation: bool,
    region_side: int,
    candidates_per_region: int | None,
    salience: str,
    pillars: bool,
    pillar_signal: str,
    pillar_quantile: float,
    aggregation: bool,
    distance_threshold: float,
    distance_convention: str,
    reset_self_weight: bool,
) -> Outcome:
    """Separation, alignment, roles, aggregation."""
    scores = saliences(picture, salience)
    offered = list(range(picture.tokens))
    if separation:
        offered, _ = candidates(picture, scores, keep, region_side, candidates_per_region)
    kept = sorted(best_first(scores, offered)[:keep])
    features = [picture.features[token].astype(np.float64) for token in kept]
    if not aggregation:
        return Outcome(kept, [True] * len(kept), np.stack(features))
    flags = [False] * len(kept)
    if pillars:
        flags = pillar_flags(picture, scores, kept, pillar_signal, pillar_quantile)
    for at, token in enumerate(kept):
        if flags[at]:
            continue
        gathered = np.zeros(picture.features.shape[1])
        row = weight_row(picture, token, distance_threshold, distance_convention, reset_self_weight)
        for other, weight in enumerate(row):
            gathered += weight * picture.features[other].astype(np.float64)
        features[at] = gathered
    return Outcome(kept, flags, np.stack(features))
