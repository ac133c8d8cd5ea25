"""Selection inside the language model, from the equations: DART, FEATHER, IVC-Prune, SparseVLM 2, VScan's stage 2.

One question at a time, number by number. Arrays are NumPy's; ``query`` ``(heads, d)`` and ``keys`` ``(kv heads, tokens, d)``
are those of one layer; head ``h`` looks at key head ``h // (heads / kv heads)``.
"""

from __future__ import annotations

import math

import numpy as np

from oracles.pictures import best_first, similarity


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def attention(query: np.ndarray, keys: np.ndarray, scaling: float) -> list[float]:
    """Of one query over all ``keys``, mean over heads."""
    heads, tokens = len(query), keys.shape[1]
    total = [0.0] * tokens
    for head in range(heads):
        own = keys[head * len(keys) // heads].astype(np.float64)
        shares = softmax([scaling * float(query[head].astype(np.float64) @ key) for key in own])
        total = [one + share / heads for one, share in zip(total, shares, strict=True)]
    return rounded(total)


def rounded(values: list[float]) -> list[float]:
    """To 2⁻⁴⁰, the precision in which these scores are equal."""
    return [round(value * 2**40) / 2**40 for value in values]


def united(first: list[list[int]], scores: list[float], keep: int) -> list[int]:
    """The union of the sets ``first`` and the best ``t`` by score that has ``keep`` tokens, for whatever ``t``.

    Where the sets alone have more, the first sets' tokens go on, of the last one that fits in part the best.
    """
    ranks = best_first(scores)
    chosen: set[int] = set()
    for members in first:
        room = [token for token in ranks if token in members and token not in chosen][: keep - len(chosen)]
        chosen.update(room)
    for best in range(len(scores) + 1):
        union = chosen | set(ranks[:best])
        if len(union) == keep:
            return sorted(union)
    return sorted(chosen)


def grid_of(places: list[tuple[int, int] | None], stride: int) -> list[int]:
    """Tokens, by their rows and columns (null: none), in every ``stride``-th row and column."""
    return [at for at, place in enumerate(places) if place and place[0] % stride == 0 and place[1] % stride == 0]


def dart(
    visual_keys: np.ndarray,
    text_keys: np.ndarray,
    visual_states: np.ndarray,
    text_states: np.ndarray,
    keep: int,
    start: int,
    image_pivots: int = 4,
    text_pivots: int = 4,
    pivot_order: str = "ranked",
    pivot_norm: str = "l1",
) -> list[int]:
    """Keys ``(kv heads, tokens, d)``, states ``(tokens, dim)``; ``start``: tokens before the image."""

    def pivots_of(keys: np.ndarray, count: int) -> list[int]:
        flat = keys.astype(np.float64).transpose(1, 0, 2).reshape(keys.shape[1], -1)
        norms = np.abs(flat).sum(axis=1) if pivot_norm == "l1" else np.sqrt((flat**2).sum(axis=1))
        return best_first(norms.tolist())[:count]

    pivots = pivots_of(visual_keys, min(image_pivots, keep))
    asking = pivots_of(text_keys, text_pivots)
    kept = list(pivots)
    turns = [("visual", at) for at in pivots] + [("text", at) for at in asking]
    if pivot_order == "hash":
        places = {start + at: ("visual", at) for at in pivots}
        places |= {start + len(visual_states) + at: ("text", at) for at in asking}
        turns = [places[place] for place in set(list(places))]  # grown one by one; a dict's would have another table
    left = keep - len(pivots)
    for number, (kind, at) in enumerate(turns):
        state = (visual_states if kind == "visual" else text_states)[at]
        adds = left // len(turns) + (number < left % len(turns))
        others = [token for token in range(len(visual_states)) if token not in kept]
        unlike = sorted(others, key=lambda token: (similarity(state, visual_states[token]), token))
        kept += unlike[:adds]
    return sorted(kept)


def angles(position: list[int], frequencies: list[float]) -> list[float]:
    """Of every axis and frequency."""
    return [place * frequency for place in position for frequency in frequencies]


def coordinates(positions: list[list[int]], frequencies: list[float], share: float) -> list[int]:
    """``positions``: ids of every token, one an axis."""
    keep = round(share * len(positions))
    found: set[int] = set()
    for function in (math.cos, math.sin):
        means = []
        for position in positions:
            # As float32 holds an angle, and its cosine; sorted, so that equal ids on other axes sum up alike.
            turned = sorted(float(np.float32(function(np.float32(one)))) for one in angles(position, frequencies))
            means.append(round(math.fsum(turned) / len(turned) * 2**24))
        found.update(best_first(means)[:keep])
    return sorted(found)


def ivc_prune(
    values: dict[str, np.ndarray],
    positions: list[list[int]],
    frequencies: list[float],
    keep: int,
    coordinate_share: float = 0.05,
    seed_share: float = 0.01,
    affinity: str = "all",
    skipped: int = 2,
) -> list[int]:
    """``values`` of ``before``, ``visual`` and ``text`` tokens, ``(kv heads, tokens, d)``."""
    heads, count, dim = values["visual"].shape
    words = values["text"].shape[1]

    def row(own: np.ndarray) -> np.ndarray:
        """Affinity of one token ``(kv heads, d)`` to every visual token."""
        total = np.zeros(count)
        for head in range(heads):
            others = (
                [values["visual"]] if affinity == "visual" else [values[name] for name in ("before", "visual", "text")]
            )
            everyone = np.concatenate([part[head] for part in others]).astype(np.float64)
            shares = softmax([float(own[head].astype(np.float64) @ other) / dim**0.5 for other in everyone])
            start = 0 if affinity == "visual" else values["before"].shape[1]
            total += np.array(shares[start : start + count]) / heads
        return total

    question = range(min(skipped, words - 1), words)
    asked = [row(values["text"][:, word]) for word in question]
    by_question = rounded((np.sum(asked, axis=0) / len(asked)).tolist())
    seeds = best_first(by_question)[: min(count, max(1, round(seed_share * count)))]
    asked += [row(values["visual"][:, seed]) for seed in seeds]
    foreground = rounded((np.sum(asked, axis=0) / len(asked)).tolist())
    return united([seeds, coordinates(positions, frequencies, coordinate_share)], foreground, keep)


def raters_by_distance(
    maps: np.ndarray,
    text_at: list[list[int]],
    visual_at: list[list[int]],
    frequencies: list[tuple[int, float]],
    raters: list[int],
    heads: int,
    floor: float,
) -> list[float]:
    """``maps`` ``(heads, text, visual)``; ``frequencies``: the axis and the frequency of every rotated pair."""
    corrected = np.zeros(maps.shape)
    for word in raters:
        for token in range(maps.shape[2]):
            turns = [(text_at[word][axis] - visual_at[token][axis]) * frequency for axis, frequency in frequencies]
            factor = max(sum(map(math.cos, turns)) / len(turns), floor)
            corrected[:, word, token] = maps[:, word, token] / factor
    looks = rounded([float(own.sum()) for own in corrected])
    chosen = best_first(looks)[:heads]
    return [
        float(corrected[chosen][:, raters, token].sum()) / (len(chosen) * len(raters)) for token in range(maps.shape[2])
    ]
