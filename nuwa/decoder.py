"""Answers many questions about many images under a token schedule, computing what is shared once.

All questions of an image stand in one sequence behind the image's prefix, each as a *block* that sees the prefix and
itself: the prefix (system tokens and kept visual tokens) passes every layer once, however many questions follow. A
cut (stage 2) makes every question a row of its own, because from there on each keeps other visual tokens; the layers
below the cut stay shared, between questions and between all cuts forked from the same trunk.

The layers are the model's own modules; rotary ids, masks and key-value caches are handed to them from outside. Key
and value tensors are never written in place, so forks share them without copying.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nuwa.positions import PositionStrategy, text_start, visual_positions
from nuwa.selection import Selection, gather_tokens
from nuwa.signals import top_indices
from nuwa.stage2 import Cut, CutEvidence, Scorer
from nuwa.stage2.recycling import cluster_noise, recycle
from nuwa.vlm.llava import EncodedPrompt, LlavaAdapter

PREFIX, PADDING = 0, -1  # block numbers; question blocks are 1, 2, ...
TEXT = -1  # in ``patch``: not a visual token


@dataclass(frozen=True)
class Answer:
    """``tokens``: generated ids without the end token; ``kept``: patches alive in the last layer, ascending.

    A recycled token is listed as the patch of its cluster's centre.
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


@dataclass
class Stretch:
    """A run of layers over one layout of rows and columns.

    ``hidden`` ``(rows, columns, dim)`` has passed all layers below ``layer``; ``first`` is the stretch's first layer.
    ``blocks``, ``positions``, ``patch`` ``(rows, columns)``: block number, position id, patch index (or ``TEXT``).
    ``place`` ``(questions, 2)``: each question's row and block. ``last`` ``(questions,)``: column of its last token.
    ``next_position`` ``(questions,)``: position id of its first generated token.
    """

    hidden: Tensor
    blocks: Tensor
    positions: Tensor
    patch: Tensor
    place: Tensor
    last: Tensor
    next_position: Tensor
    first: int
    layer: int
    keys: _Keys
    inputs: dict[int, Tensor]  # hidden states entering the layers that a cut's scorer reads


def _mask(query_blocks: Tensor, key_blocks: Tensor, dtype: torch.dtype, causal: bool) -> Tensor:
    """Additive ``(rows, 1, queries, keys)``: a query sees the prefix and its own block (padding sees padding)."""
    seen = (query_blocks[:, :, None] == key_blocks[:, None, :]) | (
        (key_blocks == PREFIX)[:, None, :] & (query_blocks != PADDING)[:, :, None]
    )
    if causal:
        order = torch.arange(key_blocks.shape[1], device=key_blocks.device)
        seen = seen & (order[None, :] <= order[:, None])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)[:, None]


