"""Answers many questions about many images under a token schedule, computing what is shared once.

All questions of an image stand in one sequence behind the image's prefix, and words with which several of them begin
stand there once: the prefix (system tokens and kept visual tokens) and every common beginning pass each layer once,
however many questions follow. A cut (stage 2) makes every question a row of its own, because from there on each keeps
other visual tokens; the layers below the cut stay shared, between questions and between all cuts forked from the same
trunk.

What a token sees is kept as *spans*. The questions of an image are ranked by their tokens, so that questions which
begin alike are neighbours, and every column belongs to the half-open span of ranks it serves: the prefix to all, a
common beginning to some, a question's own tokens to one. A token sees the earlier columns whose span holds its own.

The layers are the model's own modules; rotary ids, masks and key-value caches are handed to them from outside. Keys
and values that forks share are never written in place. Layers may stand on several devices: hidden states and caches
stay where a layer left them, everything else is kept on the model's first device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nuwa.layout import VisualLayout
from nuwa.positions import PositionStrategy, text_start, visual_positions
from nuwa.selection import Selection, gather_tokens
from nuwa.signals import top_indices
from nuwa.stage2 import Cut, CutEvidence, Scorer
from nuwa.stage2.recycling import cluster_noise, recycle
from nuwa.vlm.adapter import Adapter, EncodedPrompt

EVERYONE, NOBODY = (0, 2**30), (-2, -1)  # spans of the prefix and of padding
TEXT = -1  # in ``slot``: not a visual token
ROOM = 4  # buffers of generation have a quarter of their columns free
# Tokens that pass the layers at once: on a CPU what its caches hold, elsewhere what memory does.
PASS_TOKENS = {"cpu": 2048}
MANY_TOKENS = 2**17
ENOUGH_ENDED = 3 / 4  # rows are laid out again when so few questions of the last time go on


@dataclass(frozen=True)
class Answer:
    """``tokens``: generated ids without the end token; ``kept``: slots alive in the last layer, ascending.

    A slot is a place in the unpruned image's sequence (:mod:`nuwa.layout`); on LLaVA-1.5 it is the patch's index. A
    recycled token is listed as the slot of its cluster's centre.
    """

    tokens: tuple[int, ...]
    kept: tuple[int, ...]


class _Keys:
    """The cache the stock layers write to: holds each layer's keys and values, appends functionally."""

    def __init__(self, held: dict[int, tuple[Tensor, Tensor]] | None = None) -> None:
        self.held = dict(held or {})

    def update(self, key: Tensor, value: Tensor, layer: int, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        if layer in self.held:
            past_key, past_value = self.held[layer]
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self.held[layer] = (key, value)
        return key, value


class _PartOfKeys:
    """The cache of some rows and their first columns: what they write stands in the whole cache."""

    def __init__(self, whole: _Keys, rows: slice, width: int, shape: tuple[int, int]) -> None:
        self.whole, self.rows, self.width, self.shape = whole, rows, width, shape

    def update(self, key: Tensor, value: Tensor, layer: int, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        count, columns = self.shape
        if layer not in self.whole.held:
            self.whole.held[layer] = tuple(
                one.new_zeros(count, one.shape[1], columns, one.shape[3]) for one in (key, value)
            )
        for buffer, one in zip(self.whole.held[layer], (key, value), strict=True):
            buffer[self.rows, :, : self.width] = one
        return key, value


class _GrowingKeys:
    """The cache of generation: keys and values taken out of shared ones, in buffers of its own that grow."""

    def __init__(self, held: dict[int, tuple[Tensor, Tensor]], rows: Tensor, columns: Tensor) -> None:
        """Row ``i`` starts from ``columns[i]`` of row ``rows[i]`` of ``held``."""
        self.filled = dict.fromkeys(held, columns.shape[1])
        self.buffers = {
            number: tuple(_taken(one, rows, columns, columns.shape[1] // ROOM) for one in pair)
            for number, pair in held.items()
        }

    @property
    def held(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {
            number: tuple(one[:, :, : self.filled[number]] for one in pair) for number, pair in self.buffers.items()
        }

    def update(self, key: Tensor, value: Tensor, layer: int, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        begin, end = self.filled[layer], self.filled[layer] + key.shape[2]
        if end > self.buffers[layer][0].shape[2]:
            room = end // ROOM
            self.buffers[layer] = tuple(_roomier(one, begin, end + room) for one in self.buffers[layer])
        grown = tuple(self.buffers[layer])
        for buffer, new in zip(grown, (key, value), strict=True):
            buffer[:, :, begin:end] = new
        self.filled[layer] = end
        return grown[0][:, :, :end], grown[1][:, :, :end]


def _taken(held: Tensor, rows: Tensor, columns: Tensor, room: int) -> Tensor:
    """``held`` ``(rows, heads, columns, head_dim)`` at some rows and columns of each, with ``room`` behind."""
    count, width = columns.shape
    buffer = held.new_empty(count, held.shape[1], width + room, held.shape[3])
    buffer[:, :, :width] = _at(held.transpose(1, 2), rows[:, None], columns).transpose(1, 2)
    return buffer


def _roomier(held: Tensor, filled: int, columns: int) -> Tensor:
    """``held`` ``(rows, heads, columns, head_dim)`` up to ``filled``, in a buffer of ``columns``."""
    rows, heads, _, head_dim = held.shape
    buffer = held.new_empty(rows, heads, columns, head_dim)
    buffer[:, :, :filled] = held[:, :, :filled]
    return buffer


@dataclass
class Stretch:
    """A run of layers over one layout of rows and columns.

    ``hidden`` ``(rows, columns, dim)`` has passed all layers below ``layer``; ``first`` is the stretch's first layer.
    ``spans`` ``(rows, columns, 2)``: the ranks each column serves. ``positions`` ``(axes, rows, columns)``: position
    ids. ``slot`` ``(rows, columns)``: place in the unpruned image (or ``TEXT``). ``place`` ``(questions, 2)``: each
    question's row and rank. ``text`` ``(questions, longest)``: the columns of its tokens behind the image, padded at
    the right with -1. ``last`` ``(questions,)``: column of its last token. ``next_position`` ``(questions,)``: position
    id of its first generated token.
    """

    hidden: Tensor
    spans: Tensor
    positions: Tensor
    slot: Tensor
    place: Tensor
    text: Tensor
    last: Tensor
    next_position: Tensor
    first: int
    layer: int
    keys: _Keys
    inputs: dict[int, Tensor]  # hidden states entering the layers that a cut's scorer reads


def _serves(keys: Tensor, queries: Tensor) -> Tensor:
    """Whether a key's span holds a query's: ``(rows, queries, keys)``. Padding sees padding, so that no row is empty."""
    return (keys[:, None, :, 0] <= queries[:, :, None, 0]) & (queries[:, :, None, 1] <= keys[:, None, :, 1])


def _mask(vlm: Adapter, queries: Tensor, keys: Tensor, dtype: torch.dtype, causal: bool) -> Tensor:
    """Additive ``(rows, 1, queries, keys)`` from spans ``(rows, queries, 2)`` and ``(rows, keys, 2)``.

    Flash-attention takes no such mask: it gets ``(rows, keys)``, 1 where a key is no padding, and rows of one question
    each, for which causal order says the rest.
    """
    if vlm.flash_attention:
        return (keys[..., 0] >= 0).long()
    seen = _serves(keys, queries)
    if causal:
        order = torch.arange(keys.shape[1], device=keys.device)
        seen = seen & (order[None, :] <= order[:, None])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)[:, None]


@dataclass(frozen=True)
class SharedText:
    """The questions of one image with common beginnings merged, as columns in depth-first order.

    ``ids``, ``spans``, ``depth``: token, span of ranks and place in its question of every column. ``columns``: each
    question's columns, in the order asked. ``ranks``: each question's rank.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    depth: list[int]
    columns: list[list[int]]
    ranks: list[int]


def share_beginnings(texts: Sequence[tuple[int, ...]]) -> SharedText:
    """Merge the common beginnings of ``texts``; every question keeps at least its last token to itself."""
    order = sorted(range(len(texts)), key=lambda question: texts[question])
    ids, spans, depth = [], [], []
    columns, ranks = [[] for _ in texts], [0] * len(texts)
    path, previous = [], ()
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


class Trunk:
    """The shared work of one stage-1 selection and position strategy: all questions about a batch of images.

    ``selection``: kept tokens of ``len(prompts)`` images, over the slots of ``layout`` (see :func:`nuwa.layout.place`;
    absent: the one layout of a model with a fixed grid). ``prompts``: each image's questions. ``image_ids`` and the
    prompts' ids seed what is random.
    """

    def __init__(
        self,
        vlm: Adapter,
        selection: Selection,
        prompts: Sequence[Sequence[EncodedPrompt]],
        strategy: PositionStrategy,
        image_ids: Sequence[str],
        layout: VisualLayout | None = None,
    ) -> None:
        self.vlm, self.strategy, self.layout = vlm, strategy, layout or vlm.layout
        befores = {prompt.before for asked in prompts for prompt in asked}
        if len(befores) != 1:
            raise ValueError(f"all prompts of a batch must begin alike; found {len(befores)} beginnings")
        self.before = list(befores.pop())
        self.prompts = [prompt for asked in prompts for prompt in asked]
        self.images = [image_ids[row] for row, asked in enumerate(prompts) for _ in asked]
        if vlm.flash_attention:  # see _mask
            owners = [row for row, asked in enumerate(prompts) for _ in asked]
            selection = Selection(selection.indices[owners], selection.features[owners], selection.pillars[owners])
            prompts = [[prompt] for prompt in self.prompts]
        self.projected = vlm.embed_visual(selection, self.layout)
        self.stretch = self._lay_out(selection, prompts)
        self.scored: dict[tuple[int, Scorer, int], Tensor] = {}  # by layer, scorer and seed

    def _lay_out(self, selection: Selection, prompts: Sequence[Sequence[EncodedPrompt]]) -> Stretch:
        device, kept = self.vlm.device, selection.kept
        start, slots = len(self.before), selection.indices.to(device)
        visual = visual_positions(slots, self.strategy, start, self.layout)
        after = text_start(self.strategy, start, visual, self.layout).tolist()
        prefix, rows = start + kept, len(prompts)
        texts = [share_beginnings([prompt.after for prompt in asked]) for asked in prompts]
        columns = prefix + max(len(text.ids) for text in texts)
        ids = torch.zeros(rows, columns, dtype=torch.long)
        spans, positions = torch.empty(rows, columns, 2, dtype=torch.long), torch.zeros(rows, columns, dtype=torch.long)
        spans[:], spans[:, :prefix] = torch.tensor(NOBODY), torch.tensor(EVERYONE)
        ids[:, :start], positions[:, :start] = torch.tensor(self.before), torch.arange(start)
        for row, text in enumerate(texts):
            filled = slice(prefix, prefix + len(text.ids))
            ids[row, filled], spans[row, filled] = torch.tensor(text.ids), torch.tensor(text.spans)
            positions[row, filled] = torch.tensor(text.depth) + after[row]
        own = [[prefix + column for column in mine] for text in texts for mine in text.columns]
        behind = [after[row] + len(mine) for row, text in enumerate(texts) for mine in text.columns]
        slot = torch.full((rows, columns), TEXT, device=device)
        slot[:, start:prefix] = slots
        positions = positions.to(device).repeat(self.layout.axes, 1, 1)
        positions[:, :, start:prefix] = visual
        hidden = self.vlm.language.embed_tokens(ids.to(device))
        self.text_embeddings = hidden
        hidden = torch.cat([hidden[:, :start], self.projected.to(hidden), hidden[:, prefix:]], dim=1)
        return Stretch(
            hidden,
            spans.to(device),
            positions,
            slot,
            place=torch.tensor([(row, rank) for row, text in enumerate(texts) for rank in text.ranks], device=device),
            text=_padded(own, device),
            last=torch.tensor([mine[-1] for mine in own], device=device),
            next_position=torch.tensor(behind, device=device),
            first=0,
            layer=0,
            keys=_Keys(),
            inputs={},
        )

    def advance(self, layer: int, watch: frozenset[int] = frozenset()) -> None:
        """Run the trunk up to ``layer`` (exclusive), remembering the inputs of layers in ``watch`` for scorers."""
        _advance(self.vlm, self.stretch, layer, watch)

    def finish(self, max_new_tokens: Sequence[int]) -> list[Answer]:
        """Answers of the trunk itself: no cut. The trunk stays usable for forks at its own layer and above."""
        end = replace(self.stretch, keys=_Keys(self.stretch.keys.held))
        _advance(self.vlm, end, self.vlm.layers)
        return _generate(self.vlm, [end], self.prompts, max_new_tokens)

    def fork(self, cuts: Sequence[Cut], max_new_tokens: Sequence[int], seed: int = 0) -> list[Answer]:
        """Answers under ``cuts``; the trunk must stand at the first cut's layer."""
        cuts = [Cut(*cut) for cut in cuts]
        if self.stretch.layer != cuts[0].layer:
            raise ValueError(
                f"the trunk stands before layer {self.stretch.layer}, the first cut before {cuts[0].layer}"
            )
        stretches = [self.stretch]
        for cut in cuts:
            below = stretches[-1]
            if below is not self.stretch:
                _advance(self.vlm, below, cut.layer, frozenset({cut.layer - 1}))
            stretches.append(self._cut(below, cut, seed))
        _advance(self.vlm, stretches[-1], self.vlm.layers)
        return _generate(self.vlm, stretches, self.prompts, max_new_tokens)

    def _cut(self, below: Stretch, cut: Cut, seed: int) -> Stretch:
        """A new layout, one question a row: system tokens, the visual tokens that go on, the question."""
        rows, text = below.place[:, 0], below.text
        entering = _columns(below.slot[rows] != TEXT)  # (questions, visual)
        chosen, states = self._choose(below, cut, entering, self._scores(below, cut.scorer, entering, seed), seed)
        visual = entering.gather(1, chosen)
        system = torch.arange(len(self.before), device=visual.device).expand(len(rows), -1)
        real = torch.cat([torch.ones_like(system), torch.ones_like(visual), text >= 0], dim=1).bool()
        columns = torch.cat([system, visual, text.clamp(min=0)], dim=1)
        slot = below.slot[rows[:, None], columns].masked_fill(~real, TEXT)
        start, kept = len(self.before), visual.shape[1]
        was = text_start(self.strategy, start, below.positions[:, rows[:, None], entering], self.layout)
        renewed = visual_positions(slot[:, start : start + kept], self.strategy, start, self.layout)
        shift = text_start(self.strategy, start, renewed, self.layout) - was
        positions = below.positions[:, rows[:, None], columns]
        positions[:, :, start : start + kept] = renewed
        positions[:, :, start + kept :] += shift[:, None]
        spans = torch.where(
            real[..., None], torch.tensor((0, 1), device=real.device), torch.tensor(NOBODY, device=real.device)
        )
        own = real[:, start + kept :]
        # Rows from short to long, so that those which pass the layers together need little padding.
        order = own.sum(dim=1).argsort(stable=True)
        row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        behind = torch.arange(start + kept, columns.shape[1], device=visual.device)
        hidden = _at(below.hidden, rows[:, None], columns)
        hidden[:, start : start + kept] = states
        return Stretch(
            _at(hidden, order),
            spans[order],
            positions[:, order],
            slot[order],
            place=torch.stack([row, torch.zeros_like(row)], dim=1),
            text=torch.where(own, behind, -1),
            last=start + kept + own.sum(dim=1) - 1,
            next_position=below.next_position + shift,
            first=below.layer,
            layer=below.layer,
            keys=_Keys(),
            inputs={},
        )

    def _choose(self, below: Stretch, cut: Cut, visual: Tensor, scores: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """What goes on of the ``visual`` columns: their numbers, ascending ``(questions, keep)``, and hidden states.

        The best by score go on as they are; with recycling, aggregated tokens stand at their clusters' centres.
        """
        hidden = _at(below.hidden, below.place[:, :1], visual)
        recycled = cut.recycling.clusters(visual.shape[1], cut.keep) if cut.recycling else 0
        chosen = top_indices(scores, cut.keep - recycled)
        states = gather_tokens(hidden, chosen.to(hidden.device))
        if not recycled:
            return chosen, states
        noise = torch.from_numpy(cluster_noise(seed, self._identity(below), visual.shape[1])).to(hidden.device)
        scores, picked = scores.to(hidden.device), chosen.to(hidden.device)
        centres, means = recycle(hidden, scores, picked, recycled, cut.recycling, noise)
        chosen, order = torch.cat([picked, centres], dim=1).sort(dim=1)
        return chosen.to(visual.device), gather_tokens(torch.cat([states, means], dim=1), order)

    def _identity(self, below: Stretch) -> list[tuple[str, ...]]:
        """What seeds chance at a cut: the layer, and each question's image and words."""
        return [
            (f"cut {below.layer}", image, repr(prompt.after))
            for image, prompt in zip(self.images, self.prompts, strict=True)
        ]

    def _scores(self, below: Stretch, scorer: Scorer, visual: Tensor, seed: int) -> Tensor:
        """``(questions, visual)``; forks of the trunk that differ in how many tokens they keep share them."""
        if below is not self.stretch:
            return self._score(below, scorer, visual, seed)
        key = (below.layer, scorer, seed)
        if key not in self.scored:
            self.scored = {known: scores for known, scores in self.scored.items() if known[0] == below.layer}
            self.scored[key] = self._score(below, scorer, visual, seed)
        return self.scored[key]

    def _score(self, below: Stretch, scorer: Scorer, visual: Tensor, seed: int) -> Tensor:
        rows = below.place[:, 0]
        trunk_rows, own = self.stretch.place[:, 0], self.stretch.text
        start = len(self.before)
        alive = below.slot[rows].gather(1, visual)
        # Columns of the alive tokens in the trunk's own order of kept tokens.
        kept = self.stretch.slot[trunk_rows, start : start + self.projected.shape[1]]
        where = (kept[:, None, :] == alive[:, :, None]).int().argmax(dim=-1)

        entered = _at(self.projected, trunk_rows).to(visual.device)

        def attention_at(layer: int) -> Callable[[bool], Tensor]:
            return lambda last_only: _attention_to(
                self.vlm, below, layer, rows, below.last[:, None] if last_only else below.text, visual
            )

        evidence = CutEvidence(
            attention=attention_at(below.layer - 1),
            next_attention=attention_at(below.layer),
            text_mask=own >= 0,
            text=_at(self.text_embeddings, trunk_rows[:, None], own.clamp(min=0)),
            visual=gather_tokens(entered, where),
            entered=entered,
            seed=seed,
            identity=self._identity(below),
        )
        return scorer.score(evidence).to(visual.device)


def _device_of(module: torch.nn.Module, otherwise: Tensor) -> torch.device:
    """Where a module's weights are. Offloaded ones are nowhere until it runs, and take their input from anywhere."""
    return module.weight.device if module.weight.device.type != "meta" else otherwise.device


def _at(hidden: Tensor, *index: Tensor) -> Tensor:
    """``hidden[index]`` where the hidden states are, which may be another device than the index's."""
    return hidden[tuple(part.to(hidden.device) for part in index)]


def _columns(flags: Tensor) -> Tensor:
    """Column numbers of the True entries, the same count in every row: ``(rows, count)``."""
    return flags.nonzero()[:, 1].view(len(flags), -1)


def _padded(lists: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """``(rows, longest)``, padded at the right with -1."""
    longest = max(len(row) for row in lists)
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in lists], device=device)


def _attention_to(vlm: Adapter, stretch: Stretch, number: int, rows: Tensor, queries: Tensor, visual: Tensor) -> Tensor:
    """Attention at layer ``number`` from columns ``queries`` (-1: padding) to columns ``visual``.

    ``number``: the layer the stretch has just passed, or the one before which it stands, whose keys are then made
    here. ``rows``: each question's row. Returns ``(questions, heads, queries, visual)`` float32, zero at padded
    queries.
    """
    layer = vlm.language.layers[number]
    attention = layer.self_attn
    at, real = queries.clamp(min=0), queries >= 0
    entering = stretch.hidden if number == stretch.layer else stretch.inputs[number]
    entering = entering.to(_device_of(attention.q_proj, entering))
    hidden = layer.input_layernorm(_at(entering, rows[:, None], at))
    query = attention.q_proj(hidden).view(*hidden.shape[:2], -1, attention.head_dim).transpose(1, 2)
    query = _rotate(query, *vlm.head_rotation(hidden, stretch.positions[:, rows[:, None], at]))
    if number == stretch.layer:
        key = attention.k_proj(layer.input_layernorm(entering))
        key = key.view(*key.shape[:2], -1, attention.head_dim).transpose(1, 2)
        key = _rotate(key, *vlm.head_rotation(key, stretch.positions))
    else:
        key = stretch.keys.held[number][0]
    key = _at(key, rows).repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = query.float() @ key.float().transpose(2, 3) * attention.scaling
    spans = stretch.spans[rows]
    asking = spans.gather(1, at[..., None].expand(-1, -1, 2))
    seen = _serves(spans, asking) & (torch.arange(spans.shape[1], device=spans.device) <= at[:, :, None])
    weights = logits.masked_fill(~seen[:, None].to(key.device), -torch.inf).softmax(dim=-1).to(visual.device)
    weights = weights.gather(3, visual[:, None, None].expand(-1, *weights.shape[1:3], -1))
    return weights.masked_fill(~real[:, None, :, None], 0.0)


def _rotate(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``(batch, heads, tokens, head_dim)`` in the half-split layout of Llama and Qwen."""
    # Accelerate brings them to a layer's device only where it calls the layer itself.
    cos, sin = cos[:, None].to(query.device), sin[:, None].to(query.device)
    first, second = query.chunk(2, dim=-1)
    return query * cos + torch.cat([-second, first], dim=-1) * sin


def _advance(vlm: Adapter, stretch: Stretch, layer: int, watch: frozenset[int] = frozenset()) -> None:
    """Pass the layers below ``layer``, some rows at a time: rows of like length leave padding out."""
    if layer <= stretch.layer:
        return
    numbers, shape = range(stretch.layer, layer), stretch.hidden.shape[:2]
    parts = list(_parts(stretch.spans, PASS_TOKENS.get(vlm.device.type, MANY_TOKENS)))
    entering: dict[int, list[Tensor]] = {number: [] for number in sorted(watch & set(numbers))}
    left = []
    for rows, width in parts:
        hidden, spans = stretch.hidden[rows, :width], stretch.spans[rows, :width]
        mask = _mask(vlm, spans, spans, hidden.dtype, causal=True)
        rotary = vlm.rotation(hidden, stretch.positions[:, rows, :width])
        keys = stretch.keys if len(parts) == 1 else _PartOfKeys(stretch.keys, rows, width, shape)
        for number in numbers:
            if number in entering:
                entering[number].append(hidden)
            hidden = vlm.language.layers[number](
                hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=keys
            )
        left.append(hidden)
    stretch.inputs |= {number: _whole(held, parts, shape) for number, held in entering.items()}
    stretch.hidden, stretch.layer = _whole(left, parts, shape), layer


def _parts(spans: Tensor, tokens: int) -> Iterator[tuple[slice, int]]:
    """Neighbouring rows of about ``tokens`` columns together, and the columns that any of them fills."""
    rows, columns = spans.shape[:2]
    if rows * columns <= tokens:
        yield slice(0, rows), columns
        return
    filled = (spans[..., 0] >= 0) * torch.arange(1, columns + 1, device=spans.device)
    start, width = 0, 0
    for row, mine in enumerate(filled.amax(dim=1).tolist()):
        if row > start and (row + 1 - start) * max(width, mine) > tokens:
            yield slice(start, row), width
            start, width = row, 0
        width = max(width, mine)
    yield slice(start, rows), width


def _whole(held: Sequence[Tensor], parts: Sequence[tuple[slice, int]], shape: tuple[int, int]) -> Tensor:
    """Rows that passed part by part as one tensor again, zero where padding was left out."""
    if len(held) == 1:
        return held[0]
    whole = held[0].new_zeros(*shape, held[0].shape[-1])
    for (rows, width), hidden in zip(parts, held, strict=True):
        whole[rows, :width] = hidden
    return whole


class _Growing:
    """One stretch during generation: its cache grows by one column a slot, and so do the spans of its columns."""

    def __init__(self, stretch: Stretch, until: int) -> None:
        self.layers, self.axes = range(stretch.first, until), len(stretch.positions)
        self.keys = _Keys({number: stretch.keys.held[number] for number in self.layers})
        self.spans, self.place, self.next_position = stretch.spans, stretch.place, stretch.next_position

    def regroup(self, active: Tensor) -> None:
        """Leave out rows without questions that go on, and columns that serve none of these."""
        rows, ranks = self.place[active].unbind(1)
        old, new = rows.unique(return_inverse=True)
        # How many of a row's questions have a rank below r: a span serves those between its ends.
        below = torch.zeros(len(old), int(ranks.max()) + 2, dtype=torch.long, device=rows.device)
        below[new, ranks + 1] = 1
        below = below.cumsum(1)
        spans = self.spans[old]
        ends = below.gather(1, spans.clamp(0, below.shape[1] - 1).flatten(1)).view(spans.shape)
        serves = ends[..., 1] > ends[..., 0]
        columns = serves.byte().argsort(dim=1, descending=True, stable=True)[:, : int(serves.sum(dim=1).max())]
        self.spans = spans.gather(1, columns[..., None].expand(-1, -1, 2))
        self.spans[~serves.gather(1, columns)] = torch.tensor(NOBODY, device=rows.device)
        self.place = torch.full_like(self.place, -1)
        self.place[active] = torch.stack([new, ranks], dim=1)
        self.keys = _GrowingKeys(self.keys.held, old, columns)

    def step(self, vlm: Adapter, hidden: Tensor, active: Tensor, made: int) -> Tensor:
        """Pass the newest token of every active question, ``(active, dim)``, through this stretch's layers."""
        rows, ranks = self.place[active].unbind(1)
        counts = torch.bincount(rows, minlength=len(self.spans))
        slots = int(counts.max())
        order = rows.argsort(stable=True)  # forks have their rows in another order than their questions
        slot = torch.empty_like(rows)
        slot[order] = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows[order]]
        layout = hidden.new_zeros(len(self.spans), slots, hidden.shape[-1])
        layout[rows.to(hidden.device), slot.to(hidden.device)] = hidden
        spans = torch.tensor(NOBODY, device=rows.device).expand(len(self.spans), slots, 2).clone()
        spans[rows, slot] = torch.stack([ranks, ranks + 1], dim=1)
        positions = torch.zeros_like(spans[..., 0])
        positions[rows, slot] = self.next_position[active] + made
        self.spans = torch.cat([self.spans, spans], dim=1)
        mask = _mask(vlm, spans, self.spans, hidden.dtype, causal=False)
        rotary = vlm.rotation(layout, positions.expand(self.axes, -1, -1))
        for number in self.layers:
            layout = vlm.language.layers[number](
                layout, attention_mask=mask, position_embeddings=rotary, past_key_values=self.keys
            )
        return _at(layout, rows, slot)


def _penalised(logits: Tensor, said: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits ``(questions, vocabulary)`` where a token that each question's sequence ``said`` holds is less likely.

    As in stock ``generate``, which heeds a checkpoint's ``repetition_penalty`` in greedy decoding too: prompt and image
    placeholder count as said.
    """
    logits = logits.float()
    longest = max(map(len, said))
    ids = torch.tensor([[*one, *[one[0]] * (longest - len(one))] for one in said], device=logits.device)
    held = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(held < 0, held * penalty, held / penalty))


@torch.inference_mode()
def _generate(
    vlm: Adapter, stretches: list[Stretch], prompts: Sequence[EncodedPrompt], max_new_tokens: Sequence[int]
) -> list[Answer]:
    """Greedy decoding; a question leaves the batch when it ends or reaches its limit."""
    top = stretches[-1]
    untils = [above.first for above in stretches[1:]] + [vlm.layers]
    growing = [_Growing(stretch, until) for stretch, until in zip(stretches, untils, strict=True)]
    limits = torch.tensor(list(max_new_tokens), device=vlm.device)
    ends = torch.tensor(vlm.end_tokens, device=vlm.device)
    active = torch.arange(len(limits), device=vlm.device)
    hidden = _at(top.hidden, top.place[:, 0], top.last)
    made: list[list[int]] = [[] for _ in limits]
    together = math.inf  # the first step lays all out: its caches grow
    for step in range(int(limits.max())):
        logits = vlm.model.lm_head(vlm.language.norm(hidden))
        if vlm.repetition_penalty != 1.0:
            said = [(*prompts[one].before, vlm.image_token, *prompts[one].after, *made[one]) for one in active.tolist()]
            logits = _penalised(logits, said, vlm.repetition_penalty)
        tokens = logits.argmax(dim=-1).to(vlm.device)
        going = ~torch.isin(tokens, ends)
        for question, token in zip(active[going].tolist(), tokens[going].tolist(), strict=True):
            made[question].append(token)
        going &= limits[active] > step + 1
        active, tokens = active[going], tokens[going]
        if not len(active):
            break
        if len(active) <= ENOUGH_ENDED * together:
            together = len(active)
            for part in growing:
                part.regroup(active)
        hidden = vlm.language.embed_tokens(tokens)
        for part in growing:
            hidden = part.step(vlm, hidden, active, step)
    rows = top.place[:, 0]
    kept = _columns(top.slot[rows] != TEXT)
    slots = top.slot[rows].gather(1, kept).tolist()
    return [Answer(tuple(ids), tuple(alive)) for ids, alive in zip(made, slots, strict=True)]
