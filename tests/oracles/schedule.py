"""Average tokens of a schedule (Nüwa, B.2), counted layer by layer, and every average a form of schedule can have."""

from __future__ import annotations

from fractions import Fraction


def entering(layers: int, first: int, cuts: list[tuple[int, int]]) -> list[int]:
    counts, alive = [], first
    for layer in range(layers):
        for at, keep in cuts:
            if at == layer:
                alive = keep
        counts.append(alive)
    return counts


def average(layers: int, first: int, cuts: list[tuple[int, int]]) -> Fraction:
    return Fraction(sum(entering(layers, first, cuts)), layers)


def reachable(layers: int, tokens: int, cut: int | None, all_in_stage1: bool) -> list[Fraction]:
    """All averages of: one cut after keeping everything; one cut after any K1 ≥ K2; or no cut. Ascending."""
    found = set()
    for first in [tokens] if all_in_stage1 else range(1, tokens + 1):
        for second in range(1, first + 1) if cut is not None else [first]:
            found.add(average(layers, first, [] if cut is None else [(cut, second)]))
    return sorted(found)
