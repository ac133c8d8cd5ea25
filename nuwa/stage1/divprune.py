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


def nearest_similarity(unit: Tensor, rows: Tensor, slab: int) -> Tensor:
    """Largest similarity of the tokens ``rows`` ``(batch, rows)`` to any other token, ``(batch, rows)`` float32.

    -inf where there is no other. Only ``slab x tokens`` similarities exist at a time. In float32 they are plain products.
    """
    nearest = []
    for part in rows.split(slab, dim=1):
        chosen = gather_tokens(unit, part)
        exact = unit.dtype == torch.float64
        similarity = cosine_similarity(chosen, unit) if exact else chosen @ unit.transpose(1, 2)
        nearest.append(similarity.scatter_(2, part[..., None], -torch.inf).amax(dim=2))
    return torch.cat(nearest, dim=1)


def first_token(unit: Tensor, slab: int) -> Tensor:
    """The token farthest from its nearest neighbour, the first of equals, ``(batch, 1)``.

    All pairs have to be looked at, which in float64 takes half of the method's time. Products of unit vectors in float32
    are off by less than ``(dim + 8) / 2^24``, so on a CPU only tokens within twice that of the least are compared exactly;
    how many these are is no question for an accelerator, which would have to wait for the answer.
    """
    batch, tokens, dim = unit.shape
    everything = torch.arange(tokens, device=unit.device).expand(batch, -1)
    if unit.device.type != "cpu" or torch.get_float32_matmul_precision() != "highest":  # else products are off by more
        return nearest_similarity(unit, everything, slab).argmin(dim=1, keepdim=True)
    rough = nearest_similarity(unit.float(), everything, slab)

    margin = 2 * (dim + 8) * 2**-24
    rising = rough.sort(dim=1)
    close = int((rising.values <= rising.values[:, :1] + margin).sum(dim=1).max())
    rows = rising.indices[:, :close]
    exact = torch.full_like(rough, torch.inf).scatter_(1, rows, nearest_similarity(unit, rows, slab))
    return exact.argmin(dim=1, keepdim=True)


@register("divprune", DivPrune, cite=("divprune",))
def select(signals: VisionSignals, keep: int, config: DivPrune, seed: int = 0) -> Selection:
    """Each of the ``keep`` steps compares one token an image with all others: ``keep x tokens`` work, all images at once.

    The least similar is the most distant; ``argmin`` takes the first of equals.
    """
    unit = directions(signals.compared(signals.features))
    chosen = [first_token(unit, max(keep, SMALLEST_SLAB))]
    closest = torch.full(unit.shape[:2], -torch.inf, device=unit.device)
    for _ in range(keep - 1):
        similarity = cosine_similarity(gather_tokens(unit, chosen[-1]), unit)[:, 0]
        closest = torch.maximum(closest, similarity).scatter_(1, chosen[-1], torch.inf)
        chosen.append(closest.argmin(dim=1, keepdim=True))
    return keep_unmerged(signals, torch.cat(chosen, dim=1).sort(dim=1).values)
