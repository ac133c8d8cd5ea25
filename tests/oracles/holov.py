"""HoloV, one run after the other: a share of the budget by score, then the most attended tokens of the run."""

from __future__ import annotations

import math

from oracles.nuwa import Outcome
from oracles.pictures import Picture, best_first, norm


def pieces(numbers: list[int], count: int) -> list[list[int]]:
    sizes = [len(numbers) // count + (place < len(numbers) % count) for place in range(count)]
    return [numbers[sum(sizes[:place]) : sum(sizes[: place + 1])] for place in range(count)]


def score(picture: Picture, run: list[int], beta: float, scale_single: bool) -> dict[int, float]:
    """Attention and variance of similarities of every token of a run."""
    attention = {token: 1000 * float(picture.attention[token]) for token in run}
    if len(run) == 1:
        return attention if scale_single else {run[0]: float(picture.attention[run[0]])}
    variance = {}
    for one in run:
        row = []
        for other in run:
            lengths = (norm(picture.projected[one]) + 1e-6) * (norm(picture.projected[other]) + 1e-6)
            product = sum(
                float(a) * float(b) for a, b in zip(picture.projected[one], picture.projected[other], strict=True)
            )
            row.append(0.0 if one == other else round(product / lengths * 2**24) / 2**24)
        mean = sum(row) / (len(run) - 1)
        variance[one] = sum((value - mean) ** 2 for value in row) / (len(run) - 1)
    scale = (sum(attention.values()) / len(run)) / (sum(variance.values()) / len(run) + 1e-6)
    return {token: attention[token] + beta * variance[token] * scale for token in run}


def select(
    picture: Picture,
    keep: int,
    count: int | None = 16,
    crops: str = "runs",
    beta: float = 0.09,
    inside: str = "attention",
    overflow: str = "redistribute",
    scale_single: bool = True,
) -> Outcome:
    assert crops == "runs", "crops of the grid are worked by hand"
    count = min(count or max(1, 16 * picture.tokens // (9 * keep)), picture.tokens)
    runs = pieces(list(range(picture.tokens)), count)
    scores = [score(picture, run, beta, scale_single) for run in runs]
    means = [sum(one.values()) / len(one) for one in scores]
    share = [round(mean / (sum(means) + 1e-6) * 2**32) / 2**32 for mean in means]
    order = best_first(share)
    quota = [math.floor(part * keep) for part in share]
    for number in range(keep - sum(quota)):
        quota[order[number % count]] += 1

    quota = [min(part, len(run)) for part, run in zip(quota, runs, strict=True)]
    if overflow == "redistribute":
        room = [len(run) - part for part, run in zip(quota, runs, strict=True)]
        weights = [part * free for part, free in zip(share, room, strict=True)]
        surplus = keep - sum(quota)
        if sum(weights) > 0:
            more = [math.floor(surplus * weight / sum(weights)) for weight in weights]
            quota = [min(part + extra, len(run)) for part, extra, run in zip(quota, more, runs, strict=True)]
        for run in order:
            quota[run] += min(keep - sum(quota), len(runs[run]) - quota[run])

    kept = []
    for run, part, own in zip(runs, quota, scores, strict=True):
        signal = own if inside == "score" else {token: float(picture.attention[token]) for token in run}
        kept += sorted(run, key=lambda token, signal=signal: (-signal[token], token))[:part]
    others = [token for token in range(picture.tokens) if token not in kept]
    zeros = others[len(others) - (keep - len(kept)) :]
    values = (picture.features if overflow == "redistribute" else picture.projected).astype(float).copy()
    values[zeros] = 0
    together = sorted([*kept, *zeros])
    return Outcome(together, [token not in zeros for token in together], values[together])
