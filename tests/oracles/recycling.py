"""SparseVLM's recycling, token by token: which dropped tokens are pooled, density peaks, clusters and their means."""

from __future__ import annotations

import math

import numpy as np

from oracles.pictures import best_first


def pool_size(dropped: int) -> int:
    """The better 30 % of the dropped tokens, rounded down, and one more."""
    return min(3 * dropped // 10 + 1, dropped)


def clusters(entering: int, keep: int) -> int:
    """How many of ``keep`` tokens are recycled: those selected and a tenth of the pool, plus one, make up ``keep``."""
    for selected in range(keep, -1, -1):
        dropped = entering - selected
        made = pool_size(dropped) // 10 + 1 if dropped else 0
        if selected + made <= keep:
            return min(keep - selected, keep // 2)
    return keep // 2


def recycle(
    hidden: np.ndarray, scores: list[float], keep: int, noise: np.ndarray
) -> tuple[list[int], dict[int, np.ndarray]]:
    """One question's cut. ``hidden`` (tokens, dim), ``noise`` (tokens,) in 0..1.

    Returns the selected tokens and ``centre → mean of its cluster``.
    """
    count = clusters(len(hidden), keep)
    ranking = best_first(scores)
    selected = sorted(ranking[: keep - count])
    if not count:
        return selected, {}
    dropped = ranking[keep - count :]
    pool = sorted(dropped[: max(pool_size(len(dropped)), count)])
    distance = [[_distance(hidden[a], hidden[b]) for b in pool] for a in pool]
    farthest = max(max(row) for row in distance)
    density = []
    for at, row in enumerate(distance):
        nearest = sorted(row)[:count]
        density.append(math.exp(-sum(d * d for d in nearest) / count) + 1e-6 * float(noise[pool[at]]))
    rating = []
    for at in range(len(pool)):
        denser = [distance[at][other] for other in range(len(pool)) if density[other] > density[at]]
        rating.append(density[at] * min(denser, default=farthest))
    centres = sorted(best_first(rating)[:count])
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for at in range(len(pool)):
        home = at if at in members else min(centres, key=lambda centre: (distance[at][centre], centre))
        members[home].append(at)
    means = {
        pool[centre]: np.mean([hidden[pool[at]].astype(np.float64) for at in mine], axis=0)
        for centre, mine in members.items()
    }
    return selected, means


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    squares = sum((float(a) - float(b)) ** 2 for a, b in zip(one, other, strict=True))
    return math.sqrt(squares) / math.sqrt(len(one))
