"""The contract of random selection: which patches are drawn is free, how they are drawn is not."""

from __future__ import annotations


def contract_breach(draws: list[list[int]], keep: int, tokens: int) -> str | None:
    """What is wrong with many draws of ``keep`` of ``tokens``, or None.

    Every draw must be ``keep`` distinct tokens in raster order, and every token must be drawn about equally often:
    its count is binomial, and five standard deviations are allowed.
    """
    counts = [0] * tokens
    for draw in draws:
        if len(draw) != keep or draw != sorted(set(draw)) or not set(draw) <= set(range(tokens)):
            return f"{draw} is not {keep} distinct tokens of {tokens} in raster order"
        for token in draw:
            counts[token] += 1
    share = keep / tokens
    expected, deviation = len(draws) * share, (len(draws) * share * (1 - share)) ** 0.5
    for token, count in enumerate(counts):
        if abs(count - expected) > 5 * deviation:
            return f"token {token} was drawn {count} times, expected {expected:.0f} ± {deviation:.0f}"
    return None
