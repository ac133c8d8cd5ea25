"""Evenly spaced tokens: what "even" means, checked on the outcome rather than rebuilt."""

from __future__ import annotations

import itertools


def _spacing_complaint(places: list[int], size: int, what: str) -> str | None:
    """Evenly spaced over ``0..size-1``: gaps differ by at most one, and so do the margins at both ends."""
    gaps = [after - before for before, after in itertools.pairwise(places)]
    if gaps and max(gaps) - min(gaps) > 1:
        return f"{what} {places} of {size} have gaps {gaps}"
    margins = (places[0], size - 1 - places[-1])
    if abs(margins[0] - margins[1]) > 1:
        return f"{what} {places} of {size} leave margins {margins}"
    return None


def unevenness(kept: list[int], height: int, width: int) -> str | None:
    """What is uneven about kept raster indices, or None: rows, tokens per row, and the places in every row."""
    by_row: dict[int, list[int]] = {}
    for token in kept:
        row, column = divmod(token, width)
        by_row.setdefault(row, []).append(column)
    complaint = _spacing_complaint(sorted(by_row), height, "rows")
    if complaint:
        return complaint
    counts = [len(columns) for columns in by_row.values()]
    if max(counts) - min(counts) > 1:
        return f"rows hold {counts} tokens"
    for row, columns in by_row.items():
        complaint = _spacing_complaint(columns, width, f"columns of row {row}")
        if complaint:
            return complaint
    return None
