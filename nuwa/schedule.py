"""Token schedules: how many visual tokens pass each layer of the language model.

The *average tokens* of a schedule are the mean over layers of the visual tokens entering that layer (Nüwa, B.2):
``avg = (k * K1 + (L - k) * K2) / L`` for one cut before layer ``k`` of ``L``. Some papers count what *leaves* a layer
instead: a cut made at the end of layer ``k - 1`` then already counts there.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from nuwa.allowed import check_share
from nuwa.errors import UserError
from nuwa.layout import VisualLayout


class UnreachableBudget(UserError, ValueError):
    """No schedule of the asked form has that average; the message names the reachable range."""


@dataclass(frozen=True)
class TokenSchedule:
    """``stage1_keep`` tokens enter layer 0; each cut ``(layer, keep)`` leaves ``keep`` from that layer on.

    ``least``: how few a cut may leave; 0 of a method that withdraws all. ``trimmed``: whether caches of the layers below
    hold only what the last cut leaves, once the prompt has passed.
    """

    tokens: int
    layers: int
    stage1_keep: int
    cuts: tuple[tuple[int, int], ...] = ()
    least: int = 1
    trimmed: bool = False

    def __post_init__(self) -> None:
        kept, previous = self.stage1_keep, 0
        if not 1 <= kept <= self.tokens:
            raise ValueError(f"stage-1 keep {kept} must lie in 1..{self.tokens}")
        for layer, keep in self.cuts:
            if not previous < layer < self.layers:
                raise ValueError(
                    f"cut layer {layer} must lie in {previous + 1}..{self.layers - 1} and cuts must ascend"
                )
            if not self.least <= keep <= kept:
                raise ValueError(f"cut at layer {layer} keeps {keep}; it must keep {self.least}..{kept}")
            kept, previous = keep, layer

    def running(self, recycles: bool) -> tuple[tuple[int, int], ...]:
        """The cuts that change anything: those that drop tokens or, where dropped ones are recycled, all."""
        if recycles:
            return self.cuts
        before = [self.stage1_keep, *(keep for _, keep in self.cuts)]
        return tuple(cut for cut, entering in zip(self.cuts, before, strict=False) if cut[1] < entering)

    @property
    def entering(self) -> list[int]:
        """Visual tokens entering each layer, ``layers`` numbers."""
        counts = [self.stage1_keep] * self.layers
        for layer, keep in self.cuts:
            counts[layer:] = [keep] * (self.layers - layer)
        return counts

    @property
    def leaving(self) -> list[int]:
        """Visual tokens leaving each layer, ``layers`` numbers: a cut is made at the end of the layer before it."""
        entering = self.entering
        return [*entering[1:], entering[-1]]

    @property
    def cached(self) -> list[int]:
        """Visual tokens in each layer's cache when the answer begins, ``layers`` numbers."""
        return [self.entering[-1]] * self.layers if self.trimmed else self.entering

    @property
    def average_tokens(self) -> float:
        """Mean over layers of the tokens entering; every budget means this one."""
        return sum(self.entering) / self.layers

    @property
    def average_leaving(self) -> float:
        """Mean over layers of the tokens leaving."""
        return sum(self.leaving) / self.layers


def joined(schedules: Sequence[TokenSchedule]) -> TokenSchedule:
    """Of several images in one sequence: what the images' own schedules keep together. The cuts act on all of them.

    Raises ``ValueError`` where they cut before different layers.
    """
    first = schedules[0]
    layers = [tuple(layer for layer, _ in one.cuts) for one in schedules]
    if len(set(layers)) > 1:
        raise ValueError(
            f"the images' sizes lead to cuts before different layers ({', '.join(map(str, map(list, layers)))}), and images "
            "in one sequence are cut together; give images of one size, or a budget without such cuts"
        )
    cuts = [(layer, sum(one.cuts[at][1] for one in schedules)) for at, layer in enumerate(layers[0])]
    return replace(
        first,
        tokens=sum(one.tokens for one in schedules),
        stage1_keep=sum(one.stage1_keep for one in schedules),
        cuts=tuple(cuts),
    )


