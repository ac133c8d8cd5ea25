"""What a stage-1 method may read of an encoded batch of images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nuwa.grid import PatchGrid

SignalName = Literal[
    "features",
    "cls_attention",
    "keys",
    "similarity",
    "early_attention",
    "received_middle",
    "received_late",
    "last_attention",
    "last_keys",
]
SIGNAL_NAMES: tuple[SignalName, ...] = (
    "features",
    "cls_attention",
    "keys",
    "similarity",
)  # what every encoder gives, asked or not
OPTIONAL_SIGNALS: tuple[SignalName, ...] = (
    "early_attention",
    "received_middle",
    "received_late",
    "last_attention",
    "last_keys",
)  # given, and cached, only where one is read
LAST_SIGNALS = ("last_attention", "last_keys")  # of these, what encoders say with ``offers_last``
# Shares of attention among thousands of tokens fall below what float16 holds in full precision.
ATTENTION_SIGNALS = ("cls_attention", "early_attention", "received_middle", "received_late", "last_attention")
# What a method may read and no encoder gives: made of another signal when it is read, and never cached.
DERIVED_SIGNALS = {"projected": "features", "relevance": "features"}
VIEW_SIGNALS = (*SIGNAL_NAMES, *OPTIONAL_SIGNALS, *DERIVED_SIGNALS)
# Null where no method of the run reads it. A method declares what it reads and is never handed less, so it takes the
# signal for a tensor without asking.
Declared: TypeAlias = Tensor | Any
SMALLEST_HALF = 96  # rows below which a product of all pairs is made whole
NORM_EPSILON = 1e-12  # a vector shorter than this is like nothing, not even like itself


@dataclass(frozen=True, kw_only=True)
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
    ``heads``: attention heads that ``keys`` are split into, side by side; 1 where that is not known.
    ``deep``: how many vectors of each token's ``features`` enter the language model above its first layer; they stand
    behind the one that enters there, as many again, and follow wherever it goes (Qwen3-VL).

    Further ones, only where a method reads them:

    ``early_attention``: as ``cls_attention``, of an early layer: the 6th of 24 of a CLIP tower; of Qwen2.5-VL the
    attention received in the first block that attends to the whole image (the 8th of 32).
    ``received_middle``, ``received_late``: attention a token receives, mean over heads and all queries, the CLS token's
    among them, ``(batch, tokens)``: at the 9th of 24 layers of a CLIP tower and at the layer of ``features``; of
    Qwen2.5-VL at the middle block (the 16th of 32) and the last.
    ``last_attention``, ``last_keys``: attention from CLS to each patch, ``(batch, tokens)``, and keys, ``(batch, tokens,
    key_dim)``, of a CLIP tower's last layer, whose queries and keys are taken for one head of full width.
    ``relevance``: cosine between a token and a question, mean over the question's segments, ``(batch, tokens)``; by
    CLIP's two projections. The batch is then of questions, each with its own image's signals.
    ``projected``: ``features`` behind the projector, ``(batch, tokens, language_dim)``; ``project`` makes them.
    """

    grid: PatchGrid
    features: Tensor
    cls_attention: Declared
    keys: Declared
    similarity: Declared
    image_ids: tuple[str, ...]
    encoder: str | None = None
    resized: Callable[[PatchGrid], Tensor] | None = None
    heads: int = 1
    deep: int = 0
    early_attention: Declared = None
    received_middle: Declared = None
    received_late: Declared = None
    last_attention: Declared = None
    last_keys: Declared = None
    relevance: Declared = None
    projected: Declared = None
    project: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.keys is not None and (self.heads < 1 or self.keys.shape[-1] % self.heads):
            raise ValueError(f"signals.heads {self.heads} does not divide keys of width {self.keys.shape[-1]}")
        expected = (len(self.image_ids), self.grid.tokens)
        for name, signal in self.tensors.items():
            if tuple(signal.shape[:2]) != expected:
                raise ValueError(
                    f"signals.{name} has shape {tuple(signal.shape)}; its first two sizes must be "
                    f"{expected}: images and tokens of the {self.grid.height}x{self.grid.width} grid"
                )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The signals that are at hand, by name."""
        return {name: signal for name in VIEW_SIGNALS if (signal := getattr(self, name)) is not None}

    def compared(self, values: Tensor) -> Tensor:
        """Of ``features`` or ``projected`` ``(..., dim)`` the part by which tokens are compared, without the deep vectors."""
        return values[..., : values.shape[-1] // (1 + self.deep)]

    def with_derived(self, names: tuple[str, ...]) -> VisionSignals:
        """The same, ``projected`` made of the features where it is among ``names`` and not at hand."""
        if "projected" not in names or self.projected is not None or self.project is None:
            return self
        return dataclasses.replace(self, projected=self.project(self.features))

    @property
    def key_norm(self) -> Tensor:
        """``‖k‖₂`` of every patch, ``(batch, tokens)`` float32."""
        return self.keys.float().norm(dim=-1)

    def to(self, device: torch.device) -> VisionSignals:
        """The same on ``device``; nothing is copied where they are there already."""
        moved: dict[str, Any] = {name: signal.to(device) for name, signal in self.tensors.items()}
        return dataclasses.replace(self, **moved)

    def __getitem__(self, rows: slice) -> VisionSignals:
        """A slice of the batch."""
        return self.at(range(len(self.image_ids))[rows])

    def at(self, rows: Sequence[int]) -> VisionSignals:
        """The signals of ``rows`` of the batch, which may repeat."""
        rows, encode = list(rows), self.resized
        resized = None if encode is None else lambda grid: encode(grid)[rows]
        part: dict[str, Any] = {name: signal[rows] for name, signal in self.tensors.items()}
        ids = tuple(self.image_ids[row] for row in rows)
        return dataclasses.replace(self, **part, image_ids=ids, resized=resized)


def seeded_generator(seed: int, *identity: str) -> np.random.Generator:
    """A generator that depends on ``seed`` and on content only."""
    content = np.frombuffer(b"".join(part.encode() + b"\0" for part in identity), dtype=np.uint8)
    # One array of words: of a list numpy would make the same words, number by number.
    return np.random.default_rng([seed, content.astype(np.uint32)])  # type: ignore[arg-type]  # numpy does


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
    return rounded(left @ right.transpose(1, 2))


def rounded(cosines: Tensor) -> Tensor:
    """The nearest multiples of 2⁻²⁴, as float32; what is passed is used up."""
    return cosines.mul_(2**24).round_().mul_(2**-24).float()


def products_of_pairs(vectors: Tensor, span: int | None = None) -> Tensor:
    """Products of all pairs of ``(tokens, dim)``: ``(tokens, tokens)``.

    Below the diagonal nearly all is copied, which takes half of the multiplications of a plain product. Of ``span``
    channels at a time, if that is given: their sums, one after the other, are off by less than one sum over all.
    """
    products = vectors.new_empty(len(vectors), len(vectors))
    _fill_products(vectors.split(span or vectors.shape[1], dim=1), products)
    return products


def _fill_products(parts: Sequence[Tensor], products: Tensor) -> None:
    half = len(products) // 2
    if half < SMALLEST_HALF:
        _add_products(parts, parts, products)
        return
    first, second = [part[:half] for part in parts], [part[half:] for part in parts]
    _add_products(first, second, products[:half, half:])
    products[half:, :half] = products[:half, half:].T
    _fill_products(first, products[:half, :half])
    _fill_products(second, products[half:, half:])


def _add_products(left: Sequence[Tensor], right: Sequence[Tensor], products: Tensor) -> None:
    torch.mm(left[0], right[0].T, out=products)
    for rows, columns in zip(left[1:], right[1:], strict=True):
        products.addmm_(rows, columns.T)


def ranked(scores: Tensor) -> Tensor:
    """Indices by falling score along the last axis; equal scores keep the lower index first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def sole_top(scores: Tensor, keep: int) -> Tensor | None:
    """The ``keep`` best of ``(batch, scores)`` in no order, ``(batch, keep)``; none where equal scores leave open which
    these are, or where asking would make an accelerator wait."""
    count = scores.shape[-1]
    if scores.device.type != "cpu" or not 0 < keep <= count:
        return None
    top = scores.topk(min(keep + 1, count), dim=-1)
    if keep < count and not bool((top.values[..., keep - 1] > top.values[..., keep]).all()):
        return None
    return top.indices[..., :keep]


def top_indices(scores: Tensor, keep: int) -> Tensor:
    """The ``keep`` best of ``(batch, tokens)`` scores, in raster order: ``(batch, keep)``; ties go to the lower index."""
    best = sole_top(scores, keep)
    if best is None:
        best = ranked(scores)[..., :keep]
    return best.sort(dim=-1).values
