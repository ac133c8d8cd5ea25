"""What a stage-1 method may read of an encoded batch of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nuwa.grid import PatchGrid


@dataclass(frozen=True)
class VisionSignals:
    """Signals of the vision encoder, all without CLS.

    ``features``: what the projector consumes (LLaVA: hidden states of layer -2), ``(batch, tokens, dim)``.
    ``cls_attention``: attention from CLS to each patch at that layer, mean over heads, ``(batch, tokens)``.
    ``keys``: key vectors of that layer before they are split into heads, ``(batch, tokens, key_dim)``.
    ``similarity``: mean of late hidden states, used only for cosine similarity (Nüwa's S̄), ``(batch, tokens, dim)``.
    ``image_ids``: content digests; they seed what is random, so that no result depends on batch or order.
    """

    grid: PatchGrid
    features: Tensor
    cls_attention: Tensor
    keys: Tensor
    similarity: Tensor
    image_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        expected = (len(self.image_ids), self.grid.tokens)
        for name in ("features", "cls_attention", "keys", "similarity"):
            if tuple(getattr(self, name).shape[:2]) != expected:
                raise ValueError(
                    f"signals.{name} has shape {tuple(getattr(self, name).shape)}; its first two sizes must be "
                    f"{expected}: images and tokens of the {self.grid.height}x{self.grid.width} grid"
                )

    @property
    def key_norm(self) -> Tensor:
        """``‖k‖₂`` of every patch, ``(batch, tokens)`` float32."""
        return self.keys.float().norm(dim=-1)

    def __getitem__(self, rows: slice) -> VisionSignals:
        """A slice of the batch."""
        return VisionSignals(
            self.grid,
            self.features[rows],
            self.cls_attention[rows],
            self.keys[rows],
            self.similarity[rows],
            self.image_ids[rows],
        )


def seeded_generator(seed: int, *identity: str) -> np.random.Generator:
    """A generator that depends on ``seed`` and on content only."""
    return np.random.default_rng([seed, *(byte for part in identity for byte in part.encode() + b"\0")])


def ranked(scores: Tensor) -> Tensor:
    """Indices by falling score along the last axis; equal scores keep the lower index first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def top_indices(scores: Tensor, keep: int) -> Tensor:
    """The ``keep`` best of ``(batch, tokens)`` scores, in raster order: ``(batch, keep)``; ties go to the lower index."""
    return ranked(scores)[..., :keep].sort(dim=-1).values