BudgetUnit = Literal["tokens", "share"]
Between = Literal["nearest", "linear"]


@dataclass(frozen=True)
class ByBudget:
    """A number that authors set budget by budget: ``values`` at ``budgets``, which ascend.

    ``unit``: budgets are average ``tokens``, or a ``share`` of the image's own tokens. ``between`` two budgets the value
    is that of the ``nearest`` one (of two equally near the smaller), or lies on a straight line (``linear``); beyond the
    first and the last budget their values hold. ``stage1_shares``: the share of the image's tokens that stage 1 keeps at
    each budget, by which :meth:`at_stage1` finds the value where stage 1 is called without a budget.
    """

    budgets: tuple[float, ...]
    values: tuple[float, ...]
    unit: BudgetUnit = "tokens"
    between: Between = "nearest"
    stage1_shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.budgets or len(self.values) != len(self.budgets):
            raise ValueError(f"{len(self.values)} values by {len(self.budgets)} budgets: give one value a budget")
        if list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets {', '.join(f'{budget:g}' for budget in self.budgets)} must ascend")
        if self.unit not in get_args(BudgetUnit) or self.between not in get_args(Between):
            raise ValueError(f"a table by {self.unit!r} and {self.between!r} is unknown; see ByBudget")
        if self.stage1_shares and len(self.stage1_shares) != len(self.budgets):
            raise ValueError(f"{len(self.stage1_shares)} stage-1 shares by {len(self.budgets)} budgets: give one each")

    def at(self, budget: float, tokens: int) -> float:
        """The value at ``budget`` average tokens of an image of ``tokens``."""
        return self._value(self.budgets, budget / tokens if self.unit == "share" else budget)

    def at_stage1(self, share: float) -> float:
        """The value where stage 1 keeps ``share`` of an image's tokens; raises ``ValueError`` if no such share is known."""
        if not self.stage1_shares:
            raise ValueError("this table is by budget: name one, or set the parameter to a number")
        return self._value(self.stage1_shares, share)

    def _value(self, places: tuple[float, ...], place: float) -> float:
        above = bisect_right(places, place)
        if above in (0, len(places)):
            return self.values[max(above - 1, 0)]
        low, high = places[above - 1], places[above]
        if self.between == "nearest":
            return self.values[above - 1 if place - low <= high - place else above]
        step = (place - low) / (high - low)
        return (1 - step) * self.values[above - 1] + step * self.values[above]


@dataclass(frozen=True)
class Decay:
    """Every cut keeps the same share of what enters it.

    ``ratio`` null: stage 1 keeps everything and the budget decides the share (FastV with one cut; PyramidDrop with
    three: 1, λ, λ², λ³). Else stage 1 takes what is left of the budget: ``K1, K1 * ratio, K1 * ratio², ...`` (Nüwa
    1/7, LearnPruner 1/3). Where K1 would exceed the image's tokens it stays there and the cuts take the rest.
    A table of ratios by budget becomes the one of a budget in :meth:`at`.
    """

    ratio: float | ByBudget | None

    def __post_init__(self) -> None:
        for ratio in self.ratio.values if isinstance(self.ratio, ByBudget) else [self.ratio]:
            if ratio is not None:
                check_share(f"stage-2 ratio K2/K1 {ratio:g}", ratio, "(0, 1]")

    def at(self, budget: float, tokens: int) -> Decay:
        """With the one ratio of ``budget`` average tokens on an image of ``tokens``."""
        return replace(self, ratio=self.ratio.at(budget, tokens)) if isinstance(self.ratio, ByBudget) else self

    @property
    def _one(self) -> float | None:
        if isinstance(self.ratio, ByBudget):
            raise TypeError("a table of ratios has no one ratio; ask for a budget's with `at` first")
        return self.ratio

    def largest(self, cuts: int) -> float:
        return 1.0 if self._one is None else self._one**-cuts

    def shares(self, scale: float, cuts: int) -> list[float]:
        if self._one is None:
            return [scale**at for at in range(cuts + 1)]
        return [scale * self._one**at for at in range(cuts + 1)]


