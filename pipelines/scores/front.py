"""The Pareto front of the accuracy-cost plane."""

from __future__ import annotations

import numpy as np


def pareto_front(value: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Which trials no other equals or betters at no more cost, being better in one of the two, ``(trials,)``."""
    better = (value >= value[:, None]) & (cost <= cost[:, None])
    strictly = (value > value[:, None]) | (cost < cost[:, None])
    return ~(better & strictly).any(axis=1) & np.isfinite(value)
