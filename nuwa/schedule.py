"""Token schedules: how many visual tokens enter each layer of the language model.

The *average tokens* of a schedule are the mean over layers of the visual tokens entering that layer (Nüwa, B.2):
``avg = (k * K1 + (L - k) * K2) / L`` for one cut before layer ``k`` of ``L``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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
    def average_tokens(self) -> float:
        return sum(self.entering) / self.layers


def solve_schedule(
    average: float, tokens: int, layers: int, stage2_layer: int | None = None, ratio: float | None = None
) -> TokenSchedule:
    """A schedule whose average is within half a token of ``average``.

    Without ``stage2_layer`` every layer sees K1 = average. With it and ``ratio`` = K2 / K1 (Nüwa 1/7, LearnPruner
    1/3), K1 follows from the formula above; where K1 would exceed ``tokens`` it stays there and K2 takes the rest.
    ``ratio=None`` keeps all tokens in stage 1 (FastV: ``K2 = (avg * L - k * N) / (L - k)``).
    Raises :class:`UnreachableBudget` naming the reachable range.
    """
    if stage2_layer is not None and not 1 <= stage2_layer <= layers - 1:
        raise ValueError(f"stage-2 layer {stage2_layer} must lie in 1..{layers - 1}: the model has {layers} layers")
    least = layers  # token-layers of the smallest schedule of this form
    if stage2_layer is not None and ratio is None:
        least = stage2_layer * tokens + layers - stage2_layer
    low = least / layers
    if not low <= average <= tokens:
        where = "" if stage2_layer is None else f" with a stage-2 cut before layer {stage2_layer} of {layers}"
        raise UnreachableBudget(
            f"budget {average:g} is out of reach{where}: allowed {-(-100 * least // layers) / 100:g}..{tokens} average tokens"
        )
    if stage2_layer is None:
        return TokenSchedule(tokens, layers, round(average))
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"stage-2 ratio K2/K1 {ratio:g} must lie in (0, 1]")
    after = layers - stage2_layer
    by_ratio = tokens if ratio is None else min(tokens, average * layers / (stage2_layer + after * ratio))
    # Where the ratio asks for less than one token, K2 stays at one and K1 takes the rest.
    by_rest = (average * layers - after) / stage2_layer
    for ideal in (by_ratio, by_rest):
        options = [min(max(first, 1), tokens) for first in (math.floor(ideal), math.ceil(ideal))]
        schedules = [_with_second(average, tokens, layers, stage2_layer, first) for first in options]
        best = min(schedules, key=lambda schedule: (abs(schedule.average_tokens - average), schedule.stage1_keep))
        if abs(best.average_tokens - average) <= 0.5:
            break
    return best


def _with_second(average: float, tokens: int, layers: int, stage2_layer: int, first: int) -> TokenSchedule:
    """K2 nearest to the average, given K1."""
    second = round((average * layers - stage2_layer * first) / (layers - stage2_layer))
    return TokenSchedule(tokens, layers, first, ((stage2_layer, min(max(second, 1), first)),))
