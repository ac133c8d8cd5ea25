"""IVC-Prune (ICLR 2026; released code: github.com/FireRedTeam/IVC-Prune): coordinates and foreground.

Some position ids are turned by the rotary embedding by nearly 0° or 90°: tokens that stand there are a model's *implicit
visual coordinates*, and are kept whatever they show. Beside them the foreground is kept: tokens whose values are like
the question's, and like a few seeds that are most like it. Values carry no position.

What is kept is one selection for all layers: generated tokens see it in the layers below the cut, too (``Cut.trims``).
Differences from the released code: seeds and coordinates are filled up in order of the foreground to the number that a
cut keeps, as released for Qwen2.5-VL; of LLaVA-1.5's union of seeds, coordinates and the best fifth that is the same set
where the numbers agree. The image begins where it begins. All questions of a batch are scored, ties go to the lower slot.
On InternVL3 the tokens of all tiles are ranked together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nuwa.allowed import check_share, check_words
from nuwa.signals import top_indices
from nuwa.stage2.scorers import CutEvidence, Scorer, privileged, register_scorer, rounded

Among = Literal["all", "visual"]


@dataclass(frozen=True)
class IvcPrune:
    """Hyper-parameters.

    ``coordinate_share``: of the visual tokens, kept for the cosine and again for the sine; ``seed_share``: kept because
    they are most like the question; one seed at least. ``affinity``: whether softmax runs over ``all`` tokens or over the
    ``visual`` ones. ``skipped``: tokens behind the image that do not count as question.
    """

    coordinate_share: float = 0.05
    seed_share: float = 0.01
    affinity: Among = "all"
    skipped: int = 2

    def __post_init__(self) -> None:
        check_share(f"ivc_prune.coordinate_share {self.coordinate_share:g}", self.coordinate_share)
        check_share(f"ivc_prune.seed_share {self.seed_share:g}", self.seed_share)
        check_words("ivc_prune", self, affinity=Among)
        if self.skipped < 0:
            raise ValueError(f"ivc_prune.skipped {self.skipped} must be at least 0 tokens")


@register_scorer("ivc_prune", reads_attention=False, options=IvcPrune(), cite=("ivcprune",))
def ivc_prune(evidence: CutEvidence, options: IvcPrune = IvcPrune()) -> Tensor:
    """Seeds, then coordinates, then the foreground, each by likeness to question and seeds (IVC-Prune)."""
    values = {name: evidence.projections(name, False, False).value for name in ("before", "visual", "text")}
    asking = _question(evidence, options.skipped).to(values["text"].device)[..., None]
    by_question = (_affinity(evidence, values["text"], values, options.affinity) * asking).sum(dim=1)

    count, questions = by_question.shape[1], asking.sum(dim=1)
    seeds = top_indices(rounded(by_question / questions), min(count, max(1, round(options.seed_share * count))))
    rows = torch.arange(len(seeds), device=seeds.device)[:, None]
    seed_values = values["visual"].transpose(1, 2)[rows, seeds].transpose(1, 2)
    by_seeds = _affinity(evidence, seed_values, values, options.affinity).sum(dim=1)
    foreground = rounded((by_question + by_seeds) / (questions + seeds.shape[1]))

    own = torch.zeros_like(foreground, dtype=torch.bool).scatter_(1, seeds, True)
    cos, sin = evidence.rotary_by_axis()
    coordinates = coordinate_flags(cos, sin, options.coordinate_share).to(foreground.device)
    return privileged(privileged(foreground, coordinates), own)


def _question(evidence: CutEvidence, skipped: int) -> Tensor:
    """Prompt tokens that count, ``(questions, text)`` bool: all but the first ones; the last where none would."""
    mask = evidence.text_mask
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    first = (mask.sum(dim=1, keepdim=True) - 1).clamp(max=skipped)
    return mask & (place >= first)


def _affinity(evidence: CutEvidence, asking: Tensor, values: Mapping[str, Tensor], among: Among) -> Tensor:
    """``softmax(v vᵀ / √d)`` of every key head, mean over heads, no causal mask: ``(questions, asking, visual)`` float64.

    ``asking`` ``(questions, kv_heads, asking, head_dim)``: values of the tokens whose rows are wanted; ``values``: of all.
    """
    visual = values["visual"]
    others = torch.cat([values["before"], visual, values["text"]], dim=2) if among == "all" else visual
    start = values["before"].shape[2] if among == "all" else 0
    behind = start + visual.shape[2]
    logits = asking.double() @ others.double().transpose(2, 3) / asking.shape[-1] ** 0.5
    if among == "all":
        padding = ~evidence.text_mask.to(logits.device)[:, None, None]
        logits[..., behind:].masked_fill_(padding, -torch.inf)
    return logits.softmax(dim=-1)[..., start:behind].mean(dim=1)


def coordinate_flags(cos: Tensor, sin: Tensor, share: float) -> Tensor:
    """Implicit visual coordinates among tokens, ``(questions, tokens)`` bool.

    ``cos``, ``sin`` ``(axes, questions, tokens, dim)``: of all rotary angles of a token's position ids. The tokens of the
    greatest mean cosine and those of the greatest mean sine, ``round(share * tokens)`` each. Means are rounded, so that
    tokens whose ids are the same numbers on other axes are equal, and the lower one is first.
    """
    keep = round(share * cos.shape[2])
    flags = torch.zeros(cos.shape[1:3], dtype=torch.bool, device=cos.device)
    for table in (cos, sin):
        mean = table.double().mean(dim=(0, 3)).mul(2**24).round()
        flags.scatter_(1, top_indices(mean, keep), True)
    return flags


def with_coordinates(scorer: Scorer, share: float) -> Scorer:
    """The scorer of a method with which implicit visual coordinates are kept before all other tokens."""
    return Scorer(
        f"{scorer.name} and coordinates",
        _united,
        reads_attention=scorer.reads_attention,
        seeded=scorer.seeded,
        options=CoordinateUnion(scorer, share),
        by_keep=scorer.by_keep,
        kept=scorer.kept,
    )


@dataclass(frozen=True)
class CoordinateUnion:
    scorer: Scorer
    share: float


def _united(evidence: CutEvidence, union: CoordinateUnion) -> Tensor:
    scores = union.scorer.scores(evidence)
    cos, sin = evidence.rotary_by_axis()
    return privileged(scores, coordinate_flags(cos, sin, union.share).to(scores.device))
