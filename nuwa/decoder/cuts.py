"""Cuts: what is known of the questions at one, which visual tokens go on, and the layout above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nuwa.decoder.attention import execution_device, project
from nuwa.decoder.caches import Keys, Pair
from nuwa.decoder.finite import check_cut
from nuwa.decoder.sequence import NOBODY, TEXT, Columns, Stretch, take, true_columns
from nuwa.positions import sequence_positions
from nuwa.selection import gather_tokens
from nuwa.signals import top_indices
from nuwa.stage2 import Cut, CutEvidence, Scorer
from nuwa.stage2.projections import Projections
from nuwa.stage2.recycling import cluster_noise, recycle
from nuwa.stage2.scorers import Tokens
from nuwa.vlm.language import SLIDING

if TYPE_CHECKING:
    from nuwa.decoder.trunk import Trunk

EVIDENCE_NUMBERS = 2**24  # questions are scored together while no tensor of theirs has more numbers than this


def cut_stretch(trunk: Trunk, below: Stretch, cut: Cut, seed: int) -> Stretch:
    """A new layout, one question a row: the visual tokens that go on, and the question.

    The tokens before the image are the same for all: they stand before the rows once, as the trunk's prefix. What still
    enters later layers follows its token; a recycled one has that of its cluster's centre.
    """
    rows, text = below.place[:, 0], below.text
    entering = visual_columns(below)
    recycled = cut.recycling.clusters(entering.shape[1], cut.keep) if cut.recycling else 0
    scores = scores_at(trunk, below, cut.scorer, cut.keep - recycled, seed)
    chosen, states = _survivors(trunk, below, cut, entering, scores, recycled, seed)
    front = Front.of(entering.gather(1, chosen), below.between[rows])
    kept = front.columns.shape[1]
    real = torch.cat([torch.ones_like(front.columns), text >= 0], dim=1).bool()
    columns = torch.cat([front.columns, text.clamp(min=0)], dim=1)
    slot = below.slot[rows[:, None], columns].masked_fill(~real, TEXT)
    positions, shift = _renewed_positions(trunk, below, front, columns)

    serving, nobody = (torch.tensor(span, device=real.device) for span in ((0, 1), NOBODY))
    spans = torch.where(real[..., None], serving, nobody)
    own = real[:, kept:]
    # Rows from short to long, so that those which pass the layers together need little padding.
    order = own.sum(dim=1).argsort(stable=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    behind = torch.arange(kept, columns.shape[1], device=columns.device)
    from_row, from_columns = rows[order, None], columns[order]
    hidden = take(below.hidden, from_row, from_columns)
    if states is not None:
        places = (
            torch.arange(kept, device=order.device).expand(len(order), -1) if front.visual is None else front.visual
        )
        hidden.scatter_(1, places[order].to(hidden.device)[..., None].expand_as(states), take(states, order))
    check_cut(below, hidden, scores)
    entering_later = below.deep if below.layer < len(below.deep) else ()
    deep = tuple(take(part, from_row, from_columns) for part in entering_later)

    return Stretch(
        hidden=hidden,
        spans=spans[order],
        positions=positions[:, order],
        slot=slot[order],
        between=front.between[order],
        place=torch.stack([row, torch.zeros_like(row)], dim=1),
        text=torch.where(own, behind, -1),
        last=kept + own.sum(dim=1) - 1,
        next_position=below.next_position + shift,
        first=below.layer,
        layer=below.layer,
        keys=Keys(),
        inputs={},
        prefix=trunk.prefix,
        deep=deep,
    )


@dataclass(frozen=True)
class Front:
    """What stands before a question's own text above a cut: the visual tokens that go on, and the texts between images.

    ``columns`` ``(questions, front)``: where they stood below, ascending. ``visual`` ``(questions, kept)``, ``between``
    ``(questions, tokens)``: which of them are which; ``visual`` null: all, one image alone.
    """

    columns: Tensor
    visual: Tensor | None
    between: Tensor

    @classmethod
    def of(cls, visual: Tensor, between: Tensor) -> Front:
        """Columns of both in the layout below, ``visual`` ascending."""
        if not between.shape[1]:
            return cls(visual, None, between)
        columns, order = torch.cat([visual, between], dim=1).sort(dim=1)
        places = order.argsort(dim=1)
        return cls(columns, places[:, : visual.shape[1]], places[:, visual.shape[1] :])


def _renewed_positions(trunk: Trunk, below: Stretch, front: Front, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Position ids ``(axes, questions, columns)`` above a cut, and how far each question's text moves."""
    rows, kept = below.place[:, 0], front.columns.shape[1]
    visual = front.columns if front.visual is None else front.columns.gather(1, front.visual)
    alive = below.slot[rows].gather(1, visual)
    renewed = sequence_positions(alive, trunk.strategy, len(trunk.before), trunk.layout)
    shift = renewed.after - (below.next_position - (below.text >= 0).sum(dim=1))
    positions = below.positions[:, rows[:, None], columns]
    axes = len(positions)
    if front.visual is None:
        positions[:, :, :kept] = renewed.visual
    else:
        positions.scatter_(2, front.visual.expand(axes, -1, -1), renewed.visual)
        positions.scatter_(2, front.between.expand(axes, -1, -1), renewed.between.expand(axes, -1, -1))
    positions[:, :, kept:] += shift[:, None]
    return positions, shift


