"""DivPrune (CVPR 2025): the tokens that differ most from one another, as a max-min diversity problem.

The greedy solution of the paper's Algorithm 1, with distance ``1 - cos`` of the features. First the token farthest from
its nearest neighbour; then, again and again, the token farthest from its nearest chosen one. No attention, no merging.

Differences from the released code: no token is chosen twice (it repeats tokens once distinct ones run out), ties go to
the lower index, and the features are those the projector consumes, not what it makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nuwa.selection import Selection, gather_tokens, keep_unmerged
from nuwa.signals import VisionSignals, cosine_similarity, directions
from nuwa.stage1.registry import register

SMALLEST_SLAB = 128  # tokens compared with all others at once, however few are kept


@dataclass(frozen=True)
class DivPrune:
    """No hyper-parameters."""


def nearest_similarity(unit: Tensor, slab: int) -> Tensor:
    """Largest similarity of every token to any other, ``(batch, tokens)`` float32; -inf where there is no other.

    Every pair has to be looked at once, but only ``slab x tokens`` similarities exist at a time.
    """
    found = []
    for start in range(0, unit.shape[1], slab):
        similarity = cosine_similarity(unit[:, start : start + slab], unit)
        similarity.diagonal(start, dim1=1, dim2=2).fill_(-torch.inf)
        found.append(similarity.amax(dim=2))
    return torch.cat(found, dim=1)


@register("divprune", DivPrune)
def select(signals: VisionSignals, keep: int, config: DivPrune, seed: int = 0) -> Selection:
    """Each of the ``keep`` steps compares one token an image with all others: ``keep x tokens`` work, all images at once.

    The least similar is the most distant; ``argmin`` takes the first of equals.
    """
    unit = directions(signals.features)
    chosen = [nearest_similarity(unit, max(keep, SMALLEST_SLAB)).argmin(dim=1, keepdim=True)]
    closest = torch.full(unit.shape[:2], -torch.inf, device=unit.device)
    for _ in range(keep - 1):
        similarity = cosine_similarity(gather_tokens(unit, chosen[-1]), unit)[:, 0]
        closest = torch.maximum(closest, similarity).scatter_(1, chosen[-1], torch.inf)
        chosen.append(closest.argmin(dim=1, keepdim=True))
    return keep_unmerged(signals, torch.cat(chosen, dim=1).sort(dim=1).values)
