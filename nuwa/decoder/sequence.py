"""Where tokens stand: rows and columns of a pass through the layers, and which column sees which.

What a token sees is kept as *spans*. The questions of an image are ranked by their tokens, so that questions which
begin alike are neighbours, and every column belongs to the half-open span of ranks it serves: the prefix to all, a
common beginning to some, a question's own tokens to one. A token sees the earlier columns whose span holds its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nuwa.decoder.attention import project
from nuwa.decoder.caches import BehindPrefix, Given, Keys, Pair
from nuwa.vlm.adapter import Adapter
from nuwa.vlm.language import SLIDING

EVERYONE, NOBODY = (0, 2**30), (-2, -1)  # spans of the prefix and of padding
TEXT = -1  # in ``slot``: not a visual token


@dataclass(frozen=True)
class SharedText:
    """The questions of one image with common beginnings merged, as columns in depth-first order.

    ``ids``, ``spans``, ``depth``: token, span of ranks and place in its question of every column. ``columns``: each
    question's columns, in the order of the questions. ``ranks``: each question's rank.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    depth: list[int]
    columns: list[list[int]]
    ranks: list[int]


def share_beginnings(texts: Sequence[tuple[int, ...]]) -> SharedText:
    """Merge the common beginnings of ``texts``; every question keeps at least its last token to itself."""
    order = sorted(range(len(texts)), key=lambda question: texts[question])
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    depth: list[int] = []
    columns: list[list[int]] = [[] for _ in texts]
    ranks = [0] * len(texts)
    path: list[int] = []
    previous: tuple[int, ...] = ()

    for rank, question in enumerate(order):
        text = texts[question]
        common = 0
        while common < min(len(previous), len(text)) - 1 and previous[common] == text[common]:
            common += 1
        path = path[:common]
        for column in path:
            spans[column] = (spans[column][0], rank + 1)
        for place in range(common, len(text)):
            path.append(len(ids))
            ids.append(text[place])
            spans.append((rank, rank + 1))
            depth.append(place)
        columns[question], ranks[question], previous = list(path), rank, text
    return SharedText(ids, spans, depth, columns, ranks)


@dataclass(frozen=True)
class Texts:
    """The questions of a batch of images as columns behind whatever stands before them, which counts none here.

    ``ids``, ``spans``, ``depth``: of every image's columns, ``(rows, columns)``; see :class:`SharedText`. ``own``
    ``(questions, longest)``: each question's columns, padded at the right with -1; ``last``, ``lengths`` ``(questions,)``:
    the last of them, and how many there are; ``place`` ``(questions, 2)``: its row and rank.
    """

    ids: Tensor
    spans: Tensor
    depth: Tensor
    own: Tensor
    last: Tensor
    lengths: Tensor
    place: Tensor

    @classmethod
    @functools.lru_cache(maxsize=8)  # every trunk of a unit asks the same
    def of(cls, questions: tuple[tuple[tuple[int, ...], ...], ...]) -> Texts:
        """``questions``: of every image, their tokens behind it."""
        shared = [share_beginnings(texts) for texts in questions]
        own = [columns for text in shared for columns in text.columns]
        longest = max(len(text.ids) for text in shared)
        ids, depth = (torch.zeros(len(shared), longest, dtype=torch.long) for _ in range(2))
        spans = torch.tensor(NOBODY).repeat(len(shared), longest, 1)

        for row, text in enumerate(shared):
            width = len(text.ids)
            ids[row, :width], depth[row, :width] = torch.tensor(text.ids), torch.tensor(text.depth)
            spans[row, :width] = torch.tensor(text.spans)
        return cls(
            ids,
            spans,
            depth,
            own=padded(own, ids.device),
            last=torch.tensor([columns[-1] for columns in own]),
            lengths=torch.tensor([len(columns) for columns in own]),
            place=torch.tensor([(row, rank) for row, text in enumerate(shared) for rank in text.ranks]),
        )


@dataclass(frozen=True)
class Columns:
    """Columns of some rows as masks see them: ``spans`` ``(rows, columns, 2)``, ``positions`` ``(axes, rows, columns)``."""

    spans: Tensor
    positions: Tensor

    def seen_by(self, queries: Columns, order: Tensor | None = None) -> Tensor:
        """Which of these columns every query sees, ``(rows, queries, columns)`` bool.

        ``order`` ``(queries,)`` or ``(rows, queries)``: the queries' own columns, behind which they see nothing; absent
        where every column stands before every query.
        """
        seen = serves(self.spans, queries.spans)
        if order is not None:
            seen = seen & (torch.arange(self.spans.shape[1], device=seen.device) <= order[..., None])
        return seen

    def at(self, columns: Tensor) -> Columns:
        """Some of each row's columns: ``columns`` ``(rows, chosen)``."""
        spans = self.spans.gather(1, columns[..., None].expand(-1, -1, 2))
        return Columns(spans, self.positions.gather(2, columns.expand(len(self.positions), -1, -1)))

    def within(self, queries: Columns, window: int) -> Tensor:
        """Whether a column is among the ``window`` positions up to a query's own, ``(rows, queries, columns)``."""
        return queries.positions[0][:, :, None] - self.positions[0][:, None, :] < window


