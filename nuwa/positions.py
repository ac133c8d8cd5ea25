"""Position strategies (Nüwa, section 2.3 and Algorithm 3): which position ids kept visual tokens carry.

* PERC, compress: kept tokens are renumbered; the text follows directly.
* PESP, sparse: kept tokens keep their original ids; the text stays where it would have been. Also called ``gap``
  (arXiv 2506.21873).
* RPME, extend: kept tokens are spread over the original range of ids; the text stays where it would have been.

Where a token has several ids (M-RoPE: time, row, column) every axis is treated on its own: PERC replaces an id by its
rank among the axis' kept ids, so that kept rows and columns close up; RPME stretches the axis' kept ids over its range.
With one id a token both are the paper's formulas, and with all tokens kept every strategy is the unpruned model.

Of several images in a sequence each is treated on its own, between the texts that stand before and behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from nuwa.allowed import check_word
from nuwa.layout import InterleavedLayout, VisualLayout, images_of

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


@dataclass(frozen=True)
class SequencePositions:
    """Position ids from the first image on.

    ``visual`` ``(axes, batch, kept)``: of kept tokens. ``between`` ``(batch, tokens)``: of the texts between images, the
    same on every axis. ``after`` ``(batch,)``: of the first token behind the last image.
    """

    visual: Tensor
    between: Tensor
    after: Tensor


def sequence_positions(
    slots: Tensor, strategy: PositionStrategy, start: int, layout: VisualLayout
) -> SequencePositions:
    """Ids of all that stands between the texts before and behind the images.

    ``slots``: places of the kept tokens in the unpruned sequence, ascending, ``(batch, kept)``. ``start``: the id of the
    first image's first token.
    """
    check_word("position strategy", strategy, STRATEGIES)
    texts: tuple[int, ...] = (0,)
    owners = torch.zeros_like(slots)
    if isinstance(layout, InterleavedLayout):
        texts, owners = (*layout.between, 0), layout.owners.to(slots.device)[slots]
    first, begins = 0, slots.new_full((len(slots),), start)
    visual = slots.new_zeros(layout.axes, *slots.shape)
    between = []

    for number, (image, text) in enumerate(zip(images_of(layout), texts, strict=True)):
        own = owners == number
        offsets = _kept_offsets((slots - first).clamp(0, image.tokens - 1), own, strategy, image)
        visual = torch.where(own, offsets + begins[:, None], visual)
        ends = begins + _length(offsets, own, strategy, image)
        between.append(ends[:, None] + torch.arange(text, device=slots.device))
        first, begins = first + image.tokens, ends + text
    return SequencePositions(visual, torch.cat(between, dim=1), begins)


def visual_positions(slots: Tensor, strategy: PositionStrategy, start: int, layout: VisualLayout) -> Tensor:
    """Position ids of kept tokens, ``(axes, batch, kept)`` int64: see :func:`sequence_positions`.

    An image's original ids on an axis are ``[start, start + span]``, inclusive.
    """
    return sequence_positions(slots, strategy, start, layout).visual


def _kept_offsets(slots: Tensor, own: Tensor, strategy: PositionStrategy, image: VisualLayout) -> Tensor:
    """Ids of an image's kept tokens counted from its own start, ``(axes, batch, kept)``; anything where not ``own``."""
    everything = image.offsets.to(slots.device)
    kept = everything[:, slots]
    if strategy == "pesp" or not slots.shape[1]:
        return kept
    if strategy == "perc":
        present = torch.zeros(*kept.shape[:2], image.length + 1, dtype=torch.long, device=slots.device)
        present.scatter_(2, kept.masked_fill(~own, image.length), 1)
        return present[..., :-1].cumsum(dim=2).gather(2, kept) - 1
    span = everything.amax(dim=1)[:, None, None]
    first = kept.masked_fill(~own, image.length).amin(dim=2, keepdim=True)
    last = kept.masked_fill(~own, 0).amax(dim=2, keepdim=True).clamp(min=1)
    spread = -((-kept * span) // last)  # ceil, multiplied before it is divided
    return spread.masked_fill(kept == first, 0)


def _length(offsets: Tensor, own: Tensor, strategy: PositionStrategy, image: VisualLayout) -> Tensor | int:
    """How far an image moves what stands behind it: renumbered, as far as the tokens that are kept, ``(batch,)``."""
    if strategy != "perc":
        return image.length
    none = offsets.new_full((*offsets.shape[:2], 1), -1)
    return torch.cat([none, offsets.masked_fill(~own, -1)], dim=2).amax(dim=(0, 2)) + 1
