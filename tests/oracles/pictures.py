"""Encoder signals of imaginary images, ordinary and adversarial, one image at a time in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

KINDS = ("normal", "ties", "equal", "dark_region", "zero_vectors", "half", "twins", "outliers")
# Height and width: square and not, odd, one line, one patch.
SHAPES = ((6, 6), (5, 7), (1, 9), (9, 1), (4, 10), (3, 3), (1, 1))


@dataclass(frozen=True)
class Picture:
    """One image. ``features`` (N, D), ``attention`` (N,), ``keys`` (N, C) and ``similarity`` (N, D).

    Further ones are made of these and of the name, by default as adversarial as they: ``early`` (attention of an early
    layer), ``middle`` and ``late`` (attention received), ``relevance`` (cosine with a question), each (N,), and
    ``projected`` (N, D).
    """

    name: str
    height: int
    width: int
    features: np.ndarray
    attention: np.ndarray
    keys: np.ndarray
    similarity: np.ndarray
    early: np.ndarray = None
    middle: np.ndarray = None
    late: np.ndarray = None
    relevance: np.ndarray = None
    projected: np.ndarray = None

    def __post_init__(self) -> None:
        """An order of the tokens of its own for every further signal, so that none stands in for another."""
        turned = np.roll(np.arange(self.tokens), 1)
        made = {
            "early": self.attention[turned],
            "middle": self.attention[turned[::-1]],
            "late": self.attention[::-1],
            "relevance": self.similarity[:, 0].clip(-1, 1),
            "projected": np.roll(self.features, 2, axis=0)[:, ::-1],
        }
        for name, signal in made.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.ascontiguousarray(signal))

    @property
    def tokens(self) -> int:
        return self.height * self.width

    def place(self, token: int) -> tuple[int, int]:
        """Row and column of a token in raster order."""
        return divmod(token, self.width)


def draw_picture(seed: int, height: int, width: int, kind: str = "normal", dim: int = 5, key_dim: int = 6) -> Picture:
    """A picture of one of ``KINDS``; the same arguments give the same picture.

    ``ties``: few distinct values, exact in float32. ``equal``: every patch looks alike but for its features.
    ``dark_region``: no salience in the top left 2x2 patches. ``zero_vectors``: every third patch has no feature,
    key or similarity vector. ``half``: float16. ``twins``: four distinct patches, repeated. ``outliers``: a few patches draw
    nearly all attention, the others about the same.
    """
    rng = np.random.default_rng([seed, height, width, KINDS.index(kind)])
    count = height * width

    # Every kind draws these first: what it changes is all that tells it from the ordinary one.
    picture = Picture(
        f"{kind}-{seed}",
        height,
        width,
        features=rng.normal(0, 2, (count, dim)).astype(np.float32),
        attention=rng.dirichlet(np.ones(count)).astype(np.float32),
        keys=rng.normal(size=(count, key_dim)).astype(np.float32),
        similarity=rng.normal(size=(count, dim)).astype(np.float32),
    )
    changed = CHANGES.get(kind)
    return replace(picture, **changed(rng, picture)) if changed else picture


def _ties(rng: np.random.Generator, picture: Picture) -> dict[str, np.ndarray]:
    count, dim = picture.similarity.shape
    return {
        "attention": (rng.integers(0, 3, count) / 4).astype(np.float32),
        "keys": _exact_keys(rng, count, picture.keys.shape[1]),
        "similarity": rng.integers(-1, 2, (count, dim)).astype(np.float32),
    }


def _equal(_rng: np.random.Generator, picture: Picture) -> dict[str, np.ndarray]:
    return {
        "attention": np.full(picture.tokens, 0.25, np.float32),
        "keys": np.ones_like(picture.keys),
        "similarity": np.ones_like(picture.similarity),
    }


def _dark_region(_rng: np.random.Generator, picture: Picture) -> dict[str, np.ndarray]:
    attention = picture.attention.copy()
    attention[[token for token in range(picture.tokens) if max(picture.place(token)) < 2]] = 0
    return {"attention": attention}


def _zero_vectors(_rng: np.random.Generator, picture: Picture) -> dict[str, np.ndarray]:
    made = {name: getattr(picture, name).copy() for name in ("features", "keys", "similarity")}
    for vectors in made.values():
        vectors[::3] = 0
    return made


def _half(_rng: np.random.Generator, picture: Picture) -> dict[str, np.ndarray]:
    return {name: getattr(picture, name).astype(np.float16) for name in DRAWN}


def _twins(rng: np.random.Generator, picture: Picture) -> dict[str, np.ndarray]:
    drawn = rng.integers(0, min(4, picture.tokens), picture.tokens)
    return {name: getattr(picture, name)[drawn] for name in DRAWN}


def _outliers(rng: np.random.Generator, picture: Picture) -> dict[str, np.ndarray]:
    attention = 0.001 + picture.attention / 1000
    attention[rng.choice(picture.tokens, -(-picture.tokens // 8), replace=False)] += 0.5
    return {"attention": attention}


DRAWN = ("features", "attention", "keys", "similarity")
CHANGES: dict[str, Callable[[np.random.Generator, Picture], dict[str, np.ndarray]]] = {
    "ties": _ties,
    "equal": _equal,
    "dark_region": _dark_region,
    "zero_vectors": _zero_vectors,
    "half": _half,
    "twins": _twins,
    "outliers": _outliers,
}


def _exact_keys(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Keys of norm 0, 1, 2 or 4 whose cosines are exact in float32: four entries ±1, the rest 0, then scaled."""
    keys = np.zeros((count, dim), np.float32)
    for key in keys:
        key[rng.choice(dim, 4, replace=False)] = rng.choice([-1, 1], 4)
    return keys * rng.choice([0, 0.5, 1, 2], (count, 1)).astype(np.float32)


def best_first(scores: list[float], among: list[int] | None = None) -> list[int]:
    """Tokens by falling score; of equal scores the lower index comes first."""
    tokens = range(len(scores)) if among is None else among
    return sorted(tokens, key=lambda token: (-scores[token], token))


def norm(vector: np.ndarray) -> float:
    total = 0.0
    for value in vector:
        total += float(value) ** 2
    return total**0.5


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine similarity; 0 where a vector is zero."""
    lengths = norm(one) * norm(other)
    if lengths == 0:
        return 0.0
    return float(np.dot(one.astype(np.float64), other.astype(np.float64))) / lengths


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine to the nearest multiple of 2⁻²⁴, the precision in which similarities are equal."""
    return round(cosine(one, other) * 2**24) / 2**24


def quantile(values: list[float], share: float) -> Fraction:
    """Linear interpolation between order statistics, in exact arithmetic."""
    ordered = sorted(Fraction(value) for value in values)
    rank = Fraction(str(share)) * (len(ordered) - 1)
    below = rank.numerator // rank.denominator
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])
