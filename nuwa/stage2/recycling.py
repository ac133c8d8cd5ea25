"""Recycling of dropped tokens (SparseVLM): the better ones are clustered, and one aggregated token a cluster stays.

Clusters are those of density peaks: a centre has many close neighbours and no denser token near it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nuwa.allowed import check_share
from nuwa.selection import gather_tokens
from nuwa.signals import ranked, seeded_generator, top_indices

NOISE = 1e-6  # of densities, so that no two are equal


@dataclass(frozen=True)
class Recycling:
    """``share`` of the dropped tokens, the best by score, are recycled; one cluster for every ``per_cluster`` of them.

    Defaults are those of SparseVLM (τ = 0.3, θ = 1/10).
    """

    share: float = 0.3
    per_cluster: int = 10

    def __post_init__(self) -> None:
        check_share(f"recycling share {self.share:g}", self.share, "(0, 1]")
        if self.per_cluster < 1:
            raise ValueError(f"recycling needs at least 1 token a cluster, not {self.per_cluster}")

    def pool(self, dropped: int) -> int:
        """How many of the dropped tokens are recycled."""
        return min(int(dropped * self.share) + 1, dropped)

    def clusters(self, entering: int, keep: int) -> int:
        """How many of the ``keep`` tokens that leave a cut are recycled ones.

        As many as the published rule asks of what is dropped, ``pool // per_cluster + 1``, so that selected and
        recycled tokens together are ``keep``; never more than half of them.
        """
        selected = keep
        while selected and selected + self._published(entering - selected) > keep:
            selected -= 1
        return min(keep - selected, keep // 2)

    def _published(self, dropped: int) -> int:
        return self.pool(dropped) // self.per_cluster + 1 if dropped else 0


def recycle(
    hidden: Tensor, scores: Tensor, kept: Tensor, clusters: int, recycling: Recycling, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Aggregates dropped tokens: their clusters' centres and means.

    ``hidden`` ``(questions, tokens, dim)``, ``scores`` ``(questions, tokens)``, ``kept`` ``(questions, selected)``
    token numbers, ``noise`` ``(questions, tokens)`` in 0..1. Returns centres ``(questions, clusters)``, ascending
    token numbers, and the mean of each cluster's tokens ``(questions, clusters, dim)``.

    Everything is computed in double precision: the noise is lost in less, and equal densities would be left to chance.
    """
    dropped_scores = scores.scatter(1, kept, -torch.inf)
    pool = top_indices(dropped_scores, max(recycling.pool(hidden.shape[1] - kept.shape[1]), clusters))
    tokens = gather_tokens(hidden, pool).double()
    centres = _density_peaks(tokens, clusters, noise.gather(1, pool))

    distance = _distances(tokens, gather_tokens(tokens, centres))  # (questions, pool, clusters)
    nearest = ranked(-distance)[..., 0]
    nearest = nearest.scatter(1, centres, torch.arange(clusters, device=pool.device).expand_as(centres))
    members = F.one_hot(nearest, clusters).to(tokens)  # (questions, pool, clusters)
    means = members.transpose(1, 2) @ tokens / members.sum(dim=1)[..., None]
    return pool.gather(1, centres), means.to(hidden.dtype)


def _density_peaks(tokens: Tensor, clusters: int, noise: Tensor) -> Tensor:
    """Centres of ``(questions, pool, dim)`` tokens, ``(questions, clusters)``, ascending.

    Density: exp(-mean squared distance to the ``clusters`` nearest tokens, itself included). A centre's score: density
    times the distance to the nearest denser token; to the farthest pair's where there is none.
    """
    distance = _distances(tokens, tokens)
    near = distance.topk(clusters, dim=-1, largest=False).values
    density = (-near.square().mean(dim=-1)).exp() + NOISE * noise.to(tokens)
    denser = density[:, None, :] > density[:, :, None]
    farthest = distance.flatten(1).amax(dim=-1)[:, None, None]
    separation = torch.where(denser, distance, farthest).amin(dim=-1)
    return top_indices(separation * density, clusters)


def _distances(tokens: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance divided by the square root of the dimension; exact, not by way of a matrix product."""
    exact = torch.cdist(tokens, others, compute_mode="donot_use_mm_for_euclid_dist")
    return exact / tokens.shape[-1] ** 0.5


def cluster_noise(seed: int, identity: list[tuple[str, ...]], tokens: int) -> np.ndarray:
    """Noise in 0..1 for every token of every question, ``(questions, tokens)``, seeded by what they are."""
    return np.stack([seeded_generator(seed, "recycling", *who).random(tokens) for who in identity])
