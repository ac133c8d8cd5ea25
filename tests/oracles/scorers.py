"""Stage-2 scores (FastV, LearnPruner, Nüwa equations 8-9) from a layer's full attention, one number at a time."""

from __future__ import annotations

import numpy as np

from oracles.pictures import cosine


def last_token(attention: np.ndarray, visual: list[int], text: list[int]) -> list[float]:
    """FastV: attention of the last prompt token, mean over heads. ``attention`` (heads, tokens, tokens)."""
    return [sum(float(head[text[-1], column]) for head in attention) / len(attention) for column in visual]


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