@dataclass(frozen=True)
class Prefix:
    """Tokens before all images, in one row that every row of a stretch stands behind.

    Nothing before them differs, so their keys and values, ``held`` by layer, are the same for all questions and images,
    and the hidden states entering every layer, ``inputs`` by layer, ``(1, tokens, dim)`` each. ``first``: the first of
    these layers.
    """

    columns: Columns
    held: dict[int, Pair]
    inputs: dict[int, Tensor] = field(default_factory=dict)
    first: int = 0

    @property
    def width(self) -> int:
        return self.columns.spans.shape[1]

    def before(self, columns: Columns) -> Columns:
        """These columns, and the prefix before every row of them."""
        rows = len(columns.spans)
        spans = torch.cat([self.columns.spans.expand(rows, -1, -1), columns.spans], dim=1)
        positions = torch.cat([self.columns.positions.expand(-1, rows, -1), columns.positions], dim=2)
        return Columns(spans, positions)


@dataclass(kw_only=True)
class Stretch:
    """A run of layers over one layout of rows and columns.

    ``hidden`` ``(rows, columns, dim)`` has passed all layers below ``layer``; ``first`` is the stretch's first layer.
    ``spans`` ``(rows, columns, 2)``: the ranks each column serves. ``positions`` ``(axes, rows, columns)``: position
    ids. ``slot`` ``(rows, columns)``: place in the unpruned image (or ``TEXT``). ``between`` ``(rows, tokens)``: columns
    of the texts between images. ``place`` ``(questions, 2)``: each question's row and rank. ``text`` ``(questions,
    longest)``: the columns of its tokens behind the image, padded at the right with -1. ``last`` ``(questions,)``: column
    of its last token. ``next_position`` ``(questions,)``: position id of its first generated token. ``keys``: what the
    stretch's layers have written. ``inputs``: hidden states entering the layers that a cut's scorer reads. ``prefix``: tokens that stand before every row, where they are no columns of it.
    ``left`` ``(questions, dim)``: the questions' last tokens as they left the model's last layer, once they have;
    ``hidden`` and ``inputs`` are empty from then on.
    ``deep``: for each of the model's first layers what is added behind it, ``(rows, columns, dim)``, zero but for visual
    tokens; empty where nothing is, or all of it has been.
    """

    hidden: Tensor
    spans: Tensor
    positions: Tensor
    slot: Tensor
    between: Tensor
    place: Tensor
    text: Tensor
    last: Tensor
    next_position: Tensor
    first: int
    layer: int
    keys: Keys
    inputs: dict[int, Tensor]
    prefix: Prefix | None = None
    left: Tensor | None = None
    deep: tuple[Tensor, ...] = ()

    def columns(self, part: Part) -> Columns:
        return Columns(self.spans[part.rows, part.columns], self.positions[:, part.rows, part.columns])

    def standing(self, rows: Tensor | slice, width: int | None = None) -> Columns:
        """All that the first ``width`` columns of some rows may look at, the prefix among it."""
        own = Columns(self.spans[rows, :width], self.positions[:, rows, :width])
        return own if self.prefix is None else self.prefix.before(own)

    def cache(self, part: Part) -> Any:
        """What layers write to when a part passes."""
        shape = (self.spans.shape[0], self.spans.shape[1])
        keys = self.keys if part.shape == shape else self.keys.part(part.rows, part.begin, part.end, shape)
        return keys if self.prefix is None else BehindPrefix(keys, self.prefix.held)

    def of(self, questions: slice) -> Stretch:
        """The stretch as some of its questions see it; all else is shared."""
        return replace(
            self,
            place=self.place[questions],
            text=self.text[questions],
            last=self.last[questions],
            next_position=self.next_position[questions],
            keys=Keys(self.keys.held),
        )

    def let_go(self) -> None:
        """Drop what only layers and cuts to come would read: generation looks at keys and values alone."""
        self.hidden, self.inputs, self.deep = self.hidden.new_empty(0, 0, self.hidden.shape[2]), {}, ()

    @property
    def offset(self) -> int:
        """How many columns of :meth:`standing` come before a row's own."""
        return 0 if self.prefix is None else self.prefix.width


