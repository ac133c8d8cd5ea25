"""Stage-2 scores (FastV, LearnPruner, SparseVLM, Nüwa equations 8-9) from a layer's full attention, number by number."""

from __future__ import annotations

import math

import numpy as np

from oracles.pictures import cosine


def last_token(attention: np.ndarray, visual: list[int], text: list[int]) -> list[float]:
    """FastV: attention of the last prompt token, mean over heads. ``attention`` (heads, tokens, tokens)."""
    return [sum(float(head[text[-1], column]) for head in attention) / len(attention) for column in visual]


def last_three(attention: np.ndarray, visual: list[int], text: list[int]) -> list[float]:
    """Nüwa's code for Qwen2.5-VL: mean over the last three prompt tokens (all, where there are fewer), largest head."""
    rows = text[-3:]
    return [max(sum(float(head[row, column]) for row in rows) / len(rows) for head in attention) for column in visual]


def all_text(attention: np.ndarray, visual: list[int], text: list[int]) -> list[float]:
    """LearnPruner: mean over all prompt tokens after the image and over heads."""
    scores = []
    for column in visual:
        total = 0.0
        for head in attention:
            for row in text:
                total += float(head[row, column])
        scores.append(total / (len(attention) * len(text)))
    return scores


def cosine_with_mean_text(visual: np.ndarray, text: np.ndarray) -> list[float]:
    """Nüwa, eq. 8-9: cosine of each projected visual token (K, D) with the mean of the text embeddings (T, D)."""
    query = np.zeros(text.shape[1])
    for embedding in text:
        query += embedding
    query /= len(text)
    return [cosine(token, query) for token in visual]


def raters(visual: np.ndarray, text: np.ndarray) -> list[int]:
    """SparseVLM: the prompt tokens rating the image. ``visual`` (N, D), ``text`` (T, D), both entering layer 0.

    Softmax over the text of every visual token's dot products with it, mean over visual tokens, above the mean. All
    prompt tokens where none is above it.
    """
    votes = [0.0] * len(text)
    for token in visual:
        products = [sum(float(a) * float(b) for a, b in zip(token, word, strict=True)) for word in text]
        powers = [math.exp(product - max(products)) for product in products]
        for at, power in enumerate(powers):
            votes[at] += power / sum(powers) / len(visual)
    mean = sum(votes) / len(votes)
    return [at for at, vote in enumerate(votes) if vote > mean + 1e-12] or list(range(len(text)))


def of_raters(attention: np.ndarray, visual: list[int], text: list[int], chosen: list[int]) -> list[float]:
    """Mean over raters and heads. ``chosen``: which of the prompt tokens ``text`` rate."""
    return all_text(attention, visual, [text[at] for at in chosen])
