"""LearnPruner's stage 1, one token at a time: a small network in loops, then greedy picks for diversity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from oracles.nuwa import Outcome
from oracles.pictures import Picture, best_first, similarity


@dataclass(frozen=True)
class Network:
    """``hidden`` (M, D) and ``hidden_bias`` (M,), then ``decide`` (2, M) and ``decide_bias`` (2,): prune, keep."""

    hidden: np.ndarray
    hidden_bias: np.ndarray
    decide: np.ndarray
    decide_bias: np.ndarray


def gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


def keep_odds(network: Network, features: np.ndarray) -> float:
    """Logit of keep minus logit of prune: the logarithm of ``p / (1 - p)``, so it ranks as p does."""
    middle = []
    for weights, bias in zip(network.hidden, network.hidden_bias, strict=True):
        total = float(bias)
        for weight, value in zip(weights, features, strict=True):
            total += float(weight) * float(value)
        middle.append(gelu(total))
    logits = []
    for weights, bias in zip(network.decide, network.decide_bias, strict=True):
        logits.append(float(bias) + sum(float(weight) * value for weight, value in zip(weights, middle, strict=True)))
    return logits[1] - logits[0]


def select(picture: Picture, network: Network, keep: int, diversity_share: float) -> Outcome:
    """Raster order; every token as it came. Scores are rounded to float32, so that equal tokens tie."""
    scores = [float(np.float32(keep_odds(network, row))) for row in picture.features]
    diverse = min(round(diversity_share * keep), keep - 1)
    chosen = best_first(scores)[: keep - diverse]
    for _ in range(diverse):
        nearest = {}
        for token in range(picture.tokens):
            if token not in chosen:
                similar = [similarity(picture.features[token], picture.features[other]) for other in chosen]
                nearest[token] = max(similar)
        least = min(nearest.values())
        chosen.append(min(token for token, value in nearest.items() if value == least))
    kept = sorted(chosen)
    return Outcome(kept, [True] * keep, np.stack([picture.features[token] for token in kept]))