def trimmed(below: Stretch, alive: Tensor, layers: range, start: int) -> Stretch:
    """A stretch below a cut for generated tokens alone: of its visual tokens they see those that go on above it.

    ``alive`` ``(questions, kept)``: slots of these. ``layers``: the stretch's. ``start``: tokens before the image. Every
    question has a row of its own, because each keeps other tokens.
    """
    rows, text = below.place[:, 0], below.text
    visual = visual_columns(below)
    slots = below.slot[rows].gather(1, visual)
    going = (slots[:, :, None] == alive[:, None]).any(dim=2)
    visual = visual.gather(1, true_columns(going, alive.shape[1]))
    before = torch.arange(start if below.prefix is None else 0, device=text.device).expand(len(rows), -1)
    front = torch.cat([before, visual, below.between[rows]], dim=1)
    columns = torch.cat([front, text.clamp(min=0)], dim=1)
    real = torch.cat([torch.ones_like(front), text >= 0], dim=1).bool()

    serving, nobody = (torch.tensor(span, device=real.device) for span in ((0, 1), NOBODY))
    own = torch.arange(len(rows), device=real.device)
    first = front.shape[1]
    between = torch.arange(before.shape[1] + visual.shape[1], first, device=real.device)
    held: dict[int, Pair] = {}
    for number in layers:
        key, value = (
            take(one.transpose(1, 2), rows[:, None], columns).transpose(1, 2) for one in below.keys.held[number]
        )
        held[number] = key, value
    return replace(
        below,
        spans=torch.where(real[..., None], serving, nobody),
        positions=below.positions[:, rows[:, None], columns],
        slot=below.slot[rows[:, None], columns].masked_fill(~real, TEXT),
        between=between.expand(len(rows), -1),
        place=torch.stack([own, torch.zeros_like(own)], dim=1),
        text=torch.where(text >= 0, torch.arange(first, columns.shape[1], device=real.device), -1),
        last=first + (text >= 0).sum(dim=1) - 1,
        keys=Keys(held),
        inputs={},
        deep=(),
    )


def visual_columns(stretch: Stretch) -> Tensor:
    """Columns of the visual tokens that every question sees, ``(questions, visual)``."""
    return true_columns(stretch.slot[stretch.place[:, 0]] != TEXT)


