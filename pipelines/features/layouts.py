"""The layout of every image, from its size alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import pandas as pd

from nuwa.layout import VisualLayout
from nuwa.vlm import Adapter
from pipelines.features.faults import ImpossibleImage


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
    """The layout of every image of the questions in ``table``; ``vlm`` needs no weights."""
    rows = table.drop_duplicates("image")
    sizes = zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)
    return layouts_of(vlm, dict(zip(rows["image"].tolist(), sizes, strict=True)))
