"""Where the visual tokens of an image stand in the language model's sequence, for every kind of encoder.

LLaVA-1.5 has one grid of patches, LLaVA-NeXT a base crop and a stitched local grid whose rows end in a newline token,
Qwen2.5-VL one grid of its own for every image, with three position ids a token, SmolVLM tiles with tokens of text between
them. Stage-1 methods see grids; the decoder sees *slots*: places in the sequence of the unpruned image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nuwa.grid import PatchGrid
from nuwa.selection import Selection, gather_tokens


@dataclass(frozen=True)
class View:
    """One grid of tokens that stage 1 prunes on its own.

    ``crops``: how many crops of the encoder it was stitched from; a budget is dealt out by it.
    ``newline``: whether a learned newline token ends every row. ``closing``: whether one ends the grid as a whole.
    ``leading``: how many tokens of text stand before the grid and say which tile it is.
    """

    grid: PatchGrid
    crops: int = 1
    newline: bool = False
    closing: bool = False
    leading: int = 0

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and column of its tokens in the order of the sequence; a newline token stands one column behind its row, a
        leading one before the first column."""
        rows, width = range(self.grid.height), self.grid.width
        leading = [(0, column) for column in range(-self.leading, 0)]
        ends = [self.newline or (self.closing and row == rows[-1]) for row in rows]
        return leading + [(row, column) for row in rows for column in range(width + ends[row])]


@dataclass(frozen=True)
class VisualLayout:
    """The views of an image in the order of the sequence; images of one layout make a batch.

    ``axes``: position ids a token has. 1: its slot. 3: time, row and column on the grid (M-RoPE).
    ``deep``: how many further vectors of a token enter the language model, one behind each of the first layers.
    """

    views: tuple[View, ...]
    axes: int = 1
    deep: int = 0

    @cached_property
    def fixed(self) -> Tensor:
        """``(tokens,)`` bool: the slots that hold no token of the encoder's, but a newline or a leading one."""
        return torch.tensor([not 0 <= column < view.grid.width for view in self.views for _, column in view.places])

    @property
    def fixed_name(self) -> str:
        """What messages call these."""
        return "tokens that name tiles" if any(view.leading for view in self.views) else "newline tokens"

    @cached_property
    def tokens(self) -> int:
        """Visual tokens of the unpruned image, fixed ones included."""
        return len(self.fixed)

    @property
    def placeholders(self) -> int:
        """How many of them a processor holds the place of with the image placeholder: all but texts."""
        return self.tokens - sum(view.leading for view in self.views)

    @property
    def patches(self) -> int:
        """Tokens that the encoder made: all but fixed ones."""
        return sum(view.grid.tokens for view in self.views)

    @cached_property
    def slots(self) -> tuple[Tensor, ...]:
        """For every view, ``(grid.tokens,)`` int64: the slot of each of its tokens."""
        return (~self.fixed).nonzero()[:, 0].split([view.grid.tokens for view in self.views])

    @cached_property
    def offsets(self) -> Tensor:
        """``(axes, tokens)`` int64: position ids of the unpruned image, counted from where it starts."""
        if self.axes == 1:
            return torch.arange(self.tokens)[None]
        rows, columns = self.views[0].grid.coordinates.long().unbind(-1)
        return torch.stack([torch.zeros_like(rows), rows, columns])

    @property
    def length(self) -> int:
        """How far the unpruned image moves the position of the text behind it."""
        return int(self.offsets.max()) + 1


