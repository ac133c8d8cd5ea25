"""A processor around pixels that are made already, for timing the encoder without the work before it."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor


class _MadePixels:
    """An image processor with the settings of another, which answers every call with ``pixels``."""

    def __init__(self, image_processor: Any, pixels: Mapping[str, Tensor]) -> None:
        self._image_processor = image_processor
        self._pixels = pixels

    def __call__(self, images: Any, **settings: Any) -> Mapping[str, Tensor]:
        return self._pixels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)


def processor_of(image_processor: Any, pixels: Mapping[str, Tensor]) -> SimpleNamespace:
    """What :func:`nuwa.vlm.adapt` takes as a processor: ``pixels``, as ``image_processor`` made them of the images."""
    return SimpleNamespace(image_processor=_MadePixels(image_processor, pixels))
