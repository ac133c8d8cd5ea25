"""VScan, stage 1 (TMLR 2026, arXiv 2505.22654): a local scan of an early layer, a global scan of a late one, merging.

Half of the budget goes to windows of the grid and is chosen by the attention of an early layer; the other half is chosen
among all other tokens by the attention of a late one. Every dropped token then joins the kept token that is most similar
behind the projector, and a token is the mean of itself and what joined it.

Released code: github.com/Tencent/SelfEvolvingAgent, ``VScan/``. The presets ``released`` and ``released_qwen`` do what it
does on LLaVA-1.5 and on Qwen2.5-VL; every difference is a field of :class:`VScan`. Differences under every setting: grids
that windows do not divide work (what is over belongs to the last row and column of windows, as in the code for
Qwen2.5-VL), a budget too small for one token a window is no error, and of equal similarities the lower kept token is
joined. On LLaVA-NeXT the released code prunes every crop by itself, here the stitched local grid is one view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nuwa.allowed import check_words
from nuwa.grid import PatchGrid
from nuwa.selection import Selection, gather_tokens
from nuwa.signals import VisionSignals, cosine_similarity, directions, top_indices
from nuwa.stage1.nuwa import rank_in_region
from nuwa.stage1.registry import register

LocalScan = Literal["quota", "walk"]
LocalRounding = Literal["given_to_global", "lost"]
Cap = Literal["exact", "released"]


@dataclass(frozen=True)
class VScan:
    """Hyper-parameters of stage 1.

    ``window_side``: patches along a window's side; null: a quarter of the grid's shorter side (6 of 24).
    ``local_scan``: ``quota``: the same number of every window (LLaVA); ``walk``: the best of all windows, and of no window
    more than a cap (Qwen2.5-VL).
    ``local_rounding``: what becomes of tokens that division by the windows leaves over, with ``quota``: the global scan
    takes them, or fewer tokens are kept than asked for, as released (104 of 112; 128 of 128).
    ``cap``: tokens a window of a walk may give, rounded up: ``released`` divides in single precision, so that 90 tokens
    of 15 windows are 7 each.
    """

    window_side: int | None = None
    local_scan: LocalScan = "quota"
    local_rounding: LocalRounding = "given_to_global"
    cap: Cap = "exact"

    def __post_init__(self) -> None:
        check_words("vscan", self, local_scan=LocalScan, local_rounding=LocalRounding, cap=Cap)
        if self.window_side is not None and self.window_side < 1:
            raise ValueError(f"vscan.window_side {self.window_side} must be null or at least 1")


PRESETS = {
    "default": {},
    "released": {"window_side": 6, "local_rounding": "lost"},
    "released_qwen": {"window_side": 4, "local_scan": "walk", "cap": "released"},
}


def window_shape(grid: PatchGrid, config: VScan) -> tuple[int, int, int]:
    """Side, rows and columns of the windows; raises ``ValueError`` where none fits."""
    shorter = min(grid.height, grid.width)
    side = max(1, shorter // 4) if config.window_side is None else config.window_side
    if side > shorter:
        raise ValueError(
            f"vscan.window_side {side} does not fit a {grid.height}x{grid.width} grid; allowed: 1..{shorter}, or null "
            "for a quarter of the shorter side"
        )
    return side, grid.height // side, grid.width // side


def windows(grid: PatchGrid, config: VScan, device: torch.device) -> Tensor:
    """The window of every token, ``(tokens,)``; what a grid's side leaves over belongs to the last windows."""
    side, down, across = window_shape(grid, config)
    rows = (torch.arange(grid.height, device=device) // side).clamp(max=down - 1)
    columns = (torch.arange(grid.width, device=device) // side).clamp(max=across - 1)
    return (rows[:, None] * across + columns).flatten()


def window_sizes(grid: PatchGrid, config: VScan) -> list[int]:
    """Tokens of every window."""
    side, down, across = window_shape(grid, config)
    heights = [side] * (down - 1) + [grid.height - side * (down - 1)]
    widths = [side] * (across - 1) + [grid.width - side * (across - 1)]
    return [height * width for height in heights for width in widths]


def local_split(grid: PatchGrid, keep: int, config: VScan) -> tuple[int, int]:
    """Tokens that a window may give, and tokens that the local scan takes in all."""
    sizes, half = window_sizes(grid, config), keep // 2
    if config.local_scan == "quota":
        most = half // len(sizes)
        return most, sum(min(size, most) for size in sizes)
    if config.cap == "exact":
        most = math.ceil(Fraction(half, len(sizes)))
    else:
        most = math.ceil(np.float32(half) * (np.float32(1) / np.float32(len(sizes))))
    return most, min(half, sum(min(size, most) for size in sizes))


def kept(grid: PatchGrid, keep: int, config: VScan | None = None) -> int:
    """Fewer than ``keep`` where what the local scan leaves over is lost."""
    if config is None or config.local_scan == "walk" or config.local_rounding == "given_to_global":
        return keep
    return local_split(grid, keep, config)[1] + keep - keep // 2


def merged(projected: Tensor, compared: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Means of kept tokens and what joins them, ``(batch, kept, dim)`` float32, and how many join, ``(batch, kept)``.

    ``compared``: what of ``projected`` says which token joins which.
    """
    nearest = nearest_kept(compared, indices)
    joins = torch.zeros(*nearest.shape, indices.shape[1], device=nearest.device)
    joins.scatter_(2, nearest[..., None], 1.0)
    joins.scatter_(1, indices[..., None].expand(-1, -1, indices.shape[1]), 0.0)  # kept tokens join no other
    count = joins.sum(dim=1)
    sums = joins.transpose(1, 2) @ projected.float() + gather_tokens(projected, indices).float()
    return sums / (1 + count)[..., None], count


def nearest_kept(compared: Tensor, indices: Tensor) -> Tensor:
    """Place among the kept of the one that is most similar to each token, the first of equals, ``(batch, tokens)``."""
    if compared.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest":
        return torch.stack([nearest_roughly(*image) for image in zip(compared, indices, strict=True)])
    unit = directions(compared)
    return cosine_similarity(unit, gather_tokens(unit, indices)).argmax(dim=2)


def nearest_roughly(compared: Tensor, indices: Tensor) -> Tensor:
    """The same of one image, ``(tokens,)``.

    Products of unit vectors in float32 are off by less than ``(dim + 8) / 2²⁴``: only tokens with several kept ones within
    twice that of the most similar are compared exactly.
    """
    # Few at a time, which stay in the processor's cache from one pass over them to the next.
    unit = torch.cat([directions(part).float() for part in compared.split(64)])
    rough = unit @ unit[indices].T
    margin = 2 * (compared.shape[1] + 8) * 2**-24
    nearest = rough.argmax(dim=1)

    several = (rough >= rough.amax(dim=1, keepdim=True) - margin).sum(dim=1) > 1
    unsure = several.nonzero()[:, 0]
    exact = cosine_similarity(directions(compared[unsure])[None], directions(compared[indices])[None])
    return nearest.index_copy_(0, unsure, exact[0].argmax(dim=1))


def reads(config: VScan) -> tuple[str, ...]:
    return ("features", "cls_attention", "early_attention", "projected")


@register("vscan", VScan, cite=("vscan",), presets=PRESETS, reads=reads, kept=kept)
def select(signals: VisionSignals, keep: int, config: VScan, seed: int = 0) -> Selection:
    """Pillars are kept tokens that nothing joins. Features are behind the projector."""
    early, late = signals.early_attention.float(), signals.cls_attention.float()
    total = kept(signals.grid, keep, config)
    most, local = local_split(signals.grid, keep, config)
    place = rank_in_region(early, windows(signals.grid, config, early.device))
    scanned = top_indices(early.masked_fill(place >= most, -torch.inf), local)
    beyond = late.scatter(1, scanned, -torch.inf)
    indices = torch.cat([scanned, top_indices(beyond, total - local)], dim=1).sort(dim=1).values

    features, joined = merged(signals.projected, signals.compared(signals.projected), indices)
    untouched = joined == 0
    own = gather_tokens(signals.projected, indices)
    features = torch.where(untouched[..., None], own, features.to(own.dtype))
    return Selection(indices, features, untouched, projected=True)
