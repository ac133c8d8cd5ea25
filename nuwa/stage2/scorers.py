"""Text-guided scorers of stage 2.

A scorer maps the evidence at a cut to one score a visual token; the cut keeps the best. Attention is the ordinary
post-softmax attention of the layer before the cut (or of the layer after it, which then sees every token once more),
computed only for the query rows a scorer asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nuwa.signals import seeded_generator


@dataclass(frozen=True)
class CutEvidence:
    """What is known of ``questions`` questions at a cut; every tensor has the question as its first axis.

    ``attention(last_only)``: attention from prompt tokens after the image to the visual tokens at the layer before
    the cut, ``(questions, heads, rows, visual)``, zero at padding; one row when only the last token is asked for.
    ``next_attention(last_only)``: the same with the projections of the layer after the cut.
    ``text_mask``: which rows are prompt tokens, ``(questions, rows)`` bool.
    ``text``: embeddings of those tokens, ``(questions, rows, dim)``. ``visual``: projected visual tokens as they
    entered layer 0, ``(questions, visual, dim)``, a recycled token standing for its cluster's centre. ``entered``: all
    that entered layer 0, ``(questions, entered, dim)``. ``seed`` and ``identity`` (image and prompt of each question)
    seed what is random.
    """

    attention: Callable[[bool], Tensor]
    next_attention: Callable[[bool], Tensor]
    text_mask: Tensor
    text: Tensor
    visual: Tensor
    entered: Tensor
    seed: int
    identity: list[tuple[str, ...]]


Score = Callable[[CutEvidence], Tensor]


@dataclass(frozen=True)
class Scorer:
    """``reads_attention``: whether the layer before the cut must be looked at; ``seeded``: whether the seed matters."""

    name: str
    score: Score
    reads_attention: bool
    seeded: bool = False


def attention_last_token(evidence: CutEvidence) -> Tensor:
    """Attention of the last prompt token, mean over heads (FastV; Nüwa's released code)."""
    return evidence.attention(True)[:, :, 0].float().mean(dim=1)


def attention_last_three(evidence: CutEvidence) -> Tensor:
    """Attention of the last three prompt tokens, mean over them, then the largest of all heads (Nüwa on Qwen2.5-VL)."""
    mask = evidence.text_mask
    counts = mask.sum(dim=1, keepdim=True)
    last = mask & (torch.arange(mask.shape[1], device=mask.device) >= counts - 3)
    summed = (evidence.attention(False).float() * last[:, None, :, None]).sum(dim=2)
    return (summed / last.sum(dim=1)[:, None, None]).amax(dim=1)


def attention_all_text(evidence: CutEvidence) -> Tensor:
    """Attention of all prompt tokens after the image, mean over tokens and heads (LearnPruner)."""
    summed = evidence.attention(False).float().mean(dim=1).sum(dim=1)
    return summed / evidence.text_mask.sum(dim=1, keepdim=True)


def attention_last_token_next_layer(evidence: CutEvidence) -> Tensor:
    """Attention the last prompt token would pay at the layer after the cut, mean over heads (PyramidDrop)."""
    return evidence.next_attention(True)[:, :, 0].float().mean(dim=1)


def attention_raters(evidence: CutEvidence) -> Tensor:
    """Attention of the raters, mean over heads and raters (SparseVLM)."""
    weight = raters(evidence).float()
    attention = evidence.attention(False).float().mean(dim=1)
    return (attention * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True)


def raters(evidence: CutEvidence) -> Tensor:
    """Prompt tokens that have to do with the image, ``(questions, rows)`` bool (SparseVLM).

    Every visual token spreads one vote over the prompt by softmax of the embeddings' dot products; raters get more
    votes than the mean token. Where none does (one word, or all alike) every prompt token rates.
    """
    votes = evidence.entered.float() @ evidence.text.float().transpose(1, 2)
    votes = votes.masked_fill(~evidence.text_mask[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)
    chosen = (votes > 1 / evidence.text_mask.sum(dim=1, keepdim=True)) & evidence.text_mask
    return torch.where(chosen.any(dim=1, keepdim=True), chosen, evidence.text_mask)


def cosine_mean_text(evidence: CutEvidence) -> Tensor:
    """Cosine between the mean text embedding and each projected visual token (Nüwa, eq. 8-9)."""
    weight = evidence.text_mask[..., None].float()
    query = (evidence.text.float() * weight).sum(dim=1) / weight.sum(dim=1)
    return F.cosine_similarity(query[:, None], evidence.visual.float(), dim=-1)


def random(evidence: CutEvidence) -> Tensor:
    """Uniform scores, seeded by image and question: the control (Table 8, "random stage 2")."""
    count = evidence.visual.shape[1]
    drawn = [torch.from_numpy(seeded_generator(evidence.seed, *who).random(count)) for who in evidence.identity]
    return torch.stack(drawn).to(evidence.visual.device)


SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer("attention_last_token", attention_last_token, reads_attention=True),
        Scorer("attention_last_three", attention_last_three, reads_attention=True),
        Scorer("attention_all_text", attention_all_text, reads_attention=True),
        Scorer("attention_last_token_next_layer", attention_last_token_next_layer, reads_attention=False),
        Scorer("attention_raters", attention_raters, reads_attention=True),
        Scorer("cosine_mean_text", cosine_mean_text, reads_attention=False),
        Scorer("random", random, reads_attention=False, seeded=True),
    )
}


def get_scorer(name: str) -> Scorer:
    if name not in SCORERS:
        raise ValueError(f"stage-2 scorer {name!r} is unknown; allowed: {', '.join(SCORERS)}")
    return SCORERS[name]
