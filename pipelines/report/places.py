"""Where the tokens of an image lie in its picture: every view's grid as a frame over the image, cell by cell.

A single grid covers the image. LLaVA-NeXT's base view squeezes the whole image into its square; the local grid lies over
the image in its own proportions, centred, and may reach a part of a cell beyond two edges or fall short of them, because
padding is cut away in whole rows or columns. InternVL3's tiles lie side by side. Newline tokens have no place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from transformers import AutoImageProcessor, PretrainedConfig

from nuwa.grid import PatchGrid
from nuwa.image_rules import ImageRules
from nuwa.layout import View, VisualLayout
from nuwa.vlm import adapter_class
from nuwa.vlm.shapes import model_shape

Size = tuple[int, int]  # width and height
EDGE = 1e-6  # of an image's side: what thirds and sevenths leave between tiles


@dataclass(frozen=True)
class Frame:
    """The rectangle of a view's grid, in shares of the image's width and height."""

    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0

    def overlaps(self, other: Frame) -> bool:
        """Whether the two have more in common than an edge."""
        across = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        down = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return min(across, down) > EDGE


@dataclass(frozen=True)
class TokenPlaces:
    """``frames``: one a view of ``layout``. ``size``: of the picture to draw on, in any unit; only its shape counts."""

    layout: VisualLayout
    frames: tuple[Frame, ...]
    size: Size

    @classmethod
    def of_grid(cls, grid: PatchGrid) -> TokenPlaces:
        """One grid over the whole image, drawn with square cells."""
        return cls(VisualLayout((View(grid),)), (Frame(),), (grid.width, grid.height))

    @property
    def panels(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the views that one picture shows together, as they lie side by side; last the finest look.

        That is the one of most views (InternVL3's tiles, beside which the thumbnail lies over all), or else the last.
        """
        panels: list[tuple[int, ...]] = []
        for view, frame in enumerate(self.frames):
            if panels and not any(frame.overlaps(self.frames[other]) for other in panels[-1]):
                panels[-1] += (view,)
            else:
                panels.append((view,))
        return tuple(sorted(panels, key=len))

    def cells(self, view: int, width: int, height: int) -> np.ndarray:
        """``(tokens, 4)`` int: left, top, right and bottom pixel (the last two outside) of every token of ``view`` on a
        canvas of that size, cut off at its edges."""
        grid, frame = self.layout.views[view].grid, self.frames[view]
        across = _edges(frame.left, frame.width, grid.width, width)
        down = _edges(frame.top, frame.height, grid.height, height)
        rows, columns = (part.ravel() for part in np.indices((grid.height, grid.width)))
        return np.stack([across[columns], down[rows], across[columns + 1], down[rows + 1]], axis=1)

    def cells_by_slot(self, views: Sequence[int], width: int, height: int) -> dict[int, list[int]]:
        """The cells of several views by the slots of their tokens."""
        by_slot: dict[int, list[int]] = {}
        for view in views:
            slots = self.layout.slots[view].tolist()
            by_slot |= zip(slots, self.cells(view, width, height).tolist(), strict=True)
        return by_slot


def _edges(start: float, extent: float, cells: int, pixels: int) -> np.ndarray:
    """Pixels between which the cells of one axis lie."""
    edges = (start + extent * np.arange(cells + 1) / cells) * pixels
    return edges.round().astype(int).clip(0, pixels)


def places_of_model(path: str, rules: ImageRules, size: Size) -> TokenPlaces:
    """For an image of ``size`` (width, height) under the model of ``path``, handed over by ``rules``; its weights are not
    needed."""
    config, image_processor = _model(path, rules)
    layout = adapter_class(config.model_type).layout_for(config, image_processor, size)
    return places_of(layout, config, size)


@cache
def _model(path: str, rules: ImageRules) -> tuple[PretrainedConfig, Any]:
    """The configuration has the grids of crops that the processor has under ``rules``."""
    config = copy.copy(model_shape(path))
    image_processor = rules.framed(AutoImageProcessor.from_pretrained(path), config.model_type)
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = image_processor.image_grid_pinpoints
    return config, image_processor


def places_of(layout: VisualLayout, config: PretrainedConfig, size: Size) -> TokenPlaces:
    """``layout``: that of an image of ``size`` (width, height) under the model of ``config``."""
    frames = adapter_class(config.model_type).view_frames(config, layout, size)
    return TokenPlaces(layout, tuple(Frame(*frame) for frame in frames), size)