@dataclass(frozen=True)
class Published:
    """Stage 1 keeps everything; what the cuts keep lies on straight lines between published schedules.

    ``rows``: the share of the image's tokens that every cut keeps, one row a published budget, from small to large.
    Below the first row the lines end at none, above the last at all tokens.
    """

    rows: tuple[tuple[float, ...], ...]

    def at(self, budget: float, tokens: int) -> Published:
        """Itself: its rows are shares of the image's tokens."""
        return self

    def largest(self, cuts: int) -> float:
        if any(len(row) != cuts for row in self.rows):
            raise ValueError(
                f"this method's published schedule has {len(self.rows[0])} cuts, not {cuts}; name as many layers"
            )
        return len(self.rows) + 1.0

    def shares(self, scale: float, cuts: int) -> list[float]:
        points = [(0.0,) * cuts, *self.rows, (1.0,) * cuts]
        at = min(int(scale), len(self.rows))
        step = scale - at
        return [1.0, *((1 - step) * low + step * high for low, high in zip(points[at], points[at + 1], strict=True))]


@dataclass(frozen=True)
class GridUnion:
    """FEATHER's two cuts. Stage 1 keeps everything; the first cut a share ``λ`` and a regular grid, the second ``λ²``.

    ``grid``: the share of the image's tokens that the grid has, set by :func:`nuwa.methods.MethodSpec.on`. In the mean
    ``grid + λ (1 - grid)`` go on at the first cut, where the best are spread as the grid is; the budget decides ``λ``.
    """

    grid: float = 0.0

    def at(self, budget: float, tokens: int) -> GridUnion:
        return self

    def largest(self, cuts: int) -> float:
        if cuts != 2:
            raise ValueError(f"a grid union has two cuts, not {cuts}; name two layers")
        return 1.0

    def shares(self, scale: float, cuts: int) -> list[float]:
        first = self.grid + scale * (1 - self.grid)
        return [1.0, first, first * scale**2]


@dataclass(frozen=True)
class Withdrawal:
    """One cut keeps nothing; a budget decides its layer, which is where the average comes nearest (VTW)."""

    def schedule(self, average: float, tokens: int, layers: int, cuts: Sequence[int]) -> TokenSchedule:
        """``cuts``: the layer, where it is given; then the average must be the one nearest to it.

        Raises :class:`UnreachableBudget` naming the averages that can be reached.
        """
        if len(cuts) > 1:
            raise ValueError(f"all visual tokens can be withdrawn once, not before layers {', '.join(map(str, cuts))}")
        for layer in cuts:
            _check_layer(layer, layers)

        nearest = math.floor(average * layers / tokens + 1 / 2)
        steps = f"multiples of {tokens / layers:g} below {tokens} average tokens, within half of one"
        if average == tokens and not cuts:
            return TokenSchedule(tokens, layers, tokens, least=0)
        if not 1 <= nearest <= layers - 1 or (cuts and cuts[0] != nearest):
            where = f" with the layer {cuts[0]}" if cuts else ""
            allowed = f"{cuts[0] * tokens / layers:g}" if cuts else steps
            raise UnreachableBudget(f"budget {average:g} is out of reach{where}: allowed {allowed}")
        return TokenSchedule(tokens, layers, tokens, ((nearest, 0),), least=0)


def _check_layer(layer: int, layers: int) -> None:
    if not 1 <= layer <= layers - 1:
        raise ValueError(f"stage-2 layer {layer} must lie in 1..{layers - 1}: the model has {layers} layers")


Solved = Decay | Published | GridUnion  # by solve_schedule
KeepShares = Solved | Withdrawal