def serves(keys: Tensor, queries: Tensor) -> Tensor:
    """Whether a key's span holds a query's: ``(rows, queries, keys)``. Padding sees padding, so that no row is empty."""
    return (keys[:, None, :, 0] <= queries[:, :, None, 0]) & (queries[:, :, None, 1] <= keys[:, None, :, 1])


def masks_of(vlm: Adapter, queries: Columns, keys: Columns, dtype: torch.dtype, causal: bool) -> dict[str, Tensor]:
    """For every kind of layer an additive mask ``(rows, 1, queries, keys)``; a generated token's keys all precede it.

    Flash-attention takes no such mask: it gets ``(rows, keys)``, 1 where a key is no padding, and rows of one question
    each, for which causal order says the rest.
    """
    kinds = set(vlm.text.kinds)
    if vlm.flash_attention:
        return dict.fromkeys(kinds, (keys.spans[..., 0] >= 0).long())
    before = keys.spans.shape[1] - queries.spans.shape[1]
    order = torch.arange(before, keys.spans.shape[1], device=keys.spans.device) if causal else None
    seen = keys.seen_by(queries, order)
    return {
        kind: _additive(seen & keys.within(queries, vlm.text.window) if kind == SLIDING else seen, dtype)
        for kind in kinds
    }


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


def advance(vlm: Adapter, stretch: Stretch, layer: int, pass_tokens: int, watch: frozenset[int] = frozenset()) -> None:
    """Pass the layers below ``layer``, about ``pass_tokens`` tokens at a time: rows of like length leave padding out.

    ``watch``: layers whose inputs are kept, for what a cut reads.
    """
    if layer <= stretch.layer:
        return
    numbers, shape = range(stretch.layer, layer), (stretch.hidden.shape[0], stretch.hidden.shape[1])
    entering: dict[int, Tensor | None] = dict.fromkeys(sorted(watch & set(numbers)))
    left = None

    for part in _parts(stretch.spans, pass_tokens, whole_rows=vlm.flash_attention):
        hidden, columns = stretch.hidden[part.rows, part.columns], stretch.columns(part)
        masks = masks_of(vlm, columns, stretch.standing(part.rows, part.end), hidden.dtype, causal=True)
        rotations = vlm.text.rotations(hidden, columns.positions)
        keys = stretch.cache(part)
        for number in numbers:
            if number in entering and number > stretch.layer:
                entering[number] = part.put(entering[number], hidden, shape)
            kind = vlm.text.kinds[number]
            hidden = vlm.language.layers[number](
                hidden, attention_mask=masks[kind], position_embeddings=rotations[kind], past_key_values=keys
            )
            if number < len(stretch.deep):
                hidden = hidden + stretch.deep[number][part.rows, part.columns].to(hidden)
        left = part.put(left, hidden, shape)

    assert left is not None
    # What entered the first of these layers is at hand as it is.
    stretch.inputs |= {number: stretch.hidden if held is None else held for number, held in entering.items()}
    stretch.hidden, stretch.layer = left, layer


def leave(vlm: Adapter, stretch: Stretch, pass_tokens: int) -> None:
    """Pass all layers that are left, and keep what generation starts from as ``stretch.left``.

    Of the last layer the other tokens need keys and values only, which generated tokens look at.
    """
    rows, last = stretch.place[:, 0], stretch.last
    if vlm.flash_attention:  # counts queries from the end of a row's keys, and a row's last token may stand before it
        advance(vlm, stretch, vlm.layers, pass_tokens)
        stretch.left = take(stretch.hidden, rows, last)
        stretch.let_go()
        return
    number = vlm.layers - 1
    advance(vlm, stretch, number, pass_tokens)
    layer, kind = vlm.language.layers[number], vlm.text.kinds[number]
    slots, slot = slots_of(rows, len(stretch.hidden))
    # A row with fewer questions than others asks for one of its own columns again.
    asking = torch.zeros(len(stretch.hidden), slots, dtype=last.dtype, device=last.device)
    asking[rows, slot] = last
    left = []

    for part in _parts(stretch.spans, pass_tokens):
        made = project(vlm, number, stretch.hidden[part.rows, part.columns], stretch.columns(part).positions)
        pair = stretch.cache(part).update(made.key, made.value, number)
        if not part.last:
            continue
        at = asking[part.rows]
        own = torch.arange(len(at), device=at.device)[:, None]
        asked = take(stretch.hidden[part.rows], own, at)
        queries = Columns(stretch.spans[part.rows], stretch.positions[:, part.rows]).at(at)
        masks = masks_of(vlm, queries, stretch.standing(part.rows, part.end), asked.dtype, causal=False)
        rotations = vlm.text.rotations(asked, queries.positions)
        left.append(
            layer(
                asked,
                attention_mask=masks[kind],
                position_embeddings=rotations[kind],
                past_key_values=Given(pair),
            )
        )

    stretch.layer = vlm.layers
    stretch.left = take(torch.cat(left) if len(left) > 1 else left[0], rows, slot)
    stretch.let_go()


