"""Position strategies (Nüwa, section 2.3 and Algorithm 3): which position ids kept visual tokens carry.

* PERC, compress: kept tokens are renumbered; the text follows directly.
* PESP, sparse: kept tokens keep their original ids; the text stays where it would have been.
* RPME, extend: kept tokens are spread over the original range of ids; the text stays where it would have been.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

PositionStrategy = Literal["perc", "pesp", "rpme"]
STRATEGIES: tuple[str, ...] = get_args(PositionStrategy)


def visual_positions(indices: Tensor, strategy: PositionStrategy, start: int, tokens: int) -> Tensor:
    """Position ids of kept tokens, ``(batch, kept)`` int64.

    ``indices``: kept patch indices, ascending, ``(batch, kept)``. ``start``: the id of the image's first token.
    ``tokens``: how many the unpruned image has, so the original range is ``[start, start + tokens - 1]``, inclusive.
    """
    _check(strategy)
    if strategy == "pesp":
        return indices + start
    if strategy == "perc":
        return torch.arange(start, start + indices.shape[1], device=indices.device).expand_as(indices)
    span, last = tokens - 1, indices[:, -1:].clamp(min=1)
    spread = -((-indices * span) // last)  # ceil, multiplied before it is divided
    spread = torch.cat([torch.zeros_like(spread[:, :1]), spread[:, 1:]], dim=1)
    return spread + start


def text_start(strategy: PositionStrategy, start: int, tokens: int, kept: int) -> int:
    """Position id of the first token after the image."""
    _check(strategy)
    return start + (kept if strategy == "perc" else tokens)


def _check(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"position strategy {strategy!r} is unknown; allowed: {', '.join(STRATEGIES)}")
