"""The layout of every image, from its size alone, and of several images in one question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from nuwa.layout import InterleavedLayout, VisualLayout
from nuwa.vlm import Adapter
from pipelines.data.image_keys import shows_several
from pipelines.features.faults import ImpossibleImage

MOST_TOKENS = np.iinfo(np.int16).max  # slots stand as such numbers in the tables of results


def layouts_of(vlm: Adapter, sizes: Mapping[str, tuple[int, int]]) -> dict[str, VisualLayout]:
    """The layout of every image from its width and height; raises :class:`ImpossibleImage` naming the first that has none."""
    of = cache(vlm.layout_of)
    layouts = {}
    for image, (width, height) in sizes.items():
        try:
            layouts[image] = of((width, height))
        except ValueError as error:
            raise ImpossibleImage(
                f"image {image[:12]} of {width}x{height} pixels: the model takes no such image ({error}); take its rows "
                "out of the benchmark's table"
            ) from None
    return layouts


def image_layouts(vlm: Adapter, table: pd.DataFrame) -> dict[str, VisualLayout]:
    """The layout of what each question of ``table`` shows, by its key (:mod:`pipelines.data.image_keys`); ``vlm`` needs no
    weights. Several images stand in one sequence, with the tokens between them that the model's prompt has there."""
    rows = table.drop_duplicates("image")
    keys = rows["image"].tolist()
    sizes = dict(zip(keys, zip(rows["width"].tolist(), rows["height"].tolist(), strict=True), strict=True))
    shown = dict(zip(keys, rows["images"].tolist(), strict=True)) if "images" in rows else {}
    layouts = layouts_of(vlm, {key: size for key, size in sizes.items() if not shows_several(key)})

    for key in filter(shows_several, keys):
        layouts[key] = _together(vlm, key, shown[key])
    return {key: layouts[key] for key in keys}


def _together(vlm: Adapter, key: str, shown: Sequence[Mapping[str, Any]]) -> InterleavedLayout:
    """Of the images ``shown`` by one question; raises :class:`ImpossibleImage`."""
    sizes = {one["image"]: (one["width"], one["height"]) for one in shown}
    alone = layouts_of(vlm, sizes)
    layout = interleaved(vlm, [alone[one["image"]] for one in shown])
    if layout.tokens > MOST_TOKENS:
        raise ImpossibleImage(
            f"images {key[:12]} …: {len(shown)} in one question come to {layout.tokens} visual tokens, and at most "
            f"{MOST_TOKENS} can be recorded; lower model.max_pixels"
        )
    return layout


def interleaved(vlm: Adapter, images: Sequence[VisualLayout]) -> InterleavedLayout:
    """Of images that stand before a question's text."""
    between = vlm.encode_prompt("?", len(images)).between
    return InterleavedLayout.of(images, [len(text) for text in between])
