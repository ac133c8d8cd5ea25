"""What one layer hands to its attention kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projections:
    """Queries, keys and values of some tokens at one layer, as the model's own attention module makes them.

    ``query`` ``(rows, heads, tokens, head_dim)``; ``key``, ``value`` ``(rows, kv_heads, tokens, head_dim)``.
    ``scaling``: of the products; ``softcap``: the bound that ``tanh`` keeps scaled products within, null for none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None

    def weights(self, key: Tensor, seen: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Attention of these queries to ``key``, ``(rows, heads, tokens, columns)``, computed in ``dtype``.

        ``key`` ``(rows, kv_heads, columns, head_dim)`` as a cache holds it. ``seen`` ``(rows, tokens, columns)`` bool.
        """
        rows, heads, tokens, head_dim = self.query.shape
        # Heads that share a key stand behind each other: the keys need no copy for each of them.
        grouped = self.query.to(dtype).reshape(rows, key.shape[1], -1, head_dim)
        logits = (grouped @ key.to(dtype).transpose(2, 3)).view(rows, heads, tokens, -1) * self.scaling
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits.masked_fill(~seen[:, None].to(key.device), -torch.inf).softmax(dim=-1)
