"""What a stage-1 method may read of an encoded batch of images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nuwa.grid import PatchGrid

SIGNAL_NAMES = ("features", "cls_attention", "keys", "similarity")
NORM_EPSILON = 1e-12  # a vector shorter than this is like nothing, not even like itself


@dataclass(frozen=True)
class VisionSignals:
    """Signals of the vision encoder, all without CLS, of images that share one grid. Null: not kept.

    Images of other grids go into batches of their own: a result never depends on who else is in the batch.

    ``features``: what the projector consumes (LLaVA: hidden states of layer -2), ``(batch, tokens, dim)``.
    ``cls_attention``: attention from CLS to each patch at that layer, mean over heads, ``(batch, tokens)``. Of an
    encoder without CLS: the attention a token receives, mean over heads and queries.
    ``keys``: key vectors of that layer before they are split into heads, ``(batch, tokens, key_dim)``.
    ``similarity``: mean of late hidden states, used only for cosine similarity (Nüwa's S̄), ``(batch, tokens, dim)``.
    ``image_ids``: content digests; they seed what is random, so that no result depends on batch or order.
    ``encoder``: fingerprint of the encoder, checked by methods that were trained on one; null where it is not known.
    ``resized``: encodes the same images again, made smaller so that they have the given grid: features
    ``(batch, grid.tokens, dim)``; null where the images are not at hand.
    """

    grid: PatchGrid
    features: Tensor
    cls_attention: Tensor | None
    keys: Tensor | None
    similarity: Tensor | None
    image_ids: tuple[str, ...]
    encoder: str | None = None
    resized: Callable[[PatchGrid], Tensor] | None = None

    def __post_init__(self) -> None:
        expected = (len(self.image_ids), self.grid.tokens)
        for name in SIGNAL_NAMES:
            signal = getattr(self, name)
            if signal is not None and tuple(signal.shape[:2]) != expected:
                raise ValueError(
                    f"signals.{name} has shape {tuple(signal.shape)}; its first two sizes must be "
                    f"{expected}: images and tokens of the {self.grid.height}x{self.grid.width} grid"
                )

    @property
    def key_norm(self) -> Tensor:
        """``‖k‖₂`` of every patch, ``(batch, tokens)`` float32."""
        return self.keys.float().norm(dim=-1)

    def to(self, device: torch.device) -> VisionSignals:
        """The same on ``device``; nothing is copied where they are there already."""
        signals = {name: getattr(self, name) for name in SIGNAL_NAMES}
        moved = {name: signal.to(device) for name, signal in signals.items() if signal is not None}
        return dataclasses.replace(self, **moved)

    def __getitem__(self, rows: slice) -> VisionSignals:
        """A slice of the batch."""
        signals = (getattr(self, name) for name in SIGNAL_NAMES)
        return VisionSignals(
            self.grid,
            *(None if signal is None else signal[rows] for signal in signals),
            self.image_ids[rows],
            self.encoder,
            None if self.resized is None else lambda grid: self.resized(grid)[rows],
        )


def seeded_generator(seed: int, *identity: str) -> np.random.Generator:
    """A generator that depends on ``seed`` and on content only."""
    return np.random.default_rng([seed, *(byte for part in identity for byte in part.encode() + b"\0")])


def random_scores(seed: int, image_ids: tuple[str, ...], tokens: int, device: torch.device) -> Tensor:
    """A random number for every token of every image, ``(batch, tokens)`` int64: SplitMix64, started by seed and image.

    Integer arithmetic, so that CPU and GPU draw the same; all images at once, yet none depends on the others.
    """
    digests = [hashlib.sha256(f"{seed}\0{image}".encode()).digest()[:8] for image in image_ids]
    start = torch.from_numpy(np.frombuffer(b"".join(digests), dtype="<i8").copy()).to(device)
    state = start[:, None] + torch.arange(1, tokens + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _signed(word: int) -> int:
    """A 64-bit word as the signed integer with the same bits; products wrap around alike."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: Tensor, by: int) -> Tensor:
    """Right shift that brings in zeros, which ``>>`` does not do for negative integers."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def directions(vectors: Tensor) -> Tensor:
    """Vectors at length 1 along the last axis, in float64; a zero vector stays zero."""
    unit = vectors.to(torch.float64, copy=True)  # then in place: a batch's vectors in float64 are large
    return unit.div_(unit.norm(dim=-1, keepdim=True).clamp_(min=NORM_EPSILON))


def cosine_similarity(left: Tensor, right: Tensor) -> Tensor:
    """Cosines of :func:`directions` ``(batch, left, dim)`` and ``(batch, right, dim)``: ``(batch, left, right)`` float32.

    Summed in float64 and rounded to multiples of 2⁻²⁴. Matrix kernels sum in an order that depends on the shape and on
    the place in it, so the last bits of equal cosines differ, and a choice between them would depend on the batch.
    After rounding equal cosines are equal, and ties go to the lower index.
    """
    return (left @ right.transpose(1, 2)).mul_(2**24).round_().mul_(2**-24).float()


def ranked(scores: Tensor) -> Tensor:
    """Indices by falling score along the last axis; equal scores keep the lower index first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def top_indices(scores: Tensor, keep: int) -> Tensor:
    """The ``keep`` best of ``(batch, tokens)`` scores, in raster order: ``(batch, keep)``; ties go to the lower index."""
    return ranked(scores)[..., :keep].sort(dim=-1).values
