"""Token schedules: how many visual tokens pass each layer of the language model.

The *average tokens* of a schedule are the mean over layers of the visual tokens entering that layer (Nüwa, B.2):
``avg = (k * K1 + (L - k) * K2) / L`` for one cut before layer ``k`` of ``L``. Some papers count what *leaves* a layer
instead: a cut made at the end of layer ``k - 1`` then already counts there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nuwa.layout import VisualLayout


class UnreachableBudget(ValueError):
    """No schedule of the asked form has that average; the message names the reachable range."""


@dataclass(frozen=True)
class TokenSchedule:
    """``stage1_keep`` tokens enter layer 0; each cut ``(layer, keep)`` leaves ``keep`` from that layer on."""

    tokens: int
    layers: int
    stage1_keep: int
    cuts: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        kept, previous = self.stage1_keep, 0
        if not 1 <= kept <= self.tokens:
            raise ValueError(f"stage-1 keep {kept} must lie in 1..{self.tokens}")
        for layer, keep in self.cuts:
            if not previous < layer < self.layers:
                raise ValueError(
                    f"cut layer {layer} must lie in {previous + 1}..{self.layers - 1} and cuts must ascend"
                )
            if not 1 <= keep <= kept:
                raise ValueError(f"cut at layer {layer} keeps {keep}; it must keep 1..{kept}")
            kept, previous = keep, layer

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
    def average_tokens(self) -> float:
        """Mean over layers of the tokens entering; every budget means this one."""
        return sum(self.entering) / self.layers

    @property
    def average_leaving(self) -> float:
        """Mean over layers of the tokens leaving."""
        return sum(self.leaving) / self.layers


@dataclass(frozen=True)
class Decay:
    """Every cut keeps the same share of what enters it.

    ``ratio`` null: stage 1 keeps everything and the budget decides the share (FastV with one cut; PyramidDrop with
    three: 1, λ, λ², λ³). Else stage 1 takes what is left of the budget: ``K1, K1 * ratio, K1 * ratio², ...`` (Nüwa
    1/7, LearnPruner 1/3). Where K1 would exceed the image's tokens it stays there and the cuts take the rest.
    """

    ratio: float | None

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"stage-2 ratio K2/K1 {self.ratio:g} must lie in (0, 1]")

    def largest(self, cuts: int) -> float:
        return 1.0 if self.ratio is None else self.ratio**-cuts

    def shares(self, scale: float, cuts: int) -> list[float]:
        if self.ratio is None:
            return [scale**at for at in range(cuts + 1)]
        return [scale * self.ratio**at for at in range(cuts + 1)]


@dataclass(frozen=True)
class Published:
    """Stage 1 keeps everything; what the cuts keep lies on straight lines between published schedules.

    ``rows``: the share of the image's tokens that every cut keeps, one row a published budget, from small to large.
    Below the first row the lines end at none, above the last at all tokens.
    """

    rows: tuple[tuple[float, ...], ...]

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


KeepShares = Decay | Published


def solve_schedule(
    average: float, tokens: int, layers: int, cuts: Sequence[int] = (), keep: KeepShares | None = None
) -> TokenSchedule:
    """A schedule with cuts before the layers ``cuts`` whose average is within half a token of ``average``.

    Without cuts every layer sees K1 = average. With them ``keep`` says how stage 1 and the cuts share the budget: its
    one free scale is solved, then all keeps but the last are rounded both ways and the last takes what is left.
    Every cut keeps one token at least. Raises :class:`UnreachableBudget` naming the reachable range.
    """
    previous = 0
    for layer in cuts:
        if not 1 <= layer <= layers - 1:
            raise ValueError(f"stage-2 layer {layer} must lie in 1..{layers - 1}: the model has {layers} layers")
        if layer <= previous:
            raise ValueError(f"stage-2 layers {', '.join(map(str, cuts))} must ascend")
        previous = layer
    ends = [0, *cuts, layers]
    spans = [end - start for start, end in itertools.pairwise(ends)]

    def ideal(scale: float) -> list[float]:
        shares = keep.shares(scale, len(cuts)) if cuts else [scale]
        return [min(max(share * tokens, 1.0), float(tokens)) for share in shares]

    def mean(keeps: Sequence[float]) -> float:
        return sum(span * kept for span, kept in zip(spans, keeps, strict=True)) / layers

    low, high = 0.0, keep.largest(len(cuts)) if cuts else 1.0
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

    Newline tokens are put back at every row's end and count. The rest is dealt out by crops, ``total // crops``
    to each; what division or a view's size leaves over goes to the later views first. Raises
    :class:`UnreachableBudget`.
    """
    newlines = int(layout.newlines.sum())
    least = newlines + len(layout.views)
    if not least <= keep <= layout.tokens:
        raise UnreachableBudget(
            f"{keep} tokens before the first cut are out of reach on this image: allowed {least}..{layout.tokens}, "
            f"{newlines} of them newline tokens"
        )
    patches, crops = keep - newlines, sum(view.crops for view in layout.views)
    dealt = [min(max(1, patches * view.crops // crops), view.grid.tokens) for view in layout.views]
    for number in reversed(range(len(dealt))):
        dealt[number] += min(patches - sum(dealt), layout.views[number].grid.tokens - dealt[number])
    return dealt
