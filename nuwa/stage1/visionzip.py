"""VisionZip (CVPR 2025): dominant tokens by CLS attention, the rest merged into contextual tokens.

Dominant: the top CLS attention. Contextual: of the rest, evenly spaced targets; every other remaining token joins
the target whose keys, averaged over heads, are most similar (cosine), and a contextual token is its target plus the mean
of what joined.
Differences from the released code: the CLS token itself is not output (LLaVA's projector never sees it), all kept
tokens stand in raster order instead of contextual ones last, and ties go to the lower index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nuwa.allowed import check_share
from nuwa.selection import Selection, gather_tokens
from nuwa.signals import VisionSignals, cosine_similarity, directions, ranked
from nuwa.stage1.registry import register


@dataclass(frozen=True)
class VisionZip:
    """``contextual_share``: contextual tokens among the kept (10 of 64 in the paper)."""

    contextual_share: float = 10 / 64

    def __post_init__(self) -> None:
        check_share(f"visionzip.contextual_share {self.contextual_share}", self.contextual_share, "[0, 1)")


def contextual_count(keep: int, tokens: int, share: float) -> int:
    """Contextual tokens among ``keep``, a half rounded to the even number (2.5 of 16 are 2, 7.5 of 48 are 8).

    10 of 64, 20 of 128 and 30 of 192, as published; none where nothing is left to merge.
    """
    return 0 if keep == tokens else round(keep * share)


def joined_means(signals: VisionSignals, rest: Tensor, places: Tensor) -> Tensor:
    """Mean feature of what joins each target, ``(batch, targets, dim)`` float32; zero where nothing does.

    ``rest``: tokens that are not dominant, ``(batch, rest)``. ``places``: which of them are targets, ``(targets,)``.
    """
    keys = gather_tokens(signals.keys, rest).double().unflatten(-1, (signals.heads, -1)).mean(dim=-2)
    keys = directions(keys)
    nearest = cosine_similarity(keys, keys[:, places]).argmax(-1)  # the first of equals
    joined = torch.zeros(*nearest.shape, len(places), device=rest.device)
    joined.scatter_(2, nearest[..., None], 1.0).index_fill_(1, places, 0.0)
    sums = joined.transpose(1, 2) @ gather_tokens(signals.features, rest).float()
    return sums / joined.sum(1).clamp(min=1)[..., None]


@register(
    "visionzip",
    VisionZip,
    cite=("visionzip",),
    reads_cls=True,
    reads=lambda config: ("features", "cls_attention", "keys"),
)
def select(signals: VisionSignals, keep: int, config: VisionZip, seed: int = 0) -> Selection:
    """Pillars are the dominant tokens."""
    contextual = contextual_count(keep, signals.grid.tokens, config.contextual_share)
    order = ranked(signals.cls_attention.float())
    dominant, rest = order[:, : keep - contextual].sort(-1).values, order[:, keep - contextual :].sort(-1).values
    features = gather_tokens(signals.features, dominant)
    indices, pillars = dominant, torch.ones_like(dominant, dtype=torch.bool)
    if contextual:
        places = torch.arange(contextual, device=rest.device) * (rest.shape[1] // contextual)
        targets = rest[:, places]
        merged = gather_tokens(signals.features, targets).float() + joined_means(signals, rest, places)
        indices = torch.cat([indices, targets], dim=1)
        features = torch.cat([features, merged.to(features.dtype)], dim=1)
        pillars = torch.cat([pillars, torch.zeros_like(targets, dtype=torch.bool)], dim=1)
    indices, raster = indices.sort(dim=1)
    return Selection(indices, gather_tokens(features, raster), pillars.gather(1, raster))