class Trunk:
    """The shared work of one stage-1 selection and position strategy: all questions about a batch of images.

    ``selection``: kept tokens of ``len(prompts)`` images. ``prompts``: each image's questions. ``image_ids`` and the
    prompts' ids seed what is random.
    """

    def __init__(
        self,
        vlm: LlavaAdapter,
        selection: Selection,
        prompts: Sequence[Sequence[EncodedPrompt]],
        strategy: PositionStrategy,
        image_ids: Sequence[str],
    ) -> None:
        self.vlm, self.strategy = vlm, strategy
        befores = {prompt.before for asked in prompts for prompt in asked}
        if len(befores) != 1:
            raise ValueError(f"all prompts of a batch must begin alike; found {len(befores)} beginnings")
        self.before = list(befores.pop())
        self.prompts = [prompt for asked in prompts for prompt in asked]
        self.images = [image_ids[row] for row, asked in enumerate(prompts) for _ in asked]
        self.projected = vlm.project(selection.features)
        self.stretch = self._lay_out(selection, prompts)

    def _lay_out(self, selection: Selection, prompts: Sequence[Sequence[EncodedPrompt]]) -> Stretch:
        device, kept = self.vlm.device, selection.kept
        start, indices = len(self.before), selection.indices.to(device)
        after = text_start(self.strategy, start, self.vlm.grid.tokens, kept)
        prefix = start + kept
        columns = prefix + max(sum(len(prompt.after) for prompt in asked) for asked in prompts)
        rows = len(prompts)
        ids = torch.zeros(rows, columns, dtype=torch.long)
        blocks, positions = torch.full((rows, columns), PADDING), torch.zeros(rows, columns, dtype=torch.long)
        place, last, following = [], [], []
        for row, asked in enumerate(prompts):
            ids[row, :start] = torch.tensor(self.before)
            blocks[row, :prefix] = PREFIX
            at = prefix
            for block, prompt in enumerate(asked, start=1):
                size = len(prompt.after)
                ids[row, at : at + size] = torch.tensor(prompt.after)
                blocks[row, at : at + size] = block
                positions[row, at : at + size] = torch.arange(after, after + size)
                at += size
                place.append((row, block))
                last.append(at - 1)
                following.append(after + size)
        positions[:, :start] = torch.arange(start)
        patch = torch.full((rows, columns), TEXT, device=device)
        patch[:, start:prefix] = indices
        positions = positions.to(device)
        positions[:, start:prefix] = visual_positions(indices, self.strategy, start, self.vlm.grid.tokens)
        hidden = self.vlm.language.embed_tokens(ids.to(device))
        self.text_embeddings = hidden
        hidden = torch.cat([hidden[:, :start], self.projected.to(hidden.dtype), hidden[:, prefix:]], dim=1)
        return Stretch(
            hidden,
            blocks.to(device),
            positions,
            patch,
            torch.tensor(place, device=device),
            torch.tensor(last, device=device),
            torch.tensor(following, device=device),
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
        return _generate(self.vlm, [end], max_new_tokens)

    def fork(self, cuts: Sequence[Cut], max_new_tokens: Sequence[int], seed: int = 0) -> list[Answer]:
        """Answers under ``cuts``; the trunk must stand at the first cut's layer."""
        cuts = [Cut(*cut) for cut in cuts]
        if self.stretch.layer != cuts[0].layer:
            raise ValueError(f"the trunk stands before layer {self.stretch.layer}, the first cut before {cuts[0].layer}")
        stretches = [self.stretch]
        for cut in cuts:
            below = stretches[-1]
            if below is not self.stretch:
                _advance(self.vlm, below, cut.layer, frozenset({cut.layer - 1}))
            stretches.append(self._cut(below, cut, seed))
        _advance(self.vlm, stretches[-1], self.vlm.layers)
        return _generate(self.vlm, stretches, max_new_tokens)

    def _cut(self, below: Stretch, cut: Cut, seed: int) -> Stretch:
        """A new layout, one question a row: system tokens, the visual tokens that go on, the question."""
        rows, blocks = below.place.unbind(1)
        visual = _columns(below.patch[rows] != TEXT)  # (questions, visual)
        text = _padded_columns(below.blocks[rows] == blocks[:, None])  # (questions, longest)
        chosen, states = self._choose(below, cut, visual, self._scores(below, cut.scorer, visual, text, seed), seed)
        visual = visual.gather(1, chosen)
        system = torch.arange(len(self.before), device=visual.device).expand(len(rows), -1)
        real = torch.cat([torch.ones_like(system), torch.ones_like(visual), text >= 0], dim=1).bool()
        columns = torch.cat([system, visual, text.clamp(min=0)], dim=1)
        patch = below.patch[rows[:, None], columns].masked_fill(~real, TEXT)
        start, kept = len(self.before), visual.shape[1]
        positions = below.positions[rows[:, None], columns].clone()
        indices = patch[:, start : start + kept]
        positions[:, start : start + kept] = visual_positions(indices, self.strategy, start, self.vlm.grid.tokens)
        was = text_start(self.strategy, start, self.vlm.grid.tokens, (below.patch[0] != TEXT).sum().item())
        shift = text_start(self.strategy, start, self.vlm.grid.tokens, kept) - was
        positions[:, start + kept :] += shift
        layout = torch.full_like(columns, PADDING)
        layout[real] = 1
        layout[:, : start + kept] = PREFIX
        order = torch.arange(len(rows), device=visual.device)
        hidden = below.hidden[rows[:, None], columns]
        hidden[:, start : start + kept] = states
        return Stretch(
            hidden,
            layout,
            positions,
            patch,
            torch.stack([order, torch.ones_like(order)], dim=1),
            start + kept + (text >= 0).sum(dim=1) - 1,
            below.next_position + shift,
            first=below.layer,
            layer=below.layer,
            keys=_Keys(),
            inputs={},
        )

    def _choose(
        self, below: Stretch, cut: Cut, visual: Tensor, scores: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """What goes on of the ``visual`` columns: their numbers, ascending ``(questions, keep)``, and hidden states.

        The best by score go on as they are; with recycling, aggregated tokens stand at their clusters' centres.
        """
        hidden = below.hidden[below.place[:, :1], visual]
        recycled = cut.recycling.clusters(visual.shape[1], cut.keep) if cut.recycling else 0
        chosen = top_indices(scores, cut.keep - recycled)
        states = gather_tokens(hidden, chosen)
        if not recycled:
            return chosen, states
        noise = torch.from_numpy(cluster_noise(seed, self._identity(below), visual.shape[1])).to(hidden.device)
        centres, means = recycle(hidden, scores, chosen, recycled, cut.recycling, noise)
        chosen, order = torch.cat([chosen, centres], dim=1).sort(dim=1)
        return chosen, gather_tokens(torch.cat([states, means], dim=1), order)

    def _identity(self, below: Stretch) -> list[tuple[str, ...]]:
        """What seeds chance at a cut: the layer, and each question's image and words."""
        return [
            (f"cut {below.layer}", image, repr(prompt.after))
            for image, prompt in zip(self.images, self.prompts, strict=True)
        ]

    def _scores(self, below: Stretch, scorer: Scorer, visual: Tensor, text: Tensor, seed: int) -> Tensor:
        rows = below.place[:, 0]
        trunk_rows = self.stretch.place[:, 0]
        own = _padded_columns(self.stretch.blocks[trunk_rows] == self.stretch.place[:, 1:])
        start = len(self.before)
        alive = below.patch[rows].gather(1, visual)
        # Columns of the alive patches in the trunk's own (raster) order of kept tokens.
        kept = self.stretch.patch[trunk_rows, start : start + self.projected.shape[1]]
        where = (kept[:, None, :] == alive[:, :, None]).int().argmax(dim=-1)

        def attention_at(layer: int) -> Callable[[bool], Tensor]:
            return lambda last_only: _attention_to(
                self.vlm, below, layer, rows, below.last[:, None] if last_only else text, visual
            )

        evidence = CutEvidence(
            attention=attention_at(below.layer - 1),
            next_attention=attention_at(below.layer),
            text_mask=own >= 0,
            text=self.text_embeddings[trunk_rows[:, None], own.clamp(min=0)],
            visual=gather_tokens(self.projected[trunk_rows], where),
            entered=self.projected[trunk_rows],
            seed=seed,
            identity=self._identity(below),
        )
        return scorer.score(evidence)


def _columns(flags: Tensor) -> Tensor:
    """Column numbers of the True entries, the same count in every row: ``(rows, count)``."""
    return flags.nonzero()[:, 1].view(len(flags), -1)


def _padded_columns(flags: Tensor) -> Tensor:
    """Column numbers of the True entries of every row, padded at the right with -1: ``(rows, longest)``."""
    counts = flags.sum(dim=1)
    slots = torch.arange(int(counts.max()), device=flags.device)
    padded = torch.full((len(flags), len(slots)), -1, device=flags.device)
    padded[slots[None] < counts[:, None]] = flags.nonzero()[:, 1]
    return padded


def _attention_to(
    vlm: LlavaAdapter, stretch: Stretch, number: int, rows: Tensor, queries: Tensor, visual: Tensor
) -> Tensor:
    """Attention at layer ``number`` from columns ``queries`` (-1: padding) to columns ``visual``.

    ``number``: the layer the stretch has just passed, or the one before which it stands, whose keys are then made
    here. ``rows``: each question's row. Returns ``(questions, heads, queries, visual)`` float32, zero at padded
    queries.
    """
    layer = vlm.language.layers[number]
    attention = layer.self_attn
    at, real = queries.clamp(min=0), queries >= 0
    entering = stretch.hidden if number == stretch.layer else stretch.inputs[number]
    hidden = layer.input_layernorm(entering[rows[:, None], at])
    query = attention.q_proj(hidden).view(*hidden.shape[:2], -1, attention.head_dim).transpose(1, 2)
    positions = stretch.positions[rows[:, None], at]
    query = _rotate(query, *vlm.language.rotary_emb(hidden, position_ids=positions))
    if number == stretch.layer:
        key = attention.k_proj(layer.input_layernorm(entering))
        key = key.view(*key.shape[:2], -1, attention.head_dim).transpose(1, 2)
        key = _rotate(key, *vlm.language.rotary_emb(key, position_ids=stretch.positions))
    else:
        key = stretch.keys.held[number][0]
    key = key[rows].repeat_interleave(attention.num_key_value_groups, dim=1)
    logits = query.float() @ key.float().transpose(2, 3) * attention.scaling
    blocks = stretch.blocks[rows]
    seen = (blocks == PREFIX)[:, None] | (blocks[:, None] == blocks.gather(1, at)[:, :, None])
    seen = seen & (torch.arange(blocks.shape[1], device=blocks.device) <= at[:, :, None])
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
    weights = weights.gather(3, visual[:, None, None].expand(-1, *weights.shape[1:3], -1))
    return weights.masked_fill(~real[:, None, :, None], 0.0)


def _rotate(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``(batch, heads, tokens, head_dim)`` in the half-split layout of Llama and Qwen."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = query.chunk(2, dim=-1)
    return query * cos + torch.cat([-second, first], dim=-1) * sin


def _advance(vlm: LlavaAdapter, stretch: Stretch, layer: int, watch: frozenset[int] = frozenset()) -> None:
    if layer <= stretch.layer:
        return
    mask = _mask(stretch.blocks, stretch.blocks, stretch.hidden.dtype, causal=True)
    rotary = vlm.language.rotary_emb(stretch.hidden, position_ids=stretch.positions)
    for number in range(stretch.layer, layer):
        if number in watch:
            stretch.inputs[number] = stretch.hidden
        stretch.hidden = vlm.language.layers[number](
            stretch.hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=stretch.keys
        )
    stretch.layer = layer


class _Growing:
    """One stretch during generation: its cache grows by one column a slot, and so do the blocks of its columns."""

    def __init__(self, stretch: Stretch, until: int) -> None:
        self.stretch, self.layers = stretch, range(stretch.first, until)
        self.keys = _Keys({number: stretch.keys.held[number] for number in self.layers})
        self.blocks = stretch.blocks

    def step(self, vlm: LlavaAdapter, hidden: Tensor, active: Tensor, made: int) -> Tensor:
        """Pass the newest token of every active question, ``(active, dim)``, through this stretch's layers."""
        rows, blocks = self.stretch.place[active].unbind(1)
        counts = torch.bincount(rows, minlength=len(self.blocks))
        slots = int(counts.max())
        slot = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        layout = hidden.new_zeros(len(self.blocks), slots, hidden.shape[-1])
        layout[rows, slot] = hidden
        new_blocks = self.blocks.new_full((len(self.blocks), slots), PADDING)
        new_blocks[rows, slot] = blocks
        positions = torch.zeros_like(new_blocks)
        positions[rows, slot] = self.stretch.next_position[active] + made
        self.blocks = torch.cat([self.blocks, new_blocks], dim=1)
        mask = _mask(new_blocks, self.blocks, hidden.dtype, causal=False)
        rotary = vlm.language.rotary_emb(layout, position_ids=positions)
        for number in self.layers:
            layout = vlm.language.layers[number](
                layout, attention_mask=mask, position_embeddings=rotary, past_key_values=self.keys
            )
        return layout[rows, slot]


@torch.inference_mode()
def _generate(vlm: LlavaAdapter, stretches: list[Stretch], max_new_tokens: Sequence[int]) -> list[Answer]:
    """Greedy decoding; a question leaves the batch when it ends or reaches its limit."""
    top = stretches[-1]
    untils = [above.first for above in stretches[1:]] + [vlm.layers]
    growing = [_Growing(stretch, until) for stretch, until in zip(stretches, untils, strict=True)]
    limits = torch.tensor(list(max_new_tokens), device=vlm.device)
    ends = torch.tensor(vlm.end_tokens, device=vlm.device)
    active = torch.arange(len(limits), device=vlm.device)
    hidden = top.hidden[top.place[:, 0], top.last]
    made: list[list[int]] = [[] for _ in limits]
    for step in range(int(limits.max())):
        tokens = vlm.model.lm_head(vlm.language.norm(hidden)).argmax(dim=-1)
        going = ~torch.isin(tokens, ends)
        for question, token in zip(active[going].tolist(), tokens[going].tolist(), strict=True):
            made[question].append(token)
        going &= limits[active] > step + 1
        active, tokens = active[going], tokens[going]
        if not len(active):
            break
        hidden = vlm.language.embed_tokens(tokens)
        for part in growing:
            hidden = part.step(vlm, hidden, active, step)
    rows = top.place[:, 0]
    kept = _columns(top.patch[rows] != TEXT)
    patches = top.patch[rows].gather(1, kept).tolist()
    return [Answer(tuple(ids), tuple(alive)) for ids, alive in zip(made, patches, strict=True)]
