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

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nuwa.allowed import check_words
from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import NORM_EPSILON, VisionSignals, products_of_pairs, ranked
from nuwa.stage1.registry import register

Relevance = Literal["negative", "positive", "none"]
EPSILON = 1e-6  # so that the least relevant token has some relevance
# What is left of a token's own similarity when others explain it: below this it is rounding, and the rank is spent.
SPENT = 1e-10
SMALLEST_POOL = 64
WORTHWHILE = 12  # tokens that a pool has to last for: with fewer, the whole kernel takes less time


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
    projected, relevance = signals.compared(signals.projected), weights(signals, config)
    if relevance.device.type == "cpu":
        pairs = zip(projected, relevance, strict=True)
        chosen = torch.tensor([in_pools(vectors(*pair), pair[1], keep) for pair in pairs])
    else:  # which tokens can be next would have to be asked of the device
        chosen = together(projected, relevance, keep)
    return keep_unmerged(signals, chosen.sort(dim=1).values)


def vectors(projected: Tensor, relevance: Tensor) -> Tensor:
    """``v`` of one image ``(tokens, dim)``, float64; a zero vector stays zero, as it is like nothing."""
    made = torch.empty(projected.shape, dtype=torch.float64, device=projected.device)
    # Few at a time, which stay in the processor's cache from one pass over them to the next.
    for part, own, scale in zip(made.split(64), projected.split(64), relevance.split(64), strict=True):
        part.copy_(own)
        part.mul_((scale / part.norm(dim=-1).clamp_(min=NORM_EPSILON))[:, None])
    return made


@dataclass(frozen=True)
class Order:
    """By what tokens ``(..., tokens)`` are compared: their gains, or, once these are spent, their relevance below zero."""

    spent: Tensor
    step: Tensor
    by_relevance: Tensor

    @classmethod
    def of(cls, gain: Tensor, relevance: Tensor) -> Order:
        """``gain``: before anything is chosen."""
        step = torch.exp2(gain.amax(dim=-1, keepdim=True).clamp(min=2.0**-200).log2().ceil() - 40)
        return cls(SPENT * gain, step, relevance / relevance.amax(dim=-1, keepdim=True) - 2)

    def keys(self, gain: Tensor) -> Tensor:
        """What is largest for the next token; of a token it never rises, as gains never do."""
        return torch.where(gain > self.spent, (gain / self.step).round_(), self.by_relevance)


def together(projected: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """The ``keep`` tokens of all images at once, from whole kernels, ``(batch, keep)``."""
    kernel = torch.stack([products_of_pairs(vectors(*pair)) for pair in zip(projected, relevance, strict=True)])
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    order = Order.of(gain, relevance)
    explained = kernel.new_zeros(len(kernel), keep, kernel.shape[1])
    taken = torch.zeros_like(gain, dtype=torch.bool)
    chosen = []

    for number in range(keep):
        best = order.keys(gain).masked_fill_(taken, -torch.inf).argmax(dim=1, keepdim=True)
        taken.scatter_(1, best, True)
        chosen.append(best)
        at, known = best[..., None], explained[:, :number]
        row = kernel.gather(1, at.expand(-1, -1, kernel.shape[1]))[:, 0]
        if number:
            row = row - (known.gather(2, at.expand(-1, number, -1)).transpose(1, 2) @ known)[:, 0]
        own, least = gain.gather(1, best), order.spent.gather(1, best)
        row = torch.where(own > least, row / own.clamp(min=2.0**-1000).sqrt(), 0.0)
        explained[:, number] = row
        gain = gain - row.square()
    return torch.cat(chosen, dim=1)


def in_pools(vectors: Tensor, relevance: Tensor, keep: int) -> list[int]:
    """The tokens of one image in the order that they are chosen; ``vectors`` ``(tokens, dim)``.

    The tokens of largest gain are a *pool*. Inside it the next ones are chosen from its own part of the kernel, for as long
    as the best of it beats all that others can still have, which is what they had when the pool was formed. Then the
    chosen ones' rows are made in one product, all gains brought up to date, and the next pool formed. A pool that
    lasts for few steps is followed by one of all tokens, which is the whole kernel and the last.
    """
    tokens = len(vectors)
    gain = vectors.norm(dim=1).square_()
    order = Order.of(gain, relevance)
    explained = vectors.new_empty(keep, tokens)
    taken = torch.zeros(tokens, dtype=torch.bool)
    chosen: list[int] = []
    rows, size = 0, max(SMALLEST_POOL, tokens // 16)

    while True:
        keys = order.keys(gain).masked_fill_(taken, -torch.inf)
        ahead = ranked(keys)[: tokens - len(chosen)]
        pool = ahead[:size].sort().values
        beyond = [(float(keys[token]), -int(token)) for token in ahead[size : size + 1]]
        known = explained[:rows, pool]
        left = products_of_pairs(vectors[pool]).sub_(known.T @ known)
        places, new, factor = next_of(pool, left, gain[pool], order, beyond, keep - len(chosen))
        chosen += pool[places].tolist()
        if len(chosen) == keep:
            return chosen

        taken[pool[places]] = True
        row = (vectors[new] @ vectors.T).sub_(explained[:rows, new].T @ explained[:rows])
        made = torch.linalg.solve_triangular(factor, row, upper=False)
        explained[rows : rows + len(new)] = made
        rows += len(new)
        gain -= made.square().sum(dim=0)
        if len(places) < WORTHWHILE:
            size = tokens


def next_of(
    pool: Tensor, left: Tensor, gain: Tensor, order: Order, beyond: list[tuple[float, int]], most: int
) -> tuple[list[int], Tensor, Tensor]:
    """``most`` tokens of an ascending pool at most, as long as none ``beyond`` it (key and negated token) comes first.

    ``left``: ``(pool, pool)``, what earlier tokens leave of the kernel. Returns their places in the pool, those of them that
    had a gain, as tokens ``(new,)``, and the lower triangular ``(new, new)`` that their rows are to be divided by.
    """
    spent, by_relevance, step = order.spent[pool].numpy(), order.by_relevance[pool].numpy(), float(order.step)
    rest, own = left.numpy(), gain.numpy()
    rows = np.empty((min(most, len(pool)), len(pool)))
    free = np.zeros(len(pool))
    places: list[int] = []
    gained: list[int] = []
    roots: list[float] = []
    while len(places) < len(rows):
        keys = np.where(own > spent, np.rint(own / step), by_relevance) + free
        best = int(keys.argmax())
        if beyond and (keys[best], -int(pool[best])) < beyond[0]:
            break
        places.append(best)
        free[best] = -np.inf
        if own[best] > spent[best]:
            number = len(gained)
            roots.append(math.sqrt(own[best]))
            rows[number] = (rest[best] - rows[:number, best] @ rows[:number]) / roots[-1]
            own = own - rows[number] ** 2
            gained.append(best)

    factor = np.tril(rows[: len(gained), gained].T)
    np.fill_diagonal(factor, roots)
    return places, pool[gained], torch.from_numpy(factor)
