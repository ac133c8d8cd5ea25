"""Position strategies (Nüwa, section 2.3 and Algorithm 3): which position ids kept visual tokens carry.

* PERC, compress: kept tokens are renumbered; the text follows directly.
* PESP, sparse: kept tokens keep their original ids; the text stays where it would have been. Also called ``gap``
  (arXiv 2506.21873).
* RPME, extend: kept tokens are spread over the original range of ids; the text stays where it would have been.

Where a token has several ids (M-RoPE: time, row, column) every axis is treated on its own: PERC replaces an id by its
rank among the axis' kept ids, so that kept rows and columns close up; RPME stretches the axis' kept ids over its range.
With one id a token both are the paper's formulas, and with all tokens kept every strategy is the unpruned model.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor

from nuwa.allowed import check_word
from nuwa.layout import VisualLayout

PositionStrategy = Literal["perc", "pesp", "rpme"]
STRATEGIES: tuple[PositionStrategy, ...] = get_args(PositionStrategy)
# What a comparison may name: a strategy, another name of one, or ``own``, the ids that a method's authors give.
PositionName = Literal["own", "perc", "pesp", "rpme", "gap"]
NAMES: tuple[str, ...] = get_args(PositionName)
SYNONYMS: dict[str, PositionStrategy] = {"gap": "pesp"}


def resolve(name: str, own: PositionStrategy) -> PositionStrategy:
    """The strategy that ``name`` stands for, where a method's authors use ``own``; raises ``ValueError``."""
    check_word("position", name, NAMES)
    return own if name == "own" else cast(PositionStrategy, SYNONYMS.get(name, name))


def visual_positions(slots: Tensor, strategy: PositionStrategy, start: int, layout: VisualLayout) -> Tensor:
    """Position ids of kept tokens, ``(axes, batch, kept)`` int64.

    ``slots``: places of the kept tokens in the unpruned image, ascending, ``(batch, kept)``. ``start``: the id of the
    image's first token, so the original ids of an axis are ``[start, start + span]``, inclusive.
    """
    check_word("position strategy", strategy, STRATEGIES)
    everything = layout.offsets.to(slots.device)
    kept = everything[:, slots]
    if strategy == "pesp" or not slots.shape[1]:
        return kept + start
    if strategy == "perc":
        present = torch.zeros(*kept.shape[:2], layout.length, dtype=torch.long, device=slots.device)
        return present.scatter_(2, kept, 1).cumsum(dim=2).gather(2, kept) - 1 + start
    span = everything.amax(dim=1)[:, None, None]
    first, last = kept.amin(dim=2, keepdim=True), kept.amax(dim=2, keepdim=True).clamp(min=1)
    spread = -((-kept * span) // last)  # ceil, multiplied before it is divided
    return spread.masked_fill(kept == first, 0) + start


def text_start(strategy: PositionStrategy, start: int, positions: Tensor, layout: VisualLayout) -> Tensor:
    """Position id of the first token after the image, ``(batch,)``; ``positions`` are those of its kept tokens."""
    check_word("position strategy", strategy, STRATEGIES)
    if strategy == "perc":
        none = positions.new_full((len(positions), positions.shape[1], 1), start - 1)
        return torch.cat([none, positions], dim=2).amax(dim=(0, 2)) + 1
    return positions.new_full(positions.shape[1:2], start + layout.length)
