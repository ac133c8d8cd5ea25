"""What a stage-1 method returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nuwa.signals import VisionSignals


@dataclass(frozen=True)
class Selection:
    """Kept visual tokens of a batch, in raster order.

    ``indices``: original patch index of every kept token, ascending and unique, ``(batch, kept)`` int64.
    ``features``: their features after merging, ``(batch, kept, dim)``; what the projector consumes.
    ``pillars``: True where a token is exactly its input, False where it aggregates others, ``(batch, kept)``.
    ``projected``: whether the features are the language model's already, because the method merges behind the projector.
    """

    indices: Tensor
    features: Tensor
    pillars: Tensor
    projected: bool = False

    @property
    def kept(self) -> int:
        return self.indices.shape[1]

    def at(self, rows: Sequence[int]) -> Selection:
        """The selections of ``rows`` of the batch, which may repeat."""
        rows = list(rows)
        return replace(self, indices=self.indices[rows], features=self.features[rows], pillars=self.pillars[rows])


def gather_tokens(values: Tensor, indices: Tensor) -> Tensor:
    """``values`` ``(batch, tokens, dim)`` at ``indices`` ``(batch, kept)`` → ``(batch, kept, dim)``."""
    if not values.is_contiguous():
        return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))
    # Whole rows are copied, where gathering looks every number up.
    if len(values) > 1:
        indices = indices + torch.arange(len(values), device=values.device)[:, None] * values.shape[1]
    return values.flatten(0, 1).index_select(0, indices.flatten()).unflatten(0, indices.shape)


def keep_unmerged(signals: VisionSignals, indices: Tensor) -> Selection:
    """Kept tokens exactly as the encoder gave them."""
    return Selection(indices, gather_tokens(signals.features, indices), torch.ones_like(indices, dtype=torch.bool))
