"""DivPrune's Algorithm 1, one pair at a time: max-min diversity by greedy choice, distance 1 - cos of the features."""

from __future__ import annotations

from oracles.nuwa import Outcome
from oracles.pictures import Picture, similarity


def select(picture: Picture, keep: int) -> Outcome:
    """First the token farthest from its nearest neighbour, then the one farthest from its nearest chosen token."""

    def distance(one: int, other: int) -> float:
        return 1 - similarity(picture.features[one], picture.features[other])

    chosen: list[int] = []
    while len(chosen) < keep:
        best, reach = None, None
        for token in range(picture.tokens):
            if token in chosen:
                continue
            others = chosen or [other for other in range(picture.tokens) if other != token]
            nearest = min((distance(token, other) for other in others), default=0.0)
            if reach is None or nearest > reach:  # strictly: of equals the lower index stays
                best, reach = token, nearest
        chosen.append(best)
    kept = sorted(chosen)
    return Outcome(kept, [True] * keep, picture.features[kept].astype(float))
