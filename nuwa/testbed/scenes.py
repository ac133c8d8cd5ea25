"""Scenes: coloured handwritten digits on dimmed photographs.

The handwriting is scikit-learn's bundled UCI set, the backgrounds are crops of its two bundled photographs.
Handwriting is split by sample, so that digits seen in a test scene were never seen in training.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

IMAGE_SIZE = 96
MIN_OBJECTS, MAX_OBJECTS = 2, 5
MIN_SIDE, MAX_SIDE = 20, 32
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (235, 40, 40),
    "green": (40, 210, 60),
    "blue": (70, 90, 255),
    "yellow": (240, 225, 40),
    "cyan": (40, 220, 225),
    "pink": (245, 90, 215),
}
COLOR_NAMES = tuple(COLORS)
# Shares of each digit's samples; the order of the bundled data mixes writers, so a seeded shuffle does the split.
HANDWRITING_SHARES = {"train": 0.75, "validation": 0.05, "test": 0.20}
BACKGROUND_DIM = 0.35
NOISE_SIGMA = 6.0
COLOR_JITTER = 18
# Training handwriting is bent a little, so that 1,350 samples teach a way of writing and not themselves.
BEND = {"rotation": 0.12, "shear": 0.12, "stretch": 0.10}


@dataclass(frozen=True)
class SceneObject:
    """One digit. ``left, top, side`` are pixels of its square box; ``sample`` indexes the handwriting."""

    digit: int
    color: str
    left: int
    top: int
    side: int
    sample: int

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.side / 2, self.top + self.side / 2

    @property
    def bbox(self) -> list[float]:
        """``[x, y, w, h]`` in pixels, as RefCOCO stores it."""
        return [float(self.left), float(self.top), float(self.side), float(self.side)]


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    image: np.ndarray  # (IMAGE_SIZE, IMAGE_SIZE, 3) uint8


@functools.cache
def handwriting(split: str) -> tuple[tuple[np.ndarray, ...], ...]:
    """Handwritten digits of one split: ``handwriting(split)[digit]`` is ``(samples, 8, 8)`` uint8, ink 0..255."""
    from sklearn.datasets import load_digits

    if split not in HANDWRITING_SHARES:
        raise ValueError(f"split {split!r} is unknown; allowed: {', '.join(HANDWRITING_SHARES)}")
    bundle = load_digits()
    ink = np.clip(bundle.images * (255 / 16), 0, 255).astype(np.uint8)
    names = list(HANDWRITING_SHARES)
    edges = np.cumsum([0.0, *HANDWRITING_SHARES.values()])
    rng = np.random.default_rng(20260202)
    chosen = []
    for digit in range(10):
        samples = rng.permutation(np.flatnonzero(bundle.target == digit))
        low, high = (edges[names.index(split) + i] for i in (0, 1))
        chosen.append(ink[samples[round(low * len(samples)) : round(high * len(samples))]])
    return tuple(chosen)


@functools.cache
def _photographs() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


def _background(rng: np.random.Generator) -> np.ndarray:
    photo = _photographs()[rng.integers(len(_photographs()))]
    side = int(rng.integers(IMAGE_SIZE, 300))
    top, left = (int(rng.integers(0, extent - side)) for extent in photo.shape[:2])
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    crop = crop.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(crop, dtype=np.float32) * BACKGROUND_DIM


def _place(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    """Non-overlapping ``(left, top, side)`` squares, by rejection with restarts."""
    while True:
        placed: list[tuple[int, int, int]] = []
        for _ in range(40 * count):
            side = int(rng.integers(MIN_SIDE, MAX_SIDE + 1))
            left, top = (int(v) for v in rng.integers(0, IMAGE_SIZE - side + 1, size=2))
            if all(left >= x + s or x >= left + side or top >= y + s or y >= top + side for x, y, s in placed):
                placed.append((left, top, side))
                if len(placed) == count:
                    return placed


def draw_objects(rng: np.random.Generator, split: str, count: int) -> tuple[SceneObject, ...]:
    """``count`` objects, pairwise different in (digit, colour); colours and digits alone may repeat."""
    ink = handwriting(split)
    pairs = rng.choice(10 * len(COLOR_NAMES), size=count, replace=False)
    objects = []
    for pair, (left, top, side) in zip(pairs, _place(rng, count), strict=True):
        digit, color = divmod(int(pair), len(COLOR_NAMES))
        objects.append(SceneObject(digit, COLOR_NAMES[color], left, top, side, int(rng.integers(len(ink[digit])))))
    return tuple(objects)


def _glyph(rng: np.random.Generator, ink: np.ndarray, side: int, bend: bool) -> np.ndarray:
    """Ink at ``side`` pixels, ``(side, side, 1)`` in 0..1, optionally under a small random affine map."""
    glyph = Image.fromarray(ink).resize((side, side), Image.Resampling.BICUBIC)
    if bend:
        turn, shear = rng.normal(0, BEND["rotation"]), rng.normal(0, BEND["shear"])
        stretch = np.exp(rng.uniform(-BEND["stretch"], BEND["stretch"], size=2))
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        matrix = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag(stretch)
        middle = np.full(2, side / 2)
        offset = middle - matrix @ middle
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        glyph = glyph.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(glyph, dtype=np.float32)[..., None] / 255.0


def render(rng: np.random.Generator, split: str, objects: tuple[SceneObject, ...]) -> np.ndarray:
    """Paint ``objects`` over a fresh background: ``(IMAGE_SIZE, IMAGE_SIZE, 3)`` uint8."""
    canvas = _background(rng)
    ink = handwriting(split)
    for item in objects:
        alpha = _glyph(rng, ink[item.digit][item.sample], item.side, bend=split == "train")
        color = np.asarray(COLORS[item.color]) + rng.uniform(-COLOR_JITTER, COLOR_JITTER, size=3)
        window = canvas[item.top : item.top + item.side, item.left : item.left + item.side]
        window[:] = window * (1 - alpha) + alpha * color
    canvas += rng.normal(0.0, NOISE_SIGMA, size=canvas.shape)
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)


def draw_scene(
    rng: np.random.Generator, split: str, min_objects: int = MIN_OBJECTS, max_objects: int = MAX_OBJECTS
) -> Scene:
    """A random scene whose handwriting comes from ``split`` only; all randomness comes from ``rng``."""
    objects = draw_objects(rng, split, int(rng.integers(min_objects, max_objects + 1)))
    return Scene(objects, render(rng, split, objects))
