"""Caches the stock layers write to: keys and values handed to a model's own layers from outside.

Each has the one method that layers call, ``update``: it takes a layer's new keys and values, ``(rows, heads, tokens,
head_dim)``, and returns all that the new queries may look at. Keys and values that forks share are never written in
place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # keys and values of one layer
COPIED_NUMBERS = 2**22  # of keys or values that stand between two caches at once


class Keys:
    """Holds each layer's keys and values; appends functionally."""

    def __init__(self, held: dict[int, Pair] | None = None) -> None:
        self.held = dict(held or {})

    def update(self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any) -> Pair:
        if layer in self.held:
            past_key, past_value = self.held[layer]
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self.held[layer] = (key, value)
        return key, value

    @property
    def width(self) -> int:
        """Columns that are filled."""
        return next(iter(self.held.values()))[0].shape[2]

    def part(self, rows: slice, begin: int, end: int, shape: tuple[int, int]) -> PartOfKeys:
        """The cache of some rows for columns from ``begin`` to ``end``, of ``shape`` (rows, columns) in all."""
        return PartOfKeys(self, rows, begin, end, shape)


class PartOfKeys:
    """The cache of some rows for a run of columns, which look at those before: what they write stands in the whole cache."""

    def __init__(self, whole: Keys, rows: slice, begin: int, end: int, shape: tuple[int, int]) -> None:
        self.whole, self.rows, self.begin, self.end, self.shape = whole, rows, begin, end, shape

    def update(self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any) -> Pair:
        count, columns = self.shape
        if layer not in self.whole.held:
            keys, values = (_tokens_together(one, count, columns).zero_() for one in (key, value))
            self.whole.held[layer] = (keys, values)
        for buffer, one in zip(self.whole.held[layer], (key, value), strict=True):
            buffer[self.rows, :, self.begin : self.end] = one
        if self.begin:
            key, value = (buffer[self.rows, :, : self.end] for buffer in self.whole.held[layer])
        return key, value


class BehindPrefix:
    """A cache behind keys and values that all rows share: layers look at both, and only what is new is kept."""

    def __init__(self, keys: Keys | PartOfKeys, shared: dict[int, Pair]) -> None:
        """``shared``: by layer, ``(1, heads, prefix, head_dim)``."""
        self.keys, self.shared = keys, shared

    def update(self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any) -> Pair:
        pair = self.keys.update(key, value, layer)
        keys, values = (
            torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=2)
            for shared, own in zip(self.shared[layer], pair, strict=True)
        )
        return keys, values


class Given:
    """Keys and values that were made before: the new ones of tokens that ask again are left out."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def update(self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any) -> Pair:
        return self.pair


class StaticKeys:
    """The cache of generation: keys and values taken out of shared ones, in buffers with room for what is to come."""

    def __init__(
        self,
        held: dict[int, Pair],
        rows: Tensor,
        columns: Tensor,
        room: int,
        prefix: dict[int, Pair] | None = None,
    ) -> None:
        """Row ``i`` starts from ``columns[i]`` of row ``rows[i]`` of ``held``; ``room`` columns stand free behind.

        ``held`` is emptied layer by layer, so that what nobody else holds is in memory twice for a half of one layer at most.
        ``prefix``: by layer, ``(1, heads, prefix, head_dim)``: what stands before every row.
        """
        self.buffers: dict[int, Pair] = {}
        for number in list(held):
            first_key, first_value = (None, None) if prefix is None else prefix[number]
            key, value = held.pop(number)
            keys = _taken(key, rows, columns, room, first_key)
            del key
            self.buffers[number] = keys, _taken(value, rows, columns, room, first_value)
            del value
        self.filled = {number: keys.shape[2] - room for number, (keys, _) in self.buffers.items()}

    @property
    def width(self) -> int:
        """Columns that are filled."""
        return min(self.filled.values())

    @property
    def held(self) -> dict[int, Pair]:
        return {
            number: (pair[0][:, :, : self.filled[number]], pair[1][:, :, : self.filled[number]])
            for number, pair in self.buffers.items()
        }

    def update(self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any) -> Pair:
        begin, end = self.filled[layer], self.filled[layer] + key.shape[2]
        keys, values = self.buffers[layer]
        keys[:, :, begin:end] = key
        values[:, :, begin:end] = value
        self.filled[layer] = end
        return keys[:, :, :end], values[:, :, :end]


def _taken(held: Tensor, rows: Tensor, columns: Tensor, room: int, prefix: Tensor | None) -> Tensor:
    """``held`` ``(rows, heads, columns, head_dim)`` at some rows and columns of each, with ``room`` behind."""
    count, width = columns.shape
    start = 0 if prefix is None else prefix.shape[2]
    buffer = held.new_empty(count, held.shape[1], start + width + room, held.shape[3])
    tokens = held.transpose(1, 2)
    flat = tokens.flatten(0, 1).flatten(1)
    together = max(1, COPIED_NUMBERS // max(1, width * flat.shape[1]))
    for first in range(0, count, together):
        part = slice(first, first + together)
        place = (rows[part, None] * tokens.shape[1] + columns[part]).flatten().to(held.device)
        # A token's heads are copied in one piece where they lie together.
        chosen = flat.index_select(0, place).view(-1, width, *tokens.shape[2:])
        buffer[part, :, start : start + width] = chosen.transpose(1, 2)
    if prefix is not None:
        buffer[:, :, :start] = prefix
    return buffer


def _tokens_together(like: Tensor, rows: int, columns: int) -> Tensor:
    """Room for keys or values ``(rows, heads, columns, head_dim)`` as projections lie: all heads of a token together."""
    return like.new_empty(rows, columns, like.shape[1], like.shape[3]).transpose(1, 2)