@dataclass(frozen=True)
class InterleavedLayout(VisualLayout):
    """Several images in one sequence, with texts between them: :meth:`of` makes it.

    ``views`` are those of all images, image by image, and slots count on from image to image; texts have none.
    ``between``: how many tokens of text stand between an image and the next.
    """

    images: tuple[VisualLayout, ...] = ()
    between: tuple[int, ...] = ()

    @classmethod
    def of(cls, images: Sequence[VisualLayout], between: Sequence[int]) -> InterleavedLayout:
        if len(between) != len(images) - 1:
            raise ValueError(f"{len(images)} images have {len(images) - 1} texts between them, not {len(between)}")
        views = tuple(view for image in images for view in image.views)
        return cls(views, images[0].axes, images[0].deep, tuple(images), tuple(between))

    @cached_property
    def owners(self) -> Tensor:
        """``(tokens,)`` int64: the number of the image that a slot belongs to."""
        counts = torch.tensor([image.tokens for image in self.images])
        return torch.arange(len(self.images)).repeat_interleave(counts)

    @cached_property
    def offsets(self) -> Tensor:
        """``(axes, tokens)`` int64: position ids of the unpruned sequence, counted from where its first image starts."""
        placed, start = [], 0
        for image, text in zip(self.images, (*self.between, 0), strict=True):
            placed.append(image.offsets + start)
            start += image.length + text
        return torch.cat(placed, dim=1)


def layout_order(layout: VisualLayout) -> tuple[int, str]:
    """Sorts layouts from small to large; no two have the same place."""
    views = repr(layout.views)
    if isinstance(layout, InterleavedLayout):
        views += repr(([len(image.views) for image in layout.images], layout.between))
    return layout.tokens, views


def layout_to_json(layout: VisualLayout) -> dict[str, Any]:
    """As a manifest keeps it; :func:`layout_from_json` reads it."""
    views = []
    for view in layout.views:
        further = [view.closing, view.leading] if view.leading else [view.closing] if view.closing else []
        views.append([view.grid.height, view.grid.width, view.crops, view.newline, *further])
    return {"views": views, "axes": layout.axes} | ({"deep": layout.deep} if layout.deep else {})


def layout_from_json(held: dict[str, Any]) -> VisualLayout:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for what no layout was written as."""
    views = tuple(View(PatchGrid(height, width), *others) for height, width, *others in held["views"])
    return VisualLayout(views, held["axes"], held.get("deep", 0))


def images_of(layout: VisualLayout) -> tuple[VisualLayout, ...]:
    """The layout of every image of a sequence: of one image, ``layout`` itself."""
    return layout.images if isinstance(layout, InterleavedLayout) else (layout,)


def interleave(layout: InterleavedLayout, selections: Sequence[Selection]) -> Selection:
    """Selections over the slots of every image, as one over those of the sequence."""
    starts = itertools.accumulate((image.tokens for image in layout.images[:-1]), initial=0)
    return Selection(
        torch.cat([one.indices + start for one, start in zip(selections, starts, strict=True)], dim=1),
        torch.cat([one.features for one in selections], dim=1),
        torch.cat([one.pillars for one in selections], dim=1),
        selections[0].projected,
    )


def grid_tokens(layout: VisualLayout, stride: int) -> Tensor:
    """``(tokens,)`` bool: slots in every ``stride``-th row and column of their view; no fixed token is one."""
    flags = torch.zeros(layout.tokens, dtype=torch.bool)
    for view, slots in zip(layout.views, layout.slots, strict=True):
        rows, columns = view.grid.coordinates.long().unbind(-1)
        flags[slots] = (rows % stride == 0) & (columns % stride == 0)
    return flags


def place(layout: VisualLayout, selections: Sequence[Selection]) -> Selection:
    """Selections of every view of some images, each over its grid, as one selection over slots.

    Fixed tokens are put back; their features are zero, because they are no output of the encoder.
    """
    if not layout.fixed.any() and len(selections) == 1:
        return selections[0]
    device, batch = selections[0].indices.device, len(selections[0].indices)
    fixed = layout.fixed.nonzero()[:, 0].to(device).expand(batch, -1)
    chosen = [slots.to(device)[one.indices] for slots, one in zip(layout.slots, selections, strict=True)]
    indices, order = torch.cat([*chosen, fixed], dim=1).sort(dim=1)
    parts = [one.features for one in selections]
    blank = parts[0].new_zeros(batch, fixed.shape[1], parts[0].shape[-1])
    untouched = torch.ones_like(fixed, dtype=torch.bool)
    pillars = torch.cat([*(one.pillars for one in selections), untouched], dim=1)
    features = gather_tokens(torch.cat([*parts, blank], dim=1), order)
    return Selection(indices, features, pillars.gather(1, order), selections[0].projected)
