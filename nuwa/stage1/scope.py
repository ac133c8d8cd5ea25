"""SCOPE (NeurIPS 2025, arXiv 2510.24214): tokens that cover the image and are salient, chosen one after the other.

What a token covers of another is the cosine of their features; a set covers a token as well as its best member does. Each
step takes the token whose gain in coverage, summed over all tokens of the image and weighted by its CLS attention, is
largest. No merging. Released code: github.com/kinredon/SCOPE.

Differences from the released code: it adds up the coverage in float16, here sums are exact. On LLaVA-NeXT it prunes every
crop by itself, here the stitched local grid is one view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nuwa.allowed import check_words
from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import VisionSignals, cosine_similarity, directions, products_of_pairs, rounded
from nuwa.stage1.registry import register

Combine = Literal["multiply", "add"]
AT_ONCE = 16  # gains brought up to date at a time


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
    """``keep`` steps; the equation needs the similarity of all pairs.

    Similarities are multiples of 2⁻²⁴ and coverage is never negative, so what a similarity adds is exact in float32 and
    its sum in float64: equal gains are equal, and ties go to the lower index.
    """
    compared, weight = signals.compared(signals.features), salience(signals.cls_attention, config)
    if weight.device.type != "cpu":  # which gains are out of date would have to be asked of the device
        return keep_unmerged(signals, together(directions(compared), weight, keep, config).sort(dim=1).values)
    chosen = []
    for features, own in zip(compared, weight, strict=True):
        similarity = rounded(products_of_pairs(directions(features)))
        chosen.append(lazily(similarity.numpy(), own.numpy(), keep, config))
    return keep_unmerged(signals, torch.tensor(chosen).sort(dim=1).values)


def together(unit: Tensor, weight: Tensor, keep: int, config: Scope) -> Tensor:
    """The ``keep`` tokens that :func:`lazily` takes, of all images at once and every gain anew, ``(batch, keep)``."""
    similarity = cosine_similarity(unit, unit)
    covered = torch.zeros(similarity.shape[0], 1, similarity.shape[2], device=similarity.device)
    taken = torch.zeros_like(weight, dtype=torch.bool)
    gained, chosen = torch.empty_like(similarity), []

    for _ in range(keep):
        # Similarity is symmetric: a token's gains lie in its row.
        torch.sub(similarity, covered, out=gained).clamp_(min=0)
        gain = gained.sum(dim=2, dtype=torch.float64)
        score = gain * weight if config.combine == "multiply" else gain + weight
        best = score.masked_fill_(taken, -torch.inf).argmax(dim=1, keepdim=True)
        taken.scatter_(1, best, True)
        row = similarity.gather(1, best[..., None].expand(-1, -1, similarity.shape[2]))
        covered = torch.maximum(covered, row)
        chosen.append(best)
    return torch.cat(chosen, dim=1)


def lazily(similarity: NDArray[np.float32], weight: NDArray[np.float64], keep: int, config: Scope) -> list[int]:
    """Tokens of one image in the order they are chosen; ``similarity`` ``(tokens, tokens)``, ``weight`` ``(tokens,)``.

    Coverage only grows, so a gain only falls, and a score of an earlier step is a bound of today's (Minoux 1978; rounding
    keeps the order). The largest bound is brought up to date, with the few behind it, until the largest is of today:
    no other can be larger, nor equal and of a lower index.
    """

    def scores(rows: Any) -> NDArray[np.float64]:
        gain = np.maximum(similarity[rows] - covered, 0).sum(axis=1, dtype=np.float64)
        return gain * weight[rows] if config.combine == "multiply" else gain + weight[rows]

    covered = np.zeros(len(weight), np.float32)
    bound, of_step = scores(slice(None)), np.zeros(len(weight), np.int64)
    few = min(AT_ONCE, len(weight))
    chosen: list[int] = []
    for step in range(keep):
        while of_step[best := int(bound.argmax())] != step:
            # Where many are equal the partition may leave the best one out, which would then stay out of date.
            first = np.append(np.argpartition(bound, -few)[-few:], best)
            stale = first[(of_step[first] != step) & (bound[first] > -np.inf)]
            bound[stale], of_step[stale] = scores(stale), step

        chosen.append(best)
        bound[best] = -np.inf
        np.maximum(covered, similarity[best], out=covered)
    return chosen
