"""VisPruner (ICCV 2025): important tokens by CLS attention, diverse ones by removing duplicates from the rest.

Important: the top CLS attention, a fixed share of the budget. Diverse: the rest, in order of falling attention, is
dealt alternately to two groups; the tokens of the first group that are most similar (cosine of the features) to any
token of the second are dropped, a few at a time; what is left of the first group, then the second, is dealt again,
until the budget is met. No merging.

Differences from the released code: any number of tokens and any budget work (it raises when the rest is odd), a round
never drops more than the first group holds, and ties are decided: of equal attention the lower index comes first, of
equally similar tokens the one dealt later is dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from nuwa.allowed import check_share
from nuwa.selection import Selection, gather_tokens, keep_unmerged
from nuwa.signals import VisionSignals, cosine_similarity, directions, ranked
from nuwa.stage1.registry import register


@dataclass(frozen=True)
class VisPruner:
    """``important_share``: of the budget, kept by attention, rounded down. ``drop_per_round``: duplicates dropped at once."""

    important_share: float = 0.5
    drop_per_round: int = 8

    def __post_init__(self) -> None:
        check_share(f"vispruner.important_share {self.important_share}", self.important_share)
        if self.drop_per_round < 1:
            raise ValueError(f"vispruner.drop_per_round {self.drop_per_round} must be at least 1")


def distinct(similarity: Tensor, keep: int, drop_per_round: int) -> Tensor:
    """Places of the ``keep`` tokens left when duplicates are gone, ``(batch, keep)``, in the order of the last deal.

    ``similarity``: of all pairs, ``(batch, rest, rest)``. All pairs and not ``keep x rest``, as any token may turn out
    a duplicate of any other; computed once, where every round would need a quarter of it anew.
    """
    batch, rest, _ = similarity.shape
    image = torch.arange(batch, device=similarity.device)[:, None, None]
    places = torch.arange(rest, device=similarity.device).expand(batch, -1)
    while places.shape[1] > keep:
        first, second = places[:, ::2], places[:, 1::2]
        drop = min(drop_per_round, places.shape[1] - keep, first.shape[1])
        nearest = similarity[image, first[:, :, None], second[:, None, :]].amax(dim=2)
        rising = torch.sort(nearest, dim=1, stable=True).indices
        distinct_first = first.gather(1, rising[:, : first.shape[1] - drop].flip(1))
        places = torch.cat([distinct_first, second], dim=1)
    return places


@register(
    "vispruner", VisPruner, cite=("vispruner",), reads_cls=True, reads=lambda config: ("features", "cls_attention")
)
def select(signals: VisionSignals, keep: int, config: VisPruner, seed: int = 0) -> Selection:
    important = math.floor(keep * Fraction(str(config.important_share)))
    order = ranked(signals.cls_attention.float())
    chosen, rest = order[:, :important], order[:, important:]
    if keep > important:
        unit = directions(gather_tokens(signals.compared(signals.features), rest))
        places = distinct(cosine_similarity(unit, unit), keep - important, config.drop_per_round)
        chosen = torch.cat([chosen, rest.gather(1, places)], dim=1)
    return keep_unmerged(signals, chosen.sort(dim=1).values)
