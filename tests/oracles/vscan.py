"""VScan, stage 1, one token at a time: the local scan of windows, the global scan, and who joins whom."""

from __future__ import annotations

import math

import numpy as np

from oracles.nuwa import Outcome
from oracles.pictures import Picture, best_first, similarity


def window_of(picture: Picture, side: int, token: int) -> tuple[int, int]:
    row, column = picture.place(token)
    return min(row // side, picture.height // side - 1), min(column // side, picture.width // side - 1)


def select(
    picture: Picture,
    keep: int,
    window_side: int | None = None,
    local_scan: str = "quota",
    local_rounding: str = "given_to_global",
    cap: str = "exact",
) -> Outcome:
    side = window_side or max(1, min(picture.height, picture.width) // 4)
    count = (picture.height // side) * (picture.width // side)
    early, late = ([float(value) for value in signal] for signal in (picture.early, picture.attention))
    half = int(keep / 2)
    taken: dict[tuple[int, int], int] = {}
    local = []
    if local_scan == "quota":
        most, limit = half // count, picture.tokens
    else:
        most, limit = math.ceil(half / count), half
        if cap == "released":
            most = math.ceil(np.float32(half) * np.float32(np.float32(1) / np.float32(count)))
    for token in best_first(early):
        window = window_of(picture, side, token)
        if len(local) < limit and taken.get(window, 0) < most:
            local.append(token)
            taken[window] = taken.get(window, 0) + 1
    wanted = keep - half if local_scan == "quota" and local_rounding == "lost" else keep - len(local)
    kept = sorted(local + best_first(late, [token for token in range(picture.tokens) if token not in local])[:wanted])

    joined: dict[int, list[int]] = {token: [] for token in kept}
    for token in range(picture.tokens):
        if token not in joined:
            likeness = [similarity(picture.projected[token], picture.projected[other]) for other in kept]
            joined[kept[likeness.index(max(likeness))]].append(token)
    values = picture.projected.astype(float)
    features = [
        (values[token] + sum(values[other] for other in joined[token])) / (1 + len(joined[token])) for token in kept
    ]
    return Outcome(kept, [not joined[token] for token in kept], np.array(features))