def solve_schedule(
    average: float, tokens: int, layers: int, cuts: Sequence[int] = (), keep: Solved | None = None
) -> TokenSchedule:
    """A schedule with cuts before the layers ``cuts`` whose average is within half a token of ``average``.

    Without cuts every layer sees K1 = average. With them ``keep`` says how stage 1 and the cuts share the budget: its
    one free scale is solved, then all keeps but the last are rounded both ways and the last takes what is left.
    Every cut keeps one token at least. Raises :class:`UnreachableBudget` naming the reachable range.
    """
    previous = 0
    for layer in cuts:
        _check_layer(layer, layers)
        if layer <= previous:
            raise ValueError(f"stage-2 layers {', '.join(map(str, cuts))} must ascend")
        previous = layer
    ends = [0, *cuts, layers]
    spans = [end - start for start, end in itertools.pairwise(ends)]

    if cuts and keep is None:
        raise ValueError(f"{_cuts_text(cuts)}: say how stage 1 and the cuts share the budget")
    sharing = keep.at(average, tokens) if cuts and keep is not None else None

    def ideal(scale: float) -> list[float]:
        shares = [scale] if sharing is None else sharing.shares(scale, len(cuts))
        return [min(max(share * tokens, 1.0), float(tokens)) for share in shares]

    def mean(keeps: Sequence[float]) -> float:
        return sum(span * kept for span, kept in zip(spans, keeps, strict=True)) / layers

    low, high = 0.0, 1.0 if sharing is None else sharing.largest(len(cuts))
    least = round(mean(ideal(low)) * layers)  # token-layers of the smallest schedule of this form
    if not least / layers <= average <= tokens:
        where = f" with {_cuts_text(cuts)} of {layers}" if cuts else ""
        raise UnreachableBudget(
            f"budget {average:g} is out of reach{where}: "
            f"allowed {-(-100 * least // layers) / 100:g}..{tokens} average tokens"
        )
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if mean(ideal(middle)) < average else (low, middle)
    *early, _ = ideal(high)
    options = [keeps for keeps in itertools.product(*map(_around, early)) if list(keeps) == sorted(keeps, reverse=True)]
    return min(
        (_with_last(average, tokens, layers, cuts, spans, keeps) for keeps in options),
        key=lambda schedule: (abs(schedule.average_tokens - average), schedule.stage1_keep, schedule.cuts),
    )


def _around(ideal: float) -> list[int]:
    """The whole numbers next to ``ideal``; itself alone where it is whole but for rounding."""
    return sorted({math.floor(ideal + 1e-6), math.ceil(ideal - 1e-6)})


def _with_last(
    average: float, tokens: int, layers: int, cuts: Sequence[int], spans: Sequence[int], early: tuple[int, ...]
) -> TokenSchedule:
    """All keeps but the last given, the last comes nearest to the average."""
    spent = sum(span * kept for span, kept in zip(spans[:-1], early, strict=True))
    last = min(max(round((average * layers - spent) / spans[-1]), 1), early[-1] if early else tokens)
    first, *rest = [*early, last]
    return TokenSchedule(tokens, layers, first, tuple(zip(cuts, rest, strict=True)))


def _cuts_text(cuts: Sequence[int]) -> str:
    if len(cuts) == 1:
        return f"a stage-2 cut before layer {cuts[0]}"
    return f"stage-2 cuts before layers {', '.join(map(str, cuts))}"


def shares(layout: VisualLayout, keep: int) -> list[int]:
    """How many of its tokens each view keeps when ``keep`` visual tokens enter the language model.

    Newline tokens, and those that name tiles, are put back and count. The rest is dealt out by crops, ``total // crops``
    to each; what division or a view's size leaves over goes to the later views first. Raises
    :class:`UnreachableBudget`.
    """
    fixed = int(layout.fixed.sum())
    least = fixed + len(layout.views)
    if not least <= keep <= layout.tokens:
        raise UnreachableBudget(
            f"{keep} tokens before the first cut are out of reach on this image: allowed {least}..{layout.tokens}, "
            f"{fixed} of them {layout.fixed_name}"
        )
    patches, crops = keep - fixed, sum(view.crops for view in layout.views)
    dealt = [min(max(1, patches * view.crops // crops), view.grid.tokens) for view in layout.views]
    for number in reversed(range(len(dealt))):
        dealt[number] += min(patches - sum(dealt), layout.views[number].grid.tokens - dealt[number])
    return dealt
