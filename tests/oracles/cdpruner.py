"""CDPruner by geometry: the determinant grows by the squared length of what the chosen tokens' vectors do not span."""

from __future__ import annotations

import math

import numpy as np

from oracles.nuwa import Outcome
from oracles.pictures import Picture, norm


def relevances(picture: Picture, relevance: str, theta: float | None) -> list[float]:
    if relevance == "none":
        return [1.0] * picture.tokens
    signed = [(-1 if relevance == "negative" else 1) * float(value) for value in picture.relevance]
    spread = max(signed) - min(signed)
    normal = [(value - min(signed) + 1e-6) / spread if spread else 1.0 for value in signed]
    return normal if theta is None else [math.exp(theta / (2 * (1 - theta)) * value) for value in normal]


def select(picture: Picture, keep: int, relevance: str = "negative", theta: float | None = None) -> Outcome:
    weight = relevances(picture, relevance, theta)
    vectors = []
    for token in range(picture.tokens):
        vector = picture.projected[token].astype(np.float64)
        length = norm(vector)
        vectors.append(weight[token] * vector / length if length else vector)
    # Lengths as they were, from which whatever the chosen vectors span is taken away.
    left = [vector.copy() for vector in vectors]
    largest = max(max(float(vector @ vector) for vector in vectors), 2.0**-200)
    step = 2.0 ** (math.ceil(math.log2(largest)) - 40)
    chosen: list[int] = []
    for _ in range(keep):
        gains = [float(vector @ vector) for vector in left]
        score = []
        for token in range(picture.tokens):
            spent = gains[token] <= 1e-10 * float(vectors[token] @ vectors[token])
            score.append(weight[token] / max(weight) - 2 if spent else round(gains[token] / step))
        free = [token for token in range(picture.tokens) if token not in chosen]
        best = min(free, key=lambda token: (-score[token], token))
        if score[best] >= 0:
            direction = left[best] / math.sqrt(gains[best])
            left = [vector - (vector @ direction) * direction for vector in left]
        chosen.append(best)
    kept = sorted(chosen)
    return Outcome(kept, [True] * keep, picture.features[kept].astype(float))
