"""All tokens, untouched: the reference every retention is measured against, and stage 1 of in-LLM methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import VisionSignals
from nuwa.stage1.registry import register


@dataclass(frozen=True)
class Unpruned:
    """No hyper-parameters."""


@register("unpruned", Unpruned)
def select(signals: VisionSignals, keep: int, config: Unpruned, seed: int = 0) -> Selection:
    if keep != signals.grid.tokens:
        raise ValueError(f"unpruned keeps all {signals.grid.tokens} tokens, not {keep}")
    everything = torch.arange(keep, device=signals.features.device).expand(len(signals.image_ids), -1)
    return keep_unmerged(signals, everything)
