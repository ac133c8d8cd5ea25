"""CDPruner (NeurIPS 2025, arXiv 2506.10967): tokens that differ from one another and matter to the question.

A determinantal point process over the tokens: ``L_ij = r_i cos(f_i, f_j) r_j`` with the features behind the projector and
the relevance r of a token to the question, by CLIP's own text tower. Greedy MAP inference takes the token that adds most
to the determinant, ``keep`` times. No merging. The question decides: it is pruned for before the language model.

Released code: github.com/Theia-4869/CDPruner. Its relevance is the *negative* cosine, on purpose: the patches least like the
text are its relevant ones (``relevance: negative``). Differences: it normalises relevance over the whole batch, here each
view of each image by itself, so that no result depends on the batch (one image of LLaVA-1.5: the same); it lays two images
of a batch into one row; beyond the rank of the features it takes square roots of what is not positive, here the rest of
the budget goes to the most relevant tokens. Relevance that is the same everywhere is 1 everywhere, where it divides by
zero. On LLaVA-NeXT it keeps the padding of the crops, here the local grid is unpadded. For Qwen2.5-VL no code was released.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nuwa.allowed import check_words
from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import NORM_EPSILON, VisionSignals
from nuwa.stage1.registry import register

Relevance = Literal["negative", "positive", "none"]
EPSILON = 1e-6  # so that the least relevant token has some relevance
# What is left of a token's own similarity when others explain it: below this it is rounding, and the rank is spent.
SPENT = 1e-10
BAND = 192  # rows of a kernel at once: few enough to leave nearly half of it out


@dataclass(frozen=True)
class CDPruner:
    """``relevance``: sign of the cosine between token and question, or none: diversity alone. ``theta``: weight of the
    relevance, ``exp(θ / (2 (1 - θ)) r)``; null: r itself, as released.
    """

    relevance: Relevance = "negative"
    theta: float | None = None

    def __post_init__(self) -> None:
        check_words("cdpruner", self, relevance=Relevance)
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"cdpruner.theta {self.theta} must be null or lie in [0, 1)")


def weights(signals: VisionSignals, config: CDPruner) -> Tensor:
    """Relevance of every token as the kernel takes it, ``(batch, tokens)`` float64."""
    if config.relevance == "none":
        return torch.ones(signals.features.shape[:2], dtype=torch.float64, device=signals.features.device)
    cosine = signals.relevance.double()
    signed = -cosine if config.relevance == "negative" else cosine
    least, most = signed.amin(dim=1, keepdim=True), signed.amax(dim=1, keepdim=True)
    spread = most - least
    normal = torch.where(spread > 0, (signed - least + EPSILON) / spread.masked_fill(spread == 0, 1.0), 1.0)
    return normal if config.theta is None else (normal * config.theta / (2 * (1 - config.theta))).exp()


def reads(config: CDPruner) -> tuple[str, ...]:
    return ("features", "projected", *(["relevance"] if config.relevance != "none" else []))


@register("cdpruner", CDPruner, cite=("cdpruner",), presets={"released": {}}, reads=reads)
def select(signals: VisionSignals, keep: int, config: CDPruner, seed: int = 0) -> Selection:
    """``keep`` steps, each a row of the kernel and its part that the chosen ones do not explain.

    With ``v_i = r_i f̂_i``, ``L = V Vᵀ``; everything in float64. Gains are compared after rounding to 40 bits below the
    largest, so that equal ones are equal in every batch, and ties go to the lower index.
    """
    relevance = weights(signals, config)
    kernel = kernels(signals.compared(signals.projected), relevance)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    spent = SPENT * gain
    step = torch.exp2(gain.amax(dim=1, keepdim=True).clamp(min=2.0**-200).log2().ceil() - 40)
    by_relevance = relevance / relevance.amax(dim=1, keepdim=True) - 2
    explained = kernel.new_zeros(len(kernel), keep, kernel.shape[1])
    taken = torch.zeros_like(gain, dtype=torch.bool)
    chosen = []

    for number in range(keep):
        # A token whose gain is spent comes after all others, by relevance.
        rest = torch.where(gain > spent, (gain / step).round_(), by_relevance)
        best = rest.masked_fill_(taken, -torch.inf).argmax(dim=1, keepdim=True)
        taken.scatter_(1, best, True)
        chosen.append(best)
        at, known = best[..., None], explained[:, :number]
        row = kernel.gather(1, at.expand(-1, -1, kernel.shape[1]))[:, 0]
        if number:
            row = row - (known.gather(2, at.expand(-1, number, -1)).transpose(1, 2) @ known)[:, 0]
        own, least = gain.gather(1, best), spent.gather(1, best)
        row = torch.where(own > least, row / own.clamp(min=2.0**-1000).sqrt(), 0.0)
        explained[:, number] = row
        gain = gain - row.square()
    return keep_unmerged(signals, torch.cat(chosen, dim=1).sort(dim=1).values)


def kernels(projected: Tensor, relevance: Tensor) -> Tensor:
    """The equation's ``L``, ``(batch, tokens, tokens)`` float64: smaller than the vectors, which are wider than many.

    Image by image, so that no number depends on the batch, and of a symmetric matrix one half only: a band of columns for
    each band of rows. A row made when it is asked for would read all vectors again at every step.
    """
    batch, tokens = relevance.shape
    kernel = relevance.new_empty(batch, tokens, tokens)
    for image, own in enumerate(kernel):
        vectors = projected[image].double()
        for start in range(0, tokens, BAND):
            band, rest = slice(start, start + BAND), slice(start + BAND, None)
            own[band, start:] = vectors[band] @ vectors[start:].T
            own[rest, band] = own[band, rest].T
        scale = relevance[image] / own.diagonal().sqrt().clamp_(min=NORM_EPSILON)  # a zero vector is like nothing
        own.mul_(scale[:, None]).mul_(scale)
    return kernel
