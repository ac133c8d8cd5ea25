"""HiPrune (ACL 2026, arXiv 2508.00553): object tokens of a middle layer with their neighbours, and registers of a late one.

*Anchors* receive most attention at a middle layer of the encoder; *buffers* are their neighbours on the grid; *registers*
are those of all other tokens that receive most attention at the layer of the features. No CLS token is needed, no merging.

Released code: github.com/Danielement321/HiPrune. Its neighbours are indices clamped to the grid, so that rows wrap around
and corners fall on the first and last token: ``edges: clamp``. It excludes anchors and buffers from the registers by
subtracting 1 from what they receive; where attention is a mean that is the same as leaving them out, which is done here.
On Qwen2.5-VL its attention is a sum over queries, so that a strong anchor can be chosen twice and fewer tokens are kept
than asked for: not inherited. On LLaVA-NeXT it prunes every crop by itself, here the stitched local grid is one view.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from nuwa.allowed import check_share, check_words
from nuwa.grid import PatchGrid
from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import VisionSignals, ranked
from nuwa.stage1.registry import register

Edges = Literal["drop", "clamp"]


@dataclass(frozen=True)
class HiPrune:
    """``alpha``: anchors and their four neighbours as a share of the budget; ``round(alpha · keep / 5)`` anchors, a half
    rounded to the even number. ``edges``: neighbours beyond the grid are none (``drop``) or wrap around (``clamp``, as
    released).
    """

    alpha: float = 0.1
    edges: Edges = "drop"

    def __post_init__(self) -> None:
        check_share(f"hiprune.alpha {self.alpha}", self.alpha)
        check_words("hiprune", self, edges=Edges)


def anchor_count(keep: int, alpha: float) -> int:
    """1, 3 and 4 anchors of 64, 128 and 192 tokens at the published ``alpha`` of 0.1."""
    return round(Fraction(str(alpha)) * keep / 5)


def neighbours(anchors: Tensor, grid: PatchGrid, edges: Edges) -> Tensor:
    """Tokens left, right, above and below ``(batch, anchors)`` tokens: ``(batch, 4 * anchors)``.

    One that lies beyond the grid is the anchor itself (``drop``) or whatever token its clamped index names (``clamp``).
    """
    steps = torch.tensor([-1, 1, -grid.width, grid.width], device=anchors.device)
    around = anchors[..., None] + steps
    if edges == "clamp":
        return around.clamp(0, grid.tokens - 1).flatten(1)
    beyond = (around < 0) | (around >= grid.tokens)
    # A step along a row may not leave it.
    along = around // grid.width != (anchors // grid.width)[..., None]
    beyond |= along & (steps.abs() == 1)
    if grid.width == 1:  # there the steps of one column and of one row are the same number
        beyond[..., :2] = True
    return torch.where(beyond, anchors[..., None], around).flatten(1)


@register(
    "hiprune",
    HiPrune,
    cite=("hiprune",),
    presets={"default": {}, "released": {"edges": "clamp"}},
    reads=lambda config: ("features", "received_middle", "received_late"),
)
def select(signals: VisionSignals, keep: int, config: HiPrune, seed: int = 0) -> Selection:
    """Anchors first, then buffers, then all other tokens, each by falling attention at the late layer: the first ``keep``.

    That is anchors and buffers with the best others, and, where a budget is too small for all buffers, the best of them.
    """
    middle, late = signals.received_middle.float(), signals.received_late.float()
    anchors = ranked(middle)[:, : anchor_count(keep, config.alpha)]
    buffers = neighbours(anchors, signals.grid, config.edges)
    precedence = torch.zeros_like(late, dtype=torch.uint8).scatter_(1, buffers, 1).scatter_(1, anchors, 2)
    order = ranked(late)
    first = order.gather(1, ranked(precedence.gather(1, order)))[:, :keep]
    return keep_unmerged(signals, first.sort(dim=1).values)
