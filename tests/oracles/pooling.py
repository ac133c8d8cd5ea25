"""Adaptive average pooling (Nüwa, Algorithm 2), one cell at a time."""

from __future__ import annotations

import math

import numpy as np

from oracles.nuwa import Outcome
from oracles.pictures import Picture


def shape(height: int, width: int, keep: int) -> tuple[int, int]:
    """``W = round(sqrt(k / a))``, ``H = round(a · W)``, at least one line each way, shrunk to at most ``keep`` cells.

    What shrinks is the side that is longer for its grid, unless it is down to one line.
    """
    aspect = height / width
    columns = min(max(round(math.sqrt(keep / aspect)), 1), width)
    rows = min(max(round(aspect * columns), 1), height)
    while rows * columns > keep:
        if columns == 1 or (rows > 1 and rows / height >= columns / width):
            rows -= 1
        else:
            columns -= 1
    return rows, columns


def lines(cell: int, cells: int, size: int) -> range:
    """Adaptive pooling: cell i of n covers lines ⌊i·size/n⌋ up to, not including, ⌈(i+1)·size/n⌉."""
    return range(cell * size // cells, -(-(cell + 1) * size // cells))


def select(picture: Picture, keep: int) -> Outcome:
    """A cell's token stands at the patch that holds its centre; it is untouched only where nothing was pooled."""
    rows, columns = shape(picture.height, picture.width, keep)
    kept, features = [], []
    for row in range(rows):
        for column in range(columns):
            total, count = np.zeros(picture.features.shape[1]), 0
            for line in lines(row, rows, picture.height):
                for place in lines(column, columns, picture.width):
                    total += picture.features[line * picture.width + place]
                    count += 1
            features.append(total / count)
            # The centre of cell i of n lies at (2i + 1) · size / 2n patches.
            middle_row = (2 * row + 1) * picture.height // (2 * rows)
            middle_column = (2 * column + 1) * picture.width // (2 * columns)
            kept.append(middle_row * picture.width + middle_column)
    return Outcome(kept, [rows * columns == picture.tokens] * len(kept), np.stack(features))
