"""Nüwa, stage 1 (ICLR 2026): separation, alignment, aggregation.

Presets, all faithful: ``paper`` follows equations 3-7 and Algorithm 1, ``released`` the authors' code for LLaVA-1.5,
``released_next`` and ``released_qwen`` theirs for LLaVA-NeXT and Qwen2.5-VL; ``paper_next`` is ``paper`` with stage 2 as in
table 10 (:mod:`nuwa.methods`). Every difference between them is one field of :class:`Nuwa`. What the code sets by budget
is a :class:`nuwa.schedule.ByBudget` until a budget is named.

Where the released code does what cannot be meant, we differ:

* It keeps all tokens of a view where more than three of every four are asked for; here exactly those asked for are kept.
* ``released_next``: of an odd grid its last row or column is never kept, and rows and columns of crops are swapped on
  images that are not square; here edges have regions of their own and crops stand where they are.
* ``released_next``: what ``total // crops`` leaves over is dropped, and newline tokens come on top of the budget; here
  the later views take the rest, and newline tokens count (:func:`nuwa.schedule.shares`).
* ``released_qwen``: the zeros that pad a grid to even sides may be chosen and are then dropped, so that fewer tokens are
  kept; its similarity is in window order, the features in raster order. Here padding is never chosen, all is in raster
  order, and stage 1 keeps what the budget asks for (published: 35, 60 and 85 %).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from nuwa.allowed import check_share, check_words
from nuwa.grid import PatchGrid
from nuwa.schedule import ByBudget
from nuwa.selection import Selection, gather_tokens, keep_unmerged
from nuwa.signals import NORM_EPSILON, VisionSignals, ranked, sole_top, top_indices
from nuwa.stage1.registry import register

Salience = Literal["cls_attention_key_norm", "cls_attention"]
PillarSignal = Literal["key_norm", "salience", "feature_norm"]
DistanceConvention = Literal["squared", "plain", "plain_even", "patches"]
WEIGHT_EPSILON = 1e-8  # of the row normalisation


@dataclass(frozen=True, kw_only=True)
class Nuwa:
    """Hyper-parameters of stage 1.

    ``separation``: choose per region (True) or globally (Table 8, "region").
    ``region_side``: patches along a region's side; 2 cuts CLIP's 24x24 grid into the paper's 12x12 regions.
    ``candidates_per_region``: n of the alignment, raised where it offers too few candidates; null takes the smallest n
    that offers enough (1 / 2 / 3 for averages of 64 / 128 / 192 on LLaVA-1.5).
    ``salience``: eq. 3 weighs CLS attention with the key norm; the released code does not.
    ``pillars``: whether some tokens stay untouched (Table 8, "pillar").
    ``pillar_signal``, ``pillar_quantile``: a token is a pillar when its signal is at or above that quantile (linear
    interpolation) of the kept tokens (eq. 4).
    ``aggregation``: whether collectors gather their neighbourhood at all.
    ``distance_threshold``: reach of the aggregation, by ``distance_convention`` a share of the largest distance on the
    grid: of its square (``squared``: 280 / 1058, Table 7's "26 %"), of itself (``plain``), of that on the grid padded to
    even sides (``plain_even``); or a number of ``patches``, the same on every grid.
    ``reset_self_weight``: set a collector's own weight to 1 after normalisation (Algorithm 1, line 26).
    """

    separation: bool = True
    region_side: int = 2
    candidates_per_region: int | ByBudget | None = None
    salience: Salience = "cls_attention"
    pillars: bool = True
    pillar_signal: PillarSignal = "salience"
    pillar_quantile: float = 0.55
    aggregation: bool = True
    distance_threshold: float = 280 / 1058
    distance_convention: DistanceConvention = "squared"
    reset_self_weight: bool = True

    def __post_init__(self) -> None:
        check_words("nuwa", self, salience=Salience, pillar_signal=PillarSignal, distance_convention=DistanceConvention)
        check_share(f"nuwa.pillar_quantile {self.pillar_quantile}", self.pillar_quantile)
        if not 0 < self.distance_threshold <= (math.inf if self.distance_convention == "patches" else 1):
            allowed = "be above 0 patches" if self.distance_convention == "patches" else "lie in (0, 1]"
            raise ValueError(f"nuwa.distance_threshold {self.distance_threshold} must {allowed}")
        if self.region_side < 1:
            raise ValueError(f"nuwa.region_side {self.region_side} must be at least 1")
        candidates = self.candidates_per_region
        for count in candidates.values if isinstance(candidates, ByBudget) else [candidates]:
            if count is not None and count < 1:
                raise ValueError(f"nuwa.candidates_per_region {count} must be null or at least 1")


PAPER = {"salience": "cls_attention_key_norm", "pillar_signal": "key_norm", "pillar_quantile": 0.75}
PRESETS = {
    "released": {},
    "released_next": {
        # Stage 1 keeps 290, 582 and 1162 tokens of five crops of 576.
        "candidates_per_region": ByBudget(
            (160, 320, 640), (2, 3, 3), "tokens", stage1_shares=(290 / 2880, 582 / 2880, 1162 / 2880)
        ),
        "pillar_quantile": 0.5,
        "distance_threshold": 280**0.5,
        "distance_convention": "patches",
    },
    "released_qwen": {
        "candidates_per_region": ByBudget((0.25, 0.50, 0.75), (3, 3, 4), "share", stage1_shares=(0.35, 0.60, 0.85)),
        "pillar_quantile": 0.1,
        "distance_threshold": 0.8,
        "distance_convention": "plain_even",
        "reset_self_weight": False,
    },
    "paper": PAPER,
    "paper_next": PAPER,
}


def salience_of(signals: VisionSignals, config: Nuwa) -> Tensor:
    """``s_i = α_i · ‖k_i‖₂`` (eq. 3) or ``α_i`` (released code), ``(batch, tokens)`` float32."""
    attention = signals.cls_attention.float()
    return attention * signals.key_norm if config.salience == "cls_attention_key_norm" else attention


def rank_in_region(salience: Tensor, regions: Tensor) -> Tensor:
    """How many tokens of its own region precede each token by salience, ``(batch, tokens)`` int64."""
    by_salience = ranked(salience)
    grouped = by_salience.gather(1, torch.sort(regions[by_salience], dim=1, stable=True).indices)
    starts = torch.searchsorted(regions.sort().values, regions)  # where each token's region begins among the grouped
    places = torch.arange(salience.shape[1], device=salience.device) - starts[grouped]
    return torch.empty_like(grouped).scatter_(1, grouped, places)


def best_in_squares(salience: Tensor, grid: PatchGrid, side: int, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` most salient of every region of ``side x side`` patches: what they have and which tokens they are,
    ``(batch, regions * count)``; of equals the lower index."""
    down, across = grid.height // side, grid.width // side
    tokens = torch.arange(grid.tokens, device=salience.device).view(down, side, across, side)
    tokens = tokens.transpose(1, 2).reshape(down * across, side**2)
    best = torch.sort(salience[:, tokens], dim=-1, descending=True, stable=True)
    places = best.indices[..., :count]
    return best.values[..., :count].flatten(1), tokens.expand(len(salience), -1, -1).gather(2, places).flatten(1)


@functools.cache
def candidates_needed(grid: PatchGrid, region_side: int, keep: int) -> int:
    """The smallest n for which n tokens of every region (or all it has) are at least ``keep``."""
    if keep > grid.tokens:
        raise ValueError(f"cannot keep {keep} of {grid.tokens} tokens")
    sizes = grid.region_sizes(region_side)
    n = 1
    while sum(min(size, n) for size in sizes) < keep:
        n += 1
    return n


def align(signals: VisionSignals, salience: Tensor, keep: int, config: Nuwa) -> Tensor:
    """Separation and alignment: the n most salient of every region, then the global top ``keep``, in raster order."""
    if not config.separation:
        return top_indices(salience, keep)
    n: float = candidates_needed(signals.grid, config.region_side, keep)
    if config.candidates_per_region is not None:
        preset = config.candidates_per_region
        n = max(preset.at_stage1(keep / signals.grid.tokens) if isinstance(preset, ByBudget) else preset, n)
    grid, side = signals.grid, config.region_side
    if grid.height % side == grid.width % side == 0:
        scores, tokens = best_in_squares(salience, grid, side, math.ceil(n))
        places = sole_top(scores, keep)
        if places is not None:
            return tokens.gather(1, places).sort(dim=-1).values
        return top_indices(torch.full_like(salience, -torch.inf).scatter_(1, tokens, scores), keep)
    candidate = rank_in_region(salience, grid.regions(side, salience.device)) < n
    return top_indices(salience.masked_fill(~candidate, -torch.inf), keep)


def roles(signals: VisionSignals, salience: Tensor, indices: Tensor, config: Nuwa) -> tuple[Tensor, Tensor]:
    """Eq. 4: which kept tokens are pillars, ``(batch, kept)``, and places among the kept that hold all collectors.

    A signal reaches its linearly interpolated q-quantile exactly when it reaches the order statistic just above it, as
    no value lies between: no rounding can decide a role. So the ``⌈q (kept - 1)⌉`` lowest are the only tokens that can
    be collectors, ``(batch, collectors)``; where signals tie, some of them are pillars nevertheless.
    """
    batch, kept = indices.shape
    if not config.pillars:
        places = torch.arange(kept, device=indices.device).expand(batch, -1)
        return torch.zeros_like(indices, dtype=torch.bool), places
    signal = {
        "salience": lambda: salience,
        "key_norm": lambda: signals.key_norm,
        "feature_norm": lambda: signals.compared(signals.features).float().norm(dim=-1),
    }[config.pillar_signal]().gather(1, indices)
    rising = torch.sort(signal, dim=1, stable=True)
    collectors = math.ceil(Fraction(str(config.pillar_quantile)) * (kept - 1))
    return signal >= rising.values[:, collectors, None], rising.indices[:, :collectors]


def reach(grid: PatchGrid, config: Nuwa) -> float:
    """``d_thresh`` of eq. 6 in patches: from there on nothing is gathered."""
    if config.distance_convention == "patches":
        return config.distance_threshold
    if config.distance_convention == "squared":
        return (config.distance_threshold * grid.max_squared_distance) ** 0.5
    if config.distance_convention == "plain_even":
        grid = PatchGrid(grid.height + grid.height % 2, grid.width + grid.width % 2)
    return config.distance_threshold * grid.max_squared_distance**0.5


def aggregation_weights(signals: VisionSignals, indices: Tensor, config: Nuwa) -> Tensor:
    """Rows of W for collectors at ``indices`` (eq. 5-7), ``(batch, collectors, tokens)`` float32.

    ``A_ij = ReLU(cos(S̄_i, S̄_j))``, ``P_ij = 1 - min(1, d_ij / d_thresh)`` (eq. 6 prints max, which would be ≤ 0
    everywhere), rows of ``A ⊙ P`` normalised to sum 1, then the own weight set to 1.
    """
    similarity = signals.similarity.float()
    # In place from here on: these tensors are the largest of the method. The norms of the columns divide the
    # product, so that no normalised copy of all tokens is made.
    norm = similarity.norm(dim=-1).clamp_(min=NORM_EPSILON)
    rows = gather_tokens(similarity, indices).div_(norm.gather(1, indices)[..., None])
    weights = (rows @ similarity.transpose(1, 2)).relu_()
    weights.div_(norm[:, None])
    within = max(reach(signals.grid, config), WEIGHT_EPSILON)
    weights.mul_(signals.grid.distances(indices).div_(within).clamp_(max=1).neg_().add_(1))
    weights.div_(weights.sum(dim=-1, keepdim=True).add_(WEIGHT_EPSILON))
    if config.reset_self_weight:
        weights.scatter_(2, indices[..., None], 1.0)
    return weights


def reads(config: Nuwa) -> tuple[str, ...]:
    keys = config.salience == "cls_attention_key_norm" or (config.pillars and config.pillar_signal == "key_norm")
    similarity = config.aggregation
    return ("features", "cls_attention", *(["keys"] if keys else []), *(["similarity"] if similarity else []))


@register("nuwa", Nuwa, cite=("nuwa",), presets=PRESETS, reads=reads)
def select(signals: VisionSignals, keep: int, config: Nuwa, seed: int = 0) -> Selection:
    """``T = W_I · H``: pillars exactly as the encoder gave them, collectors with what they gathered.

    Only rows of collectors are computed, ``collectors x tokens`` a piece; the full ``tokens x tokens`` never exists.
    """
    salience = salience_of(signals, config)
    indices = align(signals, salience, keep, config)
    if not config.aggregation:
        return keep_unmerged(signals, indices)
    pillars, places = roles(signals, salience, indices, config)
    if places.shape[1] == 0:
        return keep_unmerged(signals, indices)
    collectors = indices.gather(1, places)
    gathered = aggregation_weights(signals, collectors, config) @ signals.features.float()

    # Whole rows are copied, where gathering and scattering look every number up. Of signals that tie, some places hold a
    # pillar, which keeps its own features: what was gathered for it goes to one row more, that nobody reads.
    (batch, kept), (_, tokens, dim) = indices.shape, signals.features.shape
    image = torch.arange(batch, device=indices.device)[:, None]
    rows = (indices + image * tokens).flatten()
    features = signals.features.reshape(-1, dim).index_select(0, torch.cat([rows, rows[:1]]))
    written = (places + image * kept).masked_fill_(pillars.gather(1, places), batch * kept)
    features.index_copy_(0, written.flatten(), gathered.flatten(0, 1).to(features.dtype))
    return Selection(indices, features[:-1].view(batch, kept, dim), pillars)
