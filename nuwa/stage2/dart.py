"""DART (EMNLP 2025, arXiv 2502.11494): tokens that are least like a few pivots.

Pivots are the visual tokens, and the prompt tokens behind the image, of largest key norm. Each pivot in turn adds the
visual tokens, of those that are left, whose hidden states are least like its own.

Released code: github.com/ZichenWen1/DART. Differences under every setting: where fewer tokens follow the image than text
pivots are asked for, all of them are pivots; where fewer visual tokens are kept than image pivots are asked for, the best
pivots are kept; ties go to the lower index. The preset ``released`` takes pivots in the order in which a Python set holds
their places in the sequence, and drops what an equal number for every pivot leaves over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nuwa.allowed import check_words
from nuwa.signals import cosine_similarity, directions, ranked
from nuwa.stage2.scorers import CutEvidence, register_scorer

PivotOrder = Literal["ranked", "hash"]
Spread = Literal["exact", "released"]
PivotNorm = Literal["l1", "l2"]


@dataclass(frozen=True)
class Dart:
    """Hyper-parameters.

    ``image_pivots``, ``text_pivots``: how many. ``pivot_order``: ``ranked``: image pivots by falling norm, then text
    pivots; ``hash``: the iteration order of a CPython set of places in the sequence, as released. ``spread``: of the
    tokens to keep beside the pivots, the earlier pivots take one more (``exact``), or all take the same and fewer are
    kept (``released``). ``pivot_norm``: of keys, all heads side by side; ``pivot_rope``: with the rotary embedding, under
    which the L1 norm depends on the place.
    """

    image_pivots: int = 4
    text_pivots: int = 4
    pivot_order: PivotOrder = "ranked"
    spread: Spread = "exact"
    pivot_norm: PivotNorm = "l1"
    pivot_rope: bool = True

    def __post_init__(self) -> None:
        check_words("dart", self, pivot_order=PivotOrder, spread=Spread, pivot_norm=PivotNorm)
        for name, least in (("image_pivots", 1), ("text_pivots", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"dart.{name} {getattr(self, name)} must be at least {least}")


def kept(tokens: int, keep: int, options: Dart) -> int:
    """Fewer than ``keep`` where every pivot takes the same number."""
    beside = keep - options.image_pivots
    if options.spread == "exact" or beside <= 0 or keep == tokens:
        return keep
    pivots = options.image_pivots + options.text_pivots
    return options.image_pivots + beside // pivots * pivots


@register_scorer("dart", reads_attention=False, options=Dart(), by_keep=True, kept=kept, cite=("dart",))
def dart(evidence: CutEvidence, options: Dart = Dart()) -> Tensor:
    """Tokens by the turn in which they were taken: pivots first, then those that the first pivot added, and so on."""
    visual, text = (_norms(evidence, tokens, options) for tokens in ("visual", "text"))
    text = text.masked_fill(~evidence.text_mask.to(text.device), -torch.inf)
    pivots = min(options.image_pivots, evidence.keep, visual.shape[1])
    image_pivots, text_pivots = ranked(visual)[:, :pivots], ranked(text)[:, : options.text_pivots]
    real = evidence.text_mask.to(text.device).gather(1, text_pivots)

    # Candidates for a turn: visual tokens first, text tokens behind them.
    count = visual.shape[1]
    order = _turns(evidence, image_pivots, text_pivots, real, options.pivot_order)
    takers = torch.cat([image_pivots, text_pivots + count], dim=1).gather(1, order)
    turns = torch.cat([torch.ones_like(image_pivots, dtype=torch.bool), real], dim=1).gather(1, order)
    states = directions(torch.cat([evidence.normed("visual"), evidence.normed("text")], dim=1))
    asking = states.gather(1, takers.to(states.device)[..., None].expand(-1, -1, states.shape[2]))
    similarity = cosine_similarity(asking, states[:, :count]).to(visual.device)  # (questions, pivots, visual)

    taken = torch.zeros_like(visual, dtype=torch.bool).scatter_(1, image_pivots, True)
    scores = torch.zeros_like(visual, dtype=torch.float32).masked_fill_(taken, float(takers.shape[1] + 1))
    adding = _added(turns, evidence.keep - pivots)
    for turn in range(takers.shape[1]):
        nearness = similarity[:, turn].masked_fill(taken, torch.inf)
        place = torch.empty_like(order[:, :1].expand(-1, count)).scatter_(
            1, ranked(-nearness), torch.arange(count, device=visual.device).expand_as(nearness)
        )
        added = (place < adding[:, turn, None]) & ~taken
        scores = scores.masked_fill(added, float(takers.shape[1] - turn))
        taken = taken | added
    return scores


def _norms(evidence: CutEvidence, tokens: Literal["text", "visual"], options: Dart) -> Tensor:
    """Norm of every token's keys at the layer before the cut, ``(questions, tokens)`` float64."""
    key = evidence.projections(tokens, options.pivot_rope, False).key.double().transpose(1, 2).flatten(2)
    return key.norm(p=1 if options.pivot_norm == "l1" else 2, dim=-1).to(evidence.text_mask.device)


def _added(turns: Tensor, beside: int) -> Tensor:
    """How many tokens every pivot adds, ``(questions, pivots)``: alike, the earlier ones one more."""
    pivots = turns.sum(dim=1, keepdim=True)
    place = turns.cumsum(dim=1) - 1
    return (beside // pivots + (place < beside % pivots)) * turns


def _turns(evidence: CutEvidence, image: Tensor, text: Tensor, real: Tensor, order: PivotOrder) -> Tensor:
    """The order in which pivots take their turns, numbers among image pivots and text pivots behind them."""
    pivots = image.shape[1] + text.shape[1]
    straight = torch.arange(pivots, device=image.device).expand(len(image), -1)
    if order == "ranked":
        return straight
    # Places in the sequence: what stands before the image, then its tokens that are left, then the text.
    start, count = evidence.projections("before", False, False).key.shape[2], evidence.slots.shape[1]
    places = torch.cat([image + start, (text + start + count).masked_fill(~real, -1)], dim=1).tolist()
    turns = []
    for row in places:
        held = list(set(place for place in row if place >= 0))
        turns.append([row.index(place) for place in held] + [at for at, place in enumerate(row) if place < 0])
    return torch.tensor(turns, device=image.device)