def _survivors(
    trunk: Trunk, below: Stretch, cut: Cut, visual: Tensor, scores: Tensor, recycled: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """What goes on of the ``visual`` columns: their numbers, ascending ``(questions, keep)``, and hidden states.

    The best by score go on as they are; of ``recycled`` ones, aggregated, each stands at its cluster's centre. States
    are null where all go on as they are.
    """
    chosen = top_indices(scores, cut.keep - recycled)
    if cut.recycling is None or not recycled:
        return chosen, None
    device, identity = below.hidden.device, _identity(trunk, below)
    together = max(1, EVIDENCE_NUMBERS // (visual.shape[1] * below.hidden.shape[2]))
    numbers, kept = [], []

    for at in range(0, len(visual), together):
        part = slice(at, at + together)
        hidden, picked = take(below.hidden, below.place[part, :1], visual[part]), chosen[part].to(device)
        noise = torch.from_numpy(cluster_noise(seed, identity[part], visual.shape[1])).to(device)
        centres, means = recycle(hidden, scores[part].to(device), picked, recycled, cut.recycling, noise)
        both, order = torch.cat([picked, centres], dim=1).sort(dim=1)
        numbers.append(both.to(visual.device))
        kept.append(gather_tokens(torch.cat([gather_tokens(hidden, picked), means], dim=1), order))
    return torch.cat(numbers), torch.cat(kept)


def _identity(trunk: Trunk, below: Stretch) -> list[tuple[str, ...]]:
    """What seeds chance at a cut: the layer, and each question's image and words."""
    return [
        (f"cut {below.layer}", image, repr(prompt.after))
        for image, prompt in zip(trunk.images, trunk.prompts, strict=True)
    ]


def scores_at(trunk: Trunk, below: Stretch, scorer: Scorer, keep: int, seed: int) -> Tensor:
    """``(questions, visual)``; forks of the trunk that differ in how many tokens they ``keep`` share them, where they may."""
    if below is not trunk.stretch:
        return _scores(trunk, below, scorer, keep, seed)
    if trunk.whole is not None:
        return scores_at(trunk.whole, trunk.whole.stretch, scorer, keep, seed)[trunk.questions]
    key = (below.layer, scorer, keep if scorer.by_keep else None, seed)
    if key not in trunk.scored:
        trunk.scored = {known: scores for known, scores in trunk.scored.items() if known[0] == below.layer}
        trunk.scored[key] = _scores(trunk, below, scorer, keep, seed)
    return trunk.scored[key]


def _scores(trunk: Trunk, below: Stretch, scorer: Scorer, keep: int, seed: int) -> Tensor:
    """Some questions at a time: what a scorer reads of a question may be as large as the model's attention."""
    visual = visual_columns(below)
    questions, longest = below.text.shape
    config = trunk.vlm.language.config
    attention = config.num_attention_heads * longest * below.hidden.shape[1]
    width = max(below.hidden.shape[1], trunk.projected.shape[1]) * below.hidden.shape[2]
    together = max(1, EVIDENCE_NUMBERS // max(attention, width))

    identity = _identity(trunk, below)
    scores = []
    for at in range(0, questions, together):
        part = slice(at, at + together)
        evidence = MeasuredEvidence(trunk, below, part, visual, keep=keep, seed=seed, identity=identity)
        scores.append(scorer.scores(evidence).to(visual.device))
    return torch.cat(scores) if len(scores) > 1 else scores[0]


class MeasuredEvidence(CutEvidence):
    """Evidence of some questions of a trunk; what is large is gathered when a scorer reads it."""

    trunk: Trunk
    below: Stretch
    part: slice
    columns: Tensor
    rows: Tensor
    trunk_rows: Tensor

    def __init__(
        self,
        trunk: Trunk,
        below: Stretch,
        part: slice,
        visual: Tensor,
        *,
        keep: int,
        seed: int,
        identity: Sequence[tuple[str, ...]],
    ) -> None:
        """``part``: the questions; ``visual`` ``(questions, visual)``: columns of all questions' visual tokens."""
        known = {
            "trunk": trunk,
            "below": below,
            "part": part,
            "columns": visual[part],
            "rows": below.place[part, 0],
            "trunk_rows": trunk.stretch.place[part, 0],
            "text_mask": trunk.stretch.text[part] >= 0,
            "layout": trunk.layout,
            "keep": keep,
            "seed": seed,
            "identity": list(identity[part]),
        }

        for name, value in known.items():  # the base class is frozen
            object.__setattr__(self, name, value)

    def attention(self, last_only: bool) -> Tensor:
        return self._attention_at(self.below.layer - 1, last_only)

    def next_attention(self, last_only: bool) -> Tensor:
        return self._attention_at(self.below.layer, last_only)

    @property
    def text(self) -> Tensor:
        own = self.trunk.stretch.text[self.part].clamp(min=0)
        return self.trunk.vlm.language.embed_tokens(take(self.trunk.ids, self.trunk_rows[:, None], own))

    @property
    def entered(self) -> Tensor:
        return take(self.trunk.projected, self.trunk_rows).to(self.columns.device)

    @property
    def visual(self) -> Tensor:
        projected = self.trunk.projected
        alive = self.below.slot[self.rows].gather(1, self.columns)
        # Columns of the alive tokens in the trunk's own order of kept tokens.
        entered = self.trunk.slots[self.trunk_rows]
        numbers = torch.arange(entered.shape[1], device=alive.device).expand_as(entered)
        number_of = torch.zeros(len(alive), self.trunk.layout.tokens, dtype=torch.long, device=alive.device)
        number_of.scatter_(1, entered, numbers)
        return take(projected, self.trunk_rows[:, None], number_of.gather(1, alive)).to(self.columns.device)

    @property
    def slots(self) -> Tensor:
        return self.below.slot[self.rows].gather(1, self.columns)

    @property
    def states(self) -> Tensor:
        return take(self.below.hidden, self.rows[:, None], self.columns)

    def normed(self, tokens: Literal["text", "visual"]) -> Tensor:
        states = take(self.below.hidden, self.rows[:, None], self._columns_of(tokens))
        norm = self.trunk.vlm.language.norm
        return norm(states.to(execution_device(norm))).to(self.columns.device)

    @property
    def positions(self) -> Tensor:
        return self._positions_of("visual")

    def rotary(self, tokens: Literal["text", "visual"]) -> tuple[Tensor, Tensor]:
        return self._rotations(self._positions_of(tokens))

    def rotary_by_axis(self) -> tuple[Tensor, Tensor]:
        positions = self.positions
        tables = [self._rotations(axis.expand(len(positions), -1, -1)) for axis in positions]
        cos, sin = (torch.stack(parts) for parts in zip(*tables, strict=True))
        return cos, sin

    def projections(self, tokens: Tokens, rotated: bool = True, ahead: bool = False) -> Projections:
        below, rows = self.below, self.rows[:, None]
        number = below.layer if ahead else below.layer - 1
        columns = self._columns_of(tokens)
        entering = below.hidden if ahead else below.inputs[number]
        hidden, positions = take(entering, rows, columns), below.positions[:, rows, columns]
        if tokens == "before" and below.prefix is not None:
            first = below.prefix
            hidden = torch.cat([first.inputs[number].expand(len(rows), -1, -1), hidden], dim=1)
            positions = torch.cat([first.columns.positions.expand(-1, len(rows), -1), positions], dim=2)
        return project(self.trunk.vlm, number, hidden, positions, rotated)

    def _columns_of(self, tokens: Tokens) -> Tensor:
        """Columns of the stretch, ``(questions, tokens)``; those of padding are any."""
        if tokens == "before":
            start = 0 if self.below.prefix is not None else len(self.trunk.before)
            first = torch.arange(start, device=self.columns.device).expand(len(self.rows), -1)
            return torch.cat([first, self.below.between[self.rows]], dim=1)
        return self.columns if tokens == "visual" else self.below.text[self.part].clamp(min=0)

    def _positions_of(self, tokens: Literal["text", "visual"]) -> Tensor:
        return self.below.positions[:, self.rows[:, None], self._columns_of(tokens)]

    def _rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As float32, in which position ids of long sequences still differ."""
        text = self.trunk.vlm.text
        like = torch.empty(0, dtype=torch.float32, device=self.columns.device)
        cos, sin = text.rotations(like, positions)[text.kinds[self.below.layer - 1]]
        return cos, sin

    def _attention_at(self, number: int, last_only: bool) -> Tensor:
        """Attention at layer ``number`` from prompt tokens to visual ones: ``(questions, heads, queries, visual)``.

        ``number``: the layer the stretch has just passed, or the one before which it stands, whose keys are then made
        here. Float32, zero at padded queries.
        """
        vlm, below, rows = self.trunk.vlm, self.below, self.rows
        queries = below.last[self.part, None] if last_only else below.text[self.part]
        at, real = queries.clamp(min=0), queries >= 0
        ahead = number == below.layer
        entering = below.hidden if ahead else below.inputs[number]
        asking = Columns(
            below.spans[rows].gather(1, at[..., None].expand(-1, -1, 2)), below.positions[:, rows[:, None], at]
        )
        projections = project(vlm, number, take(entering, rows[:, None], at), asking.positions)
        key = project(vlm, number, entering, below.positions).key if ahead else below.keys.held[number][0]
        key, offset = take(key, rows), below.offset
        if below.prefix is not None:
            key = torch.cat([below.prefix.held[number][0].expand(len(rows), -1, -1, -1), key], dim=2)

        standing = below.standing(rows)
        seen = standing.seen_by(asking, at + offset)
        if vlm.text.kinds[number] == SLIDING:
            seen = seen & standing.within(asking, vlm.text.window)
        weights = projections.weights(key, seen).to(self.columns.device)
        weights = weights.gather(3, (self.columns + offset)[:, None, None].expand(-1, *weights.shape[1:3], -1))
        return weights.masked_fill(~real[:, None, :, None], 0.0)
