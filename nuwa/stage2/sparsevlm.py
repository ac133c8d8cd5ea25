"""SparseVLM, version 2 (released code: github.com/Gumpest/SparseVLMs): raters' attention, corrected for distance.

As version 1, attention of the raters; but an attention is divided by what the rotary embedding alone makes of its
distance, and only the heads that look most at the image count. Nothing is recycled and ids stay original.

Differences from the released code: the number of heads is a parameter and at most the heads there are; the rotary factor
follows the model's own frequencies, axis by axis of its position ids; and where it falls below ``floor`` it is taken for
``floor``: beyond a distance of about 1,700 (base 10⁴, 128 dimensions) it is negative, which would reverse the order of far
tokens. The distance is that of the position ids which tokens carry: the original ones under PESP, the method's own strategy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nuwa.allowed import check_share
from nuwa.stage2.scorers import CutEvidence, raters, register_scorer, rounded


@dataclass(frozen=True)
class PriorityHeads:
    """``priority_heads``: how many heads count, 14 of LLaVA-1.5's 32. ``floor``: the least rotary factor divided by."""

    priority_heads: int = 14
    floor: float = 0.05

    def __post_init__(self) -> None:
        if self.priority_heads < 1:
            raise ValueError(f"attention_raters_by_distance.priority_heads {self.priority_heads} must be at least 1")
        check_share(f"attention_raters_by_distance.floor {self.floor:g}", self.floor, "(0, 1]")


@register_scorer("attention_raters_by_distance", reads_attention=True, options=PriorityHeads(), cite=("sparsevlm",))
def attention_raters_by_distance(evidence: CutEvidence, options: PriorityHeads = PriorityHeads()) -> Tensor:
    """Attention of the raters over its rotary factor, mean over the priority heads and raters (SparseVLM, version 2)."""
    weight = raters(evidence).float()
    attention = evidence.attention(False).double()
    factor = rotary_factor(evidence).clamp(min=options.floor).to(attention.device)
    attention = attention / factor[:, None] * weight[:, None, :, None].to(attention.device)

    looks = rounded(attention.sum(dim=(2, 3)))  # (questions, heads)
    chosen = looks.sort(dim=1, descending=True, stable=True).indices[:, : options.priority_heads]
    scores = attention.sum(dim=2).gather(1, chosen[..., None].expand(-1, -1, attention.shape[3]))
    return rounded(scores.mean(dim=1) / weight.sum(dim=1, keepdim=True).to(scores.device))


def rotary_factor(evidence: CutEvidence) -> Tensor:
    """What the rotary embedding makes of two equal vectors, ``(questions, text, visual)``: the mean of ``cos(Δ θ_i)``."""
    text, visual = (torch.cat(evidence.rotary(tokens), dim=-1).double() for tokens in ("text", "visual"))
    text, visual = (table / table.norm(dim=-1, keepdim=True) for table in (text, visual))  # some scale attention, too
    return text @ visual.transpose(1, 2)
