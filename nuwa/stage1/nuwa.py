"""Nüwa, stage 1 (ICLR 2026): separation, alignment, aggregation.

Presets, all faithful: ``paper`` follows equations 3-7 and Algorithm 1, ``released`` the authors' code for LLaVA-1.5,
``released_next`` and ``released_qwen`` theirs for LLaVA-NeXT and Qwen2.5-VL. Every difference between them is one field of :class:`Nuwa`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nuwa.grid import PatchGrid
from nuwa.selection import Selection, gather_tokens, keep_unmerged
from nuwa.signals import NORM_EPSILON, VisionSignals, ranked, top_indices
from nuwa.stage1.registry import register

Salience = Literal["cls_attention_key_norm", "cls_attention"]
PillarSignal = Literal["key_norm", "salience", "feature_norm"]
DistanceConvention = Literal["squared", "plain"]
WEIGHT_EPSILON = 1e-8  # of the row normalisation


@dataclass(frozen=True)
class Nuwa:
    """Hyper-parameters of stage 1.

    ``separation``: choose per region (True) or globally (Table 8, "region").
    ``region_side``: patches along a region's side; 2 cuts CLIP's 24x24 grid into the paper's 12x12 regions.
    ``candidates_per_region``: n of the alignment; null takes the smallest n that offers enough candidates
    (1 / 2 / 3 for averages of 64 / 128 / 192 on LLaVA-1.5).
    ``salience``: eq. 3 weighs CLS attention with the key norm; the released code does not.
    ``pillars``: whether some tokens stay untouched (Table 8, "pillar").
    ``pillar_signal``, ``pillar_quantile``: a token is a pillar when its signal is at or above that quantile (linear
    interpolation) of the kept tokens (eq. 4).
    ``aggregation``: whether collectors gather their neighbourhood at all.
    ``distance_threshold``: reach of the aggregation as a share of the largest distance on the grid: of its square
    (``squared``: 280 / 1058, Table 7's "26 %") or of itself (``plain``).
    ``reset_self_weight``: set a collector's own weight to 1 after normalisation (Algorithm 1, line 26).
    """

    separation: bool = True
    region_side: int = 2
    candidates_per_region: int | None = None
    salience: Salience = "cls_attention"
    pillars: bool = True
    pillar_signal: PillarSignal = "salience"
    pillar_quantile: float = 0.55
    aggregation: bool = True
    distance_threshold: float = 280 / 1058
    distance_convention: DistanceConvention = "squared"
    reset_self_weight: bool = True

    def __post_init__(self) -> None:
        for name, kind in (
            ("salience", Salience),
            ("pillar_signal", PillarSignal),
            ("distance_convention", DistanceConvention),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"nuwa.{name} {getattr(self, name)!r} is unknown; allowed: {', '.join(get_args(kind))}"
                )
        if not 0 <= self.pillar_quantile <= 1:
            raise ValueError(f"nuwa.pillar_quantile {self.pillar_quantile} must lie in [0, 1]")
        if not 0 < self.distance_threshold <= 1:
            raise ValueError(f"nuwa.distance_threshold {self.distance_threshold} must lie in (0, 1]")
        if self.region_side < 1:
            raise ValueError(f"nuwa.region_side {self.region_side} must be at least 1")
        if self.candidates_per_region is not None and self.candidates_per_region < 1:
            raise ValueError(f"nuwa.candidates_per_region {self.candidates_per_region} must be null or at least 1")


PRESETS = {
    "released": {},
    "released_next": {},  # differs in stage 2 only, see nuwa.methods
    "released_qwen": {
        "pillar_quantile": 0.1,
        "distance_threshold": 0.8,
        "distance_convention": "plain",
        "reset_self_weight": False,
    },
    "paper": {"salience": "cls_attention_key_norm", "pillar_signal": "key_norm", "pillar_quantile": 0.75},
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
    needed = candidates_needed(signals.grid, config.region_side, keep)
    n = max(config.candidates_per_region or 1, needed)
    regions = signals.grid.regions(config.region_side, salience.device)
    candidate = rank_in_region(salience, regions) < n
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
        "feature_norm": lambda: signals.features.float().norm(dim=-1),
    }[config.pillar_signal]().gather(1, indices)
    rising = torch.sort(signal, dim=1, stable=True)
    collectors = math.ceil(Fraction(str(config.pillar_quantile)) * (kept - 1))
    return signal >= rising.values[:, collectors, None], rising.indices[:, :collectors]


def aggregation_weights(signals: VisionSignals, indices: Tensor, config: Nuwa) -> Tensor:
    """Rows of W for collectors at ``indices`` (eq. 5-7), ``(batch, collectors, tokens)`` float32.

    ``A_ij = ReLU(cos(S̄_i, S̄_j))``, ``P_ij = 1 - min(1, d_ij / d_thresh)`` (eq. 6 prints max, which would be ≤ 0
    everywhere), rows of ``A ⊙ P`` normalised to sum 1, then the own weight set to 1.
    """
    grid = signals.grid
    if config.distance_convention == "squared":
        reach = (config.distance_threshold * grid.max_squared_distance) ** 0.5
    else:
        reach = config.distance_threshold * grid.max_squared_distance**0.5
    similarity = signals.similarity.float()
    rows = F.normalize(gather_tokens(similarity, indices), dim=-1, eps=NORM_EPSILON)
    # In place from here on: these tensors are the largest of the method. The norms of the columns divide the
    # product, so that no normalised copy of all tokens is made.
    weights = (rows @ similarity.transpose(1, 2)).relu_()
    weights.div_(similarity.norm(dim=-1).clamp_(min=NORM_EPSILON)[:, None])
    weights.mul_(grid.distances(indices).div_(max(reach, WEIGHT_EPSILON)).clamp_(max=1).neg_().add_(1))
    weights.div_(weights.sum(dim=-1, keepdim=True).add_(WEIGHT_EPSILON))
    if config.reset_self_weight:
        weights.scatter_(2, indices[..., None], 1.0)
    return weights


def reads(config: Nuwa) -> tuple[str, ...]:
    keys = config.salience == "cls_attention_key_norm" or (config.pillars and config.pillar_signal == "key_norm")
    similarity = config.aggregation
    return ("features", "cls_attention", *(["keys"] if keys else []), *(["similarity"] if similarity else []))


@register("nuwa", Nuwa, presets=PRESETS, reads=reads)
def select(signals: VisionSignals, keep: int, config: Nuwa, seed: int = 0) -> Selection:
    """``T = W_I · H``: pillars exactly as the encoder gave them, collectors with what they gathered.

    Only rows of collectors are computed, ``collectors x tokens`` a piece; the full ``tokens x tokens`` never exists.
    """
    salience = salience_of(signals, config)
    indices = align(signals, salience, keep, config)
    untouched = keep_unmerged(signals, indices)
    if not config.aggregation:
        return untouched
    pillars, places = roles(signals, salience, indices, config)
    if places.shape[1] == 0:
        return untouched
    collectors = indices.gather(1, places)
    gathered = aggregation_weights(signals, collectors, config) @ signals.features.float()
    # Of signals that tie, some places hold a pillar, which keeps its own features.
    is_pillar = pillars.gather(1, places)[..., None]
    gathered = torch.where(is_pillar, gather_tokens(signals.features, collectors), gathered.to(signals.features.dtype))
    features = untouched.features.scatter_(1, places[..., None].expand_as(gathered), gathered)
    return Selection(indices, features, pillars)
