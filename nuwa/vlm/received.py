"""The attention that tokens of a vision encoder receive: what salience is where there is no CLS token."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_ROWS = 1024  # attention is summed over this many query rows at a time


def received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Mean over heads and queries of the attention every key receives, ``(batch, keys)`` float32.

    ``query``, ``key``: ``(batch, heads, tokens, head_dim)`` of tokens that all see each other.
    """
    total = torch.zeros(key.shape[0], key.shape[2], dtype=torch.float32, device=key.device)
    for head in range(query.shape[1]):  # one head at a time: all maps at once are the encoder's largest tensor
        for rows in query[:, head].split(QUERY_ROWS, dim=1):
            scores = rows @ key[:, head].transpose(1, 2) * scaling
            total += scores.softmax(dim=-1, dtype=torch.float32).sum(dim=1)
    return total / (query.shape[1] * query.shape[2])
