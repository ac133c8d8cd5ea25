"""VisionZip, one token at a time: dominant tokens by CLS attention, the rest averaged into evenly spaced targets."""

from __future__ import annotations

import numpy as np

from oracles.nuwa import Outcome
from oracles.pictures import Picture, best_first, similarity


def contextual_count(keep: int, tokens: int, share: float) -> int:
    """10 of 64, 20 of 128, 30 of 192; nothing is left to merge when everything is kept."""
    return 0 if keep == tokens else round(keep * share)


def head_mean(key: np.ndarray, heads: int) -> np.ndarray:
    """Entry ``d`` is the mean of the heads' entries ``d``; heads stand side by side."""
    width = len(key) // heads
    return np.array([sum(float(key[head * width + d]) for head in range(heads)) / heads for d in range(width)])


def select(picture: Picture, keep: int, share: float = 10 / 64, heads: int = 1) -> Outcome:
    """Raster order. A contextual token is its target plus the mean of what joined it; nobody joining adds nothing."""
    contextual = contextual_count(keep, picture.tokens, share)
    dominant = best_first([float(value) for value in picture.attention])[: keep - contextual]
    rest = [token for token in range(picture.tokens) if token not in dominant]
    targets = [rest[number * (len(rest) // contextual)] for number in range(contextual)]
    keys = [head_mean(key, heads) for key in picture.keys]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest:
        if token in joined or not targets:
            continue
        likeness = [similarity(keys[token], keys[target]) for target in targets]
        joined[targets[likeness.index(max(likeness))]].append(token)  # the first of equally similar targets
    kept = sorted([*dominant, *targets])
    features = []
    for token in kept:
        value = picture.features[token].astype(np.float64)
        if joined.get(token):
            total = np.zeros_like(value)
            for other in joined[token]:
                total += picture.features[other]
            value = value + total / len(joined[token])
        features.append(value)
    return Outcome(kept, [token not in joined for token in kept], np.stack(features))
