"""Attention over kept tokens, and what its mask's gradient must be, by loops over queries and keys in float64."""

from __future__ import annotations

import math

import numpy as np


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
    """One query (D,): ``sum_j m_j e^s_j v_j / sum_j m_j e^s_j`` with any weights ``mask`` (N,), not only 0 and 1."""
    scores = [scale * float(query @ key) for key in keys]
    top = max(score for score, weight in zip(scores, mask, strict=True) if weight > 0)
    weights = [weight * math.exp(score - top) for score, weight in zip(scores, mask, strict=True)]
    total = sum(weights)
    return sum(weight / total * value.astype(np.float64) for weight, value in zip(weights, values, strict=True))


def mask_gradient(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    hard: np.ndarray,
    upstream: np.ndarray,
    visible: np.ndarray,
    scale: float,
    step: float = 1e-6,
) -> np.ndarray:
    """``dL/dm`` (N,) of queries (Q, D) with upstream gradients (Q, D), none of it from the closed formula.

    A kept token: the central difference of the loss in its mask. A dropped token: the loss's change to first order in
    the attention's output when the token comes back, alone and whole.
    """
    gradient = np.zeros(len(hard))
    for row, weight_row, pull in zip(query, visible, upstream, strict=True):
        here = hard * weight_row
        base = attend(row, keys, values, here, scale)
        for token in range(len(hard)):
            if not weight_row[token]:
                continue
            up, down = here.copy(), here.copy()
            if hard[token]:
                up[token] += step
                down[token] -= step
                change = (attend(row, keys, values, up, scale) - attend(row, keys, values, down, scale)) / (2 * step)
            else:
                up[token] = 1.0
                change = attend(row, keys, values, up, scale) - base
            gradient[token] += float(pull @ change)
    return gradient