def slots_of(row: Tensor, rows: int) -> tuple[int, Tensor]:
    """How many slots a row needs, and each question's slot in its row; forks have rows in another order than questions."""
    counts = torch.bincount(row, minlength=rows)
    order = row.argsort(stable=True)
    slot = torch.empty_like(row)
    slot[order] = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    return int(counts.max()), slot


def pass_prefix(vlm: Adapter, stretch: Stretch, width: int) -> Prefix:
    """Pass the first ``width`` columns, which stand before all images, through the layers that the stretch has not passed.

    They are the same in every row; the first one's are taken.
    """
    # A copy: a view would hold the states of all columns in memory.
    hidden, numbers = stretch.hidden[:1, :width].clone(), range(stretch.layer, vlm.layers)
    columns = Columns(stretch.spans[:1, :width], stretch.positions[:, :1, :width])
    masks = masks_of(vlm, columns, columns, hidden.dtype, causal=True)
    rotations = vlm.text.rotations(hidden, columns.positions)
    keys, inputs = Keys(), dict[int, Tensor]()
    for number in numbers:
        inputs[number], kind = hidden, vlm.text.kinds[number]
        hidden = vlm.language.layers[number](
            hidden, attention_mask=masks[kind], position_embeddings=rotations[kind], past_key_values=keys
        )
    return Prefix(columns, keys.held, inputs, stretch.layer)


@dataclass(frozen=True)
class Part:
    """What passes the layers at once: neighbouring rows up to a column that any of them fills, or a run of one row's columns.

    ``last``: whether all columns before it have passed and none of these rows is left.
    """

    rows: slice
    begin: int
    end: int
    last: bool = True

    @property
    def columns(self) -> slice:
        return slice(self.begin, self.end)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.end - self.begin

    def put(self, whole: Tensor | None, piece: Tensor, shape: tuple[int, int]) -> Tensor:
        """The part's states written into those of all rows and columns, zero where padding is left out."""
        if self.shape == shape:
            return piece
        if whole is None:
            whole = piece.new_zeros(*shape, piece.shape[-1])
        whole[self.rows, self.columns] = piece
        return whole


def _parts(spans: Tensor, tokens: int, whole_rows: bool = False) -> Iterator[Part]:
    """Neighbouring rows of about ``tokens`` columns together, and runs of as many columns of a row that is longer.

    ``whole_rows``: such a row is not split.
    """
    rows, columns = spans.shape[:2]
    if rows * columns <= tokens:
        yield Part(slice(0, rows), 0, columns)
        return
    filled = (spans[..., 0] >= 0) * torch.arange(1, columns + 1, device=spans.device)
    start, width = 0, 0
    groups = []
    for row, length in enumerate(filled.amax(dim=1).tolist()):
        if row > start and (row + 1 - start) * max(width, length) > tokens:
            groups.append((slice(start, row), width))
            start, width = row, 0
        width = max(width, length)
    groups.append((slice(start, rows), width))

    for group, width in groups:
        step = width if whole_rows or group.stop - group.start > 1 else tokens
        for begin in range(0, width, step):
            yield Part(group, begin, min(begin + step, width), begin + step >= width)


def take(values: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """``values[rows]`` or ``values[rows, columns]`` where the values are, which may be another device than the index's.

    Indices are not negative. What stands in a row and column is copied in one piece: ``values[rows, columns]`` copies
    number by number on a CPU.
    """
    place, held = rows, values
    if columns is not None:
        place, held = rows * values.shape[1] + columns, values.flatten(0, 1)
    chosen = held.index_select(0, place.flatten().to(values.device))
    return chosen.view(*place.shape, *held.shape[1:])


def true_columns(flags: Tensor, count: int | None = None) -> Tensor:
    """Column numbers of the True entries, the same count in every row: ``(rows, count)``."""
    columns = flags.nonzero()[:, 1]
    return columns.view(len(flags), len(columns) // len(flags) if count is None else count)


def padded(lists: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """``(rows, longest)``, padded at the right with -1."""
    longest = max(len(row) for row in lists)
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in lists], device=device)
