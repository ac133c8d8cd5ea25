"""DivPrune (CVPR 2025): the tokens that differ most from one another, as a max-min diversity problem.

The greedy solution of the paper's Algorithm 1, with distance ``1 - cos`` of the features. First the token farthest from
its nearest neighbour; then, again and again, the token farthest from its nearest chosen one. No attention, no merging.

Differences from the released code: no token is chosen twice (it repeats tokens once distinct ones run out), ties go to
the lower index, and the features are those the projector consumes, not what it makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nuwa.selection import Selection, gather_tokens, keep_unmerged
from nuwa.signals import NORM_EPSILON, VisionSignals, cosine_similarity, directions, products_of_pairs
from nuwa.stage1.registry import register

SPAN = 512  # channels whose products are summed in float32 before they join the others'
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
        chosen = torch.tensor([one_by_one(image, keep) for image in features.float()])
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


def one_by_one(image: Tensor, keep: int) -> list[int]:
    """The tokens of one image ``(tokens, dim)`` in the order that they are chosen.

    Products of unit vectors in float32, :data:`SPAN` channels at a time, are off by less than ``(SPAN + dim / SPAN + 8) /
    2²⁴``. So the least of exact similarities is among those whose rough one lies within twice that of the least, mostly
    one; only these are made exactly.
    """
    dim = image.shape[1]
    length = torch.linalg.vector_norm(image, dim=1, keepdim=True, dtype=torch.float64).clamp_(min=NORM_EPSILON)
    rough = products_of_pairs(image / length.float(), SPAN).fill_diagonal_(-torch.inf)
    margin = 2 * (min(dim, SPAN) + dim // SPAN + 8) * 2**-24
    nearest = rough.amax(dim=1)
    close = (nearest <= nearest.min() + margin).nonzero()[:, 0]
    if len(close) > 1:
        unit = directions(image)[None]
        exact = [nearest_similarity(unit, slab[None])[0] for slab in close.split(max(keep, SMALLEST_SLAB))]
        close = close[torch.cat(exact).argmin()]

    known = Known(image.numpy(), length.numpy(), rough.numpy(), margin)
    known.add(int(close))
    for _ in range(1, keep):
        low = (known.closest <= known.closest.min() + margin).nonzero()[0]
        known.add(int(low[0]) if len(low) == 1 else known.farthest(low))
    return known.chosen


class Known:
    """What is known of one image's tokens and the chosen ones: roughly of all, exactly of those that were asked about.

    ``image`` ``(tokens, dim)`` with the tokens' lengths ``(tokens, 1)``; ``rough`` ``(tokens, tokens)`` similarities, of
    which two within ``margin`` may be equal.
    """

    def __init__(
        self, image: NDArray[Any], length: NDArray[np.float64], rough: NDArray[np.float32], margin: float
    ) -> None:
        self.image, self.length, self.rough, self.margin = image, length, rough, margin
        self.chosen: list[int] = []
        self.closest = np.full(len(image), -np.inf, np.float32)  # rough similarity to the nearest chosen token
        self.nearest = self.closest.copy()  # the exact one, to the nearest of the first ``compared``
        self.compared = np.zeros(len(image), np.int64)

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
            # As directions() and rounded() have it, without what a tensor costs at this size.
            similarity = (self.image[tokens] / self.length[tokens]) @ (self.image[added] / self.length[added]).T
            exact = (np.rint(similarity * 2**24) * 2**-24).astype(np.float32)
            self.nearest[tokens] = np.maximum(self.nearest[tokens], exact.max(axis=1))
        self.compared[tokens] = len(self.chosen)
        return int(tokens[self.nearest[tokens].argmin()])
