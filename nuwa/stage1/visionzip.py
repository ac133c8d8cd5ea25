"""VisionZip (CVPR 2025): dominant tokens by CLS attention, the rest merged into contextual tokens.

Dominant: the top CLS attention. Contextual: of the rest, evenly spaced targets; every other remaining token joins
the target whose keys are most similar (cosine), and a contextual token is its target plus the mean of what joined.
Differences from the released code: the CLS token itself is not output (LLaVA's projector never sees it), and all
kept tokens stand in raster order instead of contextual ones last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nuwa.selection import Selection, gather_tokens
from nuwa.signals import VisionSignals, ranked
from nuwa.stage1.registry import register


@dataclass(frozen=True)
class VisionZip:
    """``contextual_share``: contextual tokens among the kept (10 of 64 in the paper)."""

    contextual_share: float = 10 / 64

    def __post_init__(self) -> None:
        if not 0 <= self.contextual_share < 1:
            raise ValueError(f"visionzip.contextual_share {self.contextual_share} must lie in [0, 1)")


@register("visionzip", VisionZip, reads_cls=True)
def select(signals: VisionSignals, keep: int, config: VisionZip, seed: int = 0) -> Selection:
    batch, tokens, _ = signals.features.shape
    device = signals.features.device
    contextual = 0 if keep == tokens else round(keep * config.contextual_share)
    dominant = keep - contextual
    order = ranked(signals.cls_attention.float())
    chosen, rest = order[:, :dominant].sort(-1).values, order[:, dominant:].sort(-1).values
    features = gather_tokens(signals.features, chosen)
    indices, pillars = chosen, torch.ones_like(chosen, dtype=torch.bool)
    if contextual:
        spaced = torch.arange(contextual, device=device) * (rest.shape[1] // contextual)
        targets = rest[:, spaced]
        is_target = torch.zeros_like(rest, dtype=torch.bool)
        is_target[:, spaced] = True
        others = rest[~is_target].view(batch, -1)
        keys = F.normalize(signals.keys.float(), dim=-1)
        similarity = gather_tokens(keys, others) @ gather_tokens(keys, targets).transpose(1, 2)
        joined = F.one_hot(similarity.argmax(-1), contextual).float()
        sums = joined.transpose(1, 2) @ gather_tokens(signals.features, others).float()
        means = sums / joined.sum(1).clamp(min=1)[..., None]
        indices = torch.cat([indices, targets], dim=1)
        merged = gather_tokens(signals.features, targets) + means.to(features.dtype)
        features = torch.cat([features, merged], dim=1)
        pillars = torch.cat([pillars, torch.zeros_like(targets, dtype=torch.bool)], dim=1)
    indices, raster = indices.sort(dim=1)
    return Selection(indices, gather_tokens(features, raster), pillars.gather(1, raster))
