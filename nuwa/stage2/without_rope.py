"""Attention of the last prompt token without the rotary embedding.

The rotary embedding makes a query look at keys near it, so that attention ranks the bottom rows of an image, which stand
just before the question, too high. Only the criterion does without it; the model's own attention does not.

FEATHER (ICCV 2025; released code github.com/markendo/FEATHER): among the visual tokens at the layer before the cut, at
its first cut together with a regular grid of tokens. VScan (TMLR 2026, arXiv 2505.22654; released code
github.com/Tencent/SelfEvolvingAgent, ``VScan/``): on Qwen2.5-VL, over all tokens, by the projections of the layer behind
the cut. Differences from the released code of FEATHER: grids need not be square, every question of a batch is scored, and
a cut keeps a number of tokens that is the same for every question. That number holds the grid and as many of the best as
there is room for, which is their union with the best ``t`` for one ``t``, found question by question.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nuwa.layout import grid_tokens
from nuwa.stage2.projections import Projections
from nuwa.stage2.scorers import CutEvidence, privileged, register_scorer, rounded


@dataclass(frozen=True)
class Feather:
    """``stride``: of the grid's rows and columns, from the first on, in tokens."""

    stride: int = 3

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"feather.stride {self.stride} must be at least 1 token")


def among_visual(evidence: CutEvidence, rotated: bool) -> Tensor:
    """Attention of the last prompt token over visual keys alone, mean over heads, ``(questions, visual)``."""
    visual = evidence.projections("visual", rotated, False)
    asking = _last(evidence, evidence.projections("text", rotated, False))
    seen = torch.ones(len(visual.key), 1, visual.key.shape[2], dtype=torch.bool, device=visual.key.device)
    return rounded(asking.weights(visual.key, seen, torch.float64)[:, :, 0].mean(dim=1))


def _last(evidence: CutEvidence, text: Projections) -> Projections:
    """Of the text tokens' projections those of every question's last one."""
    last = evidence.text_mask.sum(dim=1).to(text.query.device) - 1
    rows = torch.arange(len(last), device=last.device)
    return replace(text, query=text.query[rows, :, last][:, :, None])


@register_scorer("attention_last_token_without_rope", reads_attention=False, cite=("feather",))
def attention_last_token_without_rope(evidence: CutEvidence) -> Tensor:
    """Attention of the last prompt token among visual tokens, mean over heads, without rotary embedding (FEATHER)."""
    return among_visual(evidence, rotated=False)


@register_scorer("attention_last_token_among_visual", reads_attention=False, cite=("feather",))
def attention_last_token_among_visual(evidence: CutEvidence) -> Tensor:
    """The same with the rotary embedding: what FEATHER's tables call FastV."""
    return among_visual(evidence, rotated=True)


@register_scorer("feather", reads_attention=False, options=Feather(), cite=("feather",))
def feather(evidence: CutEvidence, options: Feather = Feather()) -> Tensor:
    """FEATHER's first cut: tokens of a regular grid, then the others, both by attention without rotary embedding."""
    there = grid_tokens(evidence.layout, options.stride).to(evidence.slots.device)[evidence.slots]
    scores = among_visual(evidence, rotated=False)
    return privileged(scores, there.to(scores.device))


@register_scorer("attention_last_token_next_layer_without_rope", reads_attention=False, cite=("vscan",))
def attention_last_token_next_layer_without_rope(evidence: CutEvidence) -> Tensor:
    """Attention the last prompt token would pay at the layer after the cut without rotary embedding (VScan, Qwen2.5-VL).

    Over all tokens that it sees, text among them; mean over heads.
    """
    parts = [evidence.projections(tokens, False, True) for tokens in ("before", "visual", "text")]
    before, visual, text = parts
    mask = evidence.text_mask.to(text.query.device)
    standing = before.key.shape[2] + visual.key.shape[2]
    seen = torch.cat([mask.new_ones(len(mask), standing), mask], dim=1)[:, None]
    weights = _last(evidence, text).weights(torch.cat([part.key for part in parts], dim=2), seen, torch.float64)
    return rounded(weights[:, :, 0, before.key.shape[2] : standing].mean(dim=1))
