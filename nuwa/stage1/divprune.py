"""DivPrune (CVPR 2025): the tokens that differ most from one another, as a max-min diversity problem.

The greedy solution of the paper's Algorithm 1, with distance ``1 - cos`` of the features. First the token farthest from
its nearest neighbour; then, again and again, the token farthest from its nearest chosen one. No attention, no merging.

Differences from the released code: no token is chosen twice (it repeats tokens once distinct ones run out), ties go to
the lower index, and the features are those the projector consumes, not what it makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nuwa.selection import Selection, gather_tokens, keep_unmerged
from nuwa.signals import VisionSignals, cosine_similarity, directions, products_of_pairs, rounded
from nuwa.stage1.registry import register

SMALLEST_SLAB = 128  # tokens compared with all others at once, however few are kept


@dataclass(frozen=True)
class DivPrune:
    """No hyper-parameters."""


@register("divprune", DivPrune, cite=("divprune",))
def select(signals: VisionSignals, keep: int, config: DivPrune, seed: int = 0) -> Selection:
    """The least similar is the most distant; of equals the first is taken."""
    features = signals.compared(signals.features)
    # Elsewhere products may be off by more, and which ones have to be made exactly would have to be asked of the device.
    if features.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest":
        chosen = torch.tensor([one_by_one(directions(image), keep) for image in features])
    else:
        chosen = together(directions(features), keep)
    return keep_unmerged(signals, chosen.sort(dim=1).values)


def together(unit: Tensor, keep: int) -> Tensor:
    """The ``keep`` tokens of all images at once, ``(batch, keep)``.

    Each step compares one token an image with all others: ``keep x tokens`` work, but for the first token.
    """
    tokens = torch.arange(unit.shape[1], device=unit.device).expand(len(unit), -1)
    slabs = tokens.split(max(keep, SMALLEST_SLAB), dim=1)
    chosen = [torch.cat([nearest_similarity(unit, slab) for slab in slabs], dim=1).argmin(dim=1, keepdim=True)]
    closest = torch.full(unit.shape[:2], -torch.inf, device=unit.device)
    for _ in range(keep - 1):
        similarity = cosine_similarity(gather_tokens(unit, chosen[-1]), unit)[:, 0]
        closest = torch.maximum(closest, similarity).scatter_(1, chosen[-1], torch.inf)
        chosen.append(closest.argmin(dim=1, keepdim=True))
    return torch.cat(chosen, dim=1)


def nearest_similarity(unit: Tensor, rows: Tensor) -> Tensor:
    """Largest similarity of the tokens ``rows`` ``(batch, rows)`` to any other token, ``(batch, rows)``.

    -inf where there is no other.
    """
    similarity = cosine_similarity(gather_tokens(unit, rows), unit)
    return similarity.scatter_(2, rows[..., None], -torch.inf).amax(dim=2)


def one_by_one(unit: Tensor, keep: int) -> list[int]:
    """The tokens of one image ``(tokens, dim)`` in the order that they are chosen.

    Products of unit vectors in float32 are off by less than ``(dim + 8) / 2²⁴``. So the least of exact similarities is
    among those whose rough one lies within twice that of the least, mostly one; only these are made exactly.
    """
    dim = unit.shape[1]
    rough = products_of_pairs(unit.float()).fill_diagonal_(-torch.inf)
    margin = 2 * (dim + 8) * 2**-24
    nearest = rough.amax(dim=1)
    close = (nearest <= nearest.min() + margin).nonzero()[:, 0]
    if len(close) > 1:
        exact = [nearest_similarity(unit[None], slab[None])[0] for slab in close.split(max(keep, SMALLEST_SLAB))]
        close = close[torch.cat(exact).argmin()]

    known = Known(unit, rough.numpy(), margin)
    known.add(int(close))
    for _ in range(1, keep):
        low = (known.closest <= known.closest.min() + margin).nonzero()[0]
        known.add(int(low[0]) if len(low) == 1 else known.farthest(low))
    return known.chosen


class Known:
    """What is known of one image's tokens and the chosen ones: roughly of all, exactly of those that were asked about.

    ``unit`` ``(tokens, dim)``; ``rough`` ``(tokens, tokens)`` similarities, of which two within ``margin`` may be equal.
    """

    def __init__(self, unit: Tensor, rough: NDArray[np.float32], margin: float) -> None:
        self.unit, self.rough, self.margin = unit.numpy(), rough, margin
        self.chosen: list[int] = []
        self.closest = np.full(len(unit), -np.inf, np.float32)  # rough similarity to the nearest chosen token
        self.nearest = self.closest.copy()  # the exact one, to the nearest of the first ``compared``
        self.compared = np.zeros(len(unit), np.int64)

    def add(self, token: int) -> None:
        self.chosen.append(token)
        np.maximum(self.closest, self.rough[token], out=self.closest)
        self.closest[token] = np.inf

    def farthest(self, tokens: NDArray[np.int64]) -> int:
        """Of ascending ``tokens`` the one that is least similar to its nearest chosen one, the first of equals."""
        added = np.array(self.chosen[self.compared[tokens].min() :])
        # The nearest is among those that are as near as the nearest, roughly: one or two.
        near = self.rough[tokens[:, None], added] >= self.closest[tokens, None] - self.margin
        added = added[near.any(axis=0)]
        if len(added):
            similarity = rounded(torch.from_numpy(self.unit[tokens] @ self.unit[added].T))
            self.nearest[tokens] = np.maximum(self.nearest[tokens], similarity.numpy().max(axis=1))
        self.compared[tokens] = len(self.chosen)
        return int(tokens[self.nearest[tokens].argmin()])
