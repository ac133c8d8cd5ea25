"""HiPrune, one token at a time: anchors, their neighbours on the grid, and the best of the rest."""

from __future__ import annotations

from fractions import Fraction

from oracles.nuwa import Outcome
from oracles.pictures import Picture, best_first


def beside(picture: Picture, token: int, edges: str) -> set[int]:
    if edges == "clamp":
        last = picture.tokens - 1
        return {min(max(token + step, 0), last) for step in (-1, 1, -picture.width, picture.width)}
    row, column = picture.place(token)
    places = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
    return {
        down * picture.width + across
        for down, across in places
        if 0 <= down < picture.height and 0 <= across < picture.width
    }


def select(picture: Picture, keep: int, alpha: float = 0.1, edges: str = "drop") -> Outcome:
    exact = Fraction(str(alpha)) * keep / 5
    whole, rest = exact.numerator // exact.denominator, exact - exact.numerator // exact.denominator
    count = whole + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1))
    anchors = best_first([float(value) for value in picture.middle])[:count]
    late = [float(value) for value in picture.late]
    kept = list(anchors)
    buffers = set().union(*(beside(picture, token, edges) for token in anchors)) - set(anchors)
    kept += best_first(late, sorted(buffers))
    kept += best_first(late, [token for token in range(picture.tokens) if token not in kept])
    kept = sorted(kept[:keep])
    return Outcome(kept, [True] * keep, picture.features[kept].astype(float))
