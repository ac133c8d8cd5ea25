"""SCOPE (NeurIPS 2025, arXiv 2510.24214): tokens that cover the image and are salient, chosen one after the other.

What a token covers of another is the cosine of their features; a set covers a token as well as its best member does. Each
step takes the token whose gain in coverage, summed over all tokens of the image and weighted by its CLS attention, is
largest. No merging. Released code: github.com/kinredon/SCOPE.

Differences from the released code: it adds up the coverage in float16, here sums are exact. On LLaVA-NeXT it prunes every
crop by itself, here the stitched local grid is one view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nuwa.allowed import check_words
from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import VisionSignals, cosine_similarity, directions
from nuwa.stage1.registry import register

Combine = Literal["multiply", "add"]


@dataclass(frozen=True)
class Scope:
    """``alpha``: exponent of the attention. ``combine``: how it joins the gain; ``add`` takes its sum over
    ``attention_heads`` instead of the mean, as the released code does there.
    """

    alpha: float = 1.0
    combine: Combine = "multiply"
    attention_heads: int = 16

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"scope.alpha {self.alpha} must be at least 0")
        check_words("scope", self, combine=Combine)
        if self.attention_heads < 1:
            raise ValueError(f"scope.attention_heads {self.attention_heads} must be at least 1")


def salience(attention: Tensor, config: Scope) -> Tensor:
    """What joins the gain of every token, ``(batch, tokens)`` float64."""
    heads = config.attention_heads if config.combine == "add" else 1
    return (attention.double() * heads) ** config.alpha


@register(
    "scope",
    Scope,
    cite=("scope",),
    presets={"released": {}},
    reads_cls=True,
    reads=lambda config: ("features", "cls_attention"),
)
def select(signals: VisionSignals, keep: int, config: Scope, seed: int = 0) -> Selection:
    """``keep`` steps of ``tokens x tokens`` work; the equation needs the similarity of all pairs.

    Similarities are multiples of 2⁻²⁴ and coverage is never negative, so what a similarity adds is exact in float32 and
    its sum in float64: equal gains are equal, and ties go to the lower index.
    """
    unit = directions(signals.compared(signals.features))
    similarity = cosine_similarity(unit, unit)
    weight = salience(signals.cls_attention, config)
    covered = torch.zeros(similarity.shape[0], 1, similarity.shape[2], device=similarity.device)
    taken = torch.zeros_like(weight, dtype=torch.bool)
    gained, chosen = torch.empty_like(similarity), []

    for _ in range(keep):
        torch.sub(similarity, covered, out=gained).clamp_(
            min=0
        )  # similarity is symmetric: a token's gains lie in its row
        gain = gained.sum(dim=2, dtype=torch.float64)
        score = gain * weight if config.combine == "multiply" else gain + weight
        best = score.masked_fill_(taken, -torch.inf).argmax(dim=1, keepdim=True)
        taken.scatter_(1, best, True)
        row = similarity.gather(1, best[..., None].expand(-1, -1, similarity.shape[2]))
        covered = torch.maximum(covered, row)
        chosen.append(best)
    return keep_unmerged(signals, torch.cat(chosen, dim=1).sort(dim=1).values)
