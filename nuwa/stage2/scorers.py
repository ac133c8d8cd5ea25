"""Text-guided scorers of stage 2.

A scorer maps the evidence at a cut to one score a visual token; the cut keeps the best. Attention is the ordinary
post-softmax attention of the layer before the cut (or of the layer after it, which then sees every token once more),
computed only for the query rows a scorer asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nuwa.layout import VisualLayout
from nuwa.registry import Registry
from nuwa.signals import Declared, ranked, seeded_generator
from nuwa.stage2.projections import Projections

Tokens = Literal["before", "visual", "text"]


@dataclass(frozen=True, kw_only=True)
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

    What a cut's layer shows beside attention; null only where evidence is made by hand. ``projections(tokens, rotated,
    ahead)``: queries, keys and values, as the model's own attention module makes them, of ``"before"`` (the tokens before
    the image, and those between several), ``"visual"`` or ``"text"`` (as many tokens as ``text_mask`` has rows, anything at
    padding), with the rotary embedding or without it, at the layer before the cut or the one ``ahead``. ``states``: hidden
    states of the visual tokens entering the layer behind the cut, ``(questions, visual, dim)``; ``normed(tokens)``: those of
    visual or text tokens through the language model's final norm. ``positions``: position ids, ``(axes, questions, visual)``.
    ``rotary(tokens)``: cosines and sines that rotate visual or text tokens at the layer before the cut, ``(questions,
    tokens, rotated dim)``; ``rotary_by_axis()``: those of the visual tokens by every axis of position ids on its own,
    ``(axes, questions, visual, rotated dim)``. ``slots``: places of the visual tokens in the unpruned image, ``(questions,
    visual)``, of ``layout``. ``keep``: how many of them go on, for scorers that choose a set (``Scorer.by_keep``).
    """

    attention: Callable[[bool], Tensor]
    next_attention: Callable[[bool], Tensor]
    text_mask: Tensor
    text: Tensor
    visual: Tensor
    entered: Tensor
    seed: int
    identity: list[tuple[str, ...]]
    projections: Callable[[Tokens, bool, bool], Projections] | Any = None
    states: Declared = None
    normed: Callable[[Literal["text", "visual"]], Tensor] | Any = None
    positions: Declared = None
    rotary: Callable[[Literal["text", "visual"]], tuple[Tensor, Tensor]] | Any = None
    rotary_by_axis: Callable[[], tuple[Tensor, Tensor]] | Any = None
    slots: Declared = None
    layout: VisualLayout | Any = None
    keep: int | Any = None


Score = Callable[..., Tensor]


@dataclass(frozen=True)
class Scorer:
    """``score(evidence)``, or ``score(evidence, options)`` where there are any, gives scores ``(questions, visual)``.

    ``reads_attention``: whether the attention of the layer before the cut is looked at; ``seeded``: whether the seed
    matters. ``options``: hyper-parameters, a frozen dataclass; null: none. ``by_keep``: the best tokens are a set that
    depends on how many go on, so that scores are made for one ``evidence.keep``. ``kept``: how many really go on when
    ``keep`` of ``tokens`` are asked for, ``kept(tokens, keep, options)``. ``cite``: keys of docs/references.bib.
    """

    name: str
    score: Score
    reads_attention: bool
    seeded: bool = False
    options: Any = None
    by_keep: bool = False
    kept: Callable[[int, int, Any], int] = field(
        default=lambda tokens, keep, options: keep, metadata={"identity": False}
    )
    cite: tuple[str, ...] = field(default=(), metadata={"identity": False})

    def scores(self, evidence: CutEvidence) -> Tensor:
        return self.score(evidence) if self.options is None else self.score(evidence, self.options)

    @property
    def parameters(self) -> dict[str, Any]:
        """Hyper-parameters by name."""
        return (
            {}
            if self.options is None
            else {item.name: getattr(self.options, item.name) for item in fields(self.options)}
        )


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


def none(evidence: CutEvidence) -> Tensor:
    """All tokens alike: for cuts that keep none (VTW); of others the first in raster order go on."""
    return torch.zeros(evidence.visual.shape[:2], device=evidence.visual.device)


def rounded(scores: Tensor) -> Tensor:
    """Scores that were computed in float64, to multiples of 2⁻⁴⁰: whatever the order of summation, equal ones are equal."""
    return scores.mul(2**40).round().mul(2**-40)


def privileged(scores: Tensor, flags: Tensor) -> Tensor:
    """Scores that order flagged tokens before all others, and within both as ``scores`` do; all ``(questions, visual)``."""
    count = scores.shape[1]
    falling = torch.arange(count, 0, -1, device=scores.device, dtype=torch.float32).expand_as(scores)
    return torch.zeros_like(falling).scatter(1, ranked(scores), falling) + count * flags


SCORERS: Registry[Scorer] = Registry("stage-2 scorer")


def register_scorer(name: str, **properties: Any) -> Callable[[Score], Score]:
    """Decorator that makes a score known as ``name``; ``properties`` are fields of :class:`Scorer`."""

    def add(score: Score) -> Score:
        SCORERS.add(name, Scorer(name, score, **properties))
        return score

    return add


for _scorer in (
    Scorer("attention_last_token", attention_last_token, reads_attention=True, cite=("fastv",)),
    Scorer("attention_last_three", attention_last_three, reads_attention=True, cite=("nuwa",)),
    Scorer("attention_all_text", attention_all_text, reads_attention=True, cite=("learnpruner",)),
    Scorer(
        "attention_last_token_next_layer", attention_last_token_next_layer, reads_attention=False, cite=("pyramiddrop",)
    ),
    Scorer("attention_raters", attention_raters, reads_attention=True, cite=("sparsevlm",)),
    Scorer("cosine_mean_text", cosine_mean_text, reads_attention=False, cite=("nuwa",)),
    Scorer("random", random, reads_attention=False, seeded=True),
    Scorer("none", none, reads_attention=False, cite=("vtw",)),
):
    SCORERS.add(_scorer.name, _scorer)


def get_scorer(name: str) -> Scorer:
    return SCORERS.look_up(name)
