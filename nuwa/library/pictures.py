"""What a call takes for an image: a file, encoded bytes, a Pillow image, an array or a tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nuwa.generation import image_id
from nuwa.images import image_size, read_image, upright_rgb
from nuwa.library.refusal import CallError, kind_of, shown

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}  # of an array, and the picture's mode
TAKEN = "a path, bytes of an image file, a Pillow image, an array or a tensor"


@dataclass(frozen=True)
class Picture:
    """One image of a call, before it is encoded.

    ``key``: equal where an image comes again: a file's real path, or the digest of bytes or pixels. ``size``: width and
    height as a person sees it. A file is read when its turn comes and not kept.
    """

    given: Any
    key: str
    size: tuple[int, int]

    def read(self) -> Image.Image:
        """As RGB; raises :class:`nuwa.images.ImageError` where a file's pixels cannot be decoded."""
        return _read(self.given)


def is_image(value: Any) -> bool:
    """Whether ``value`` is meant as one image, rather than as several."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim <= 3
    return isinstance(value, (str, bytes, os.PathLike, Image.Image))


def picture(given: Any) -> Picture:
    """An image as it was given, looked over: of files the header, of all else the pixels.

    Raises ``ValueError`` in one line: :class:`nuwa.images.ImageError`, or :class:`CallError` where it is no image.
    """
    if isinstance(given, (str, os.PathLike)):
        path = _path(given)
        return Picture(path, f"file {os.path.realpath(path)}", image_size(path))
    if isinstance(given, bytes):
        return Picture(given, f"bytes {hashlib.sha256(given).hexdigest()}", image_size(given))
    if isinstance(given, (np.ndarray, torch.Tensor, Image.Image)):
        pixels = _read(given)
        return Picture(given, image_id(pixels), pixels.size)
    raise CallError(f"{kind_of(given)} is no image; give {TAKEN}")


def _path(given: str | os.PathLike[str]) -> Path:
    text = os.fspath(given)
    if text.startswith(("http://", "https://", "data:")):
        raise CallError(f"{shown(text)} is no path; fetch the image and give {TAKEN}")
    path = Path(text).expanduser()
    if not path.is_file():
        raise CallError(f"there is no file {text!r}")
    return path


def _read(given: Any) -> Image.Image:
    if isinstance(given, (Path, bytes)):
        return read_image(given)
    if isinstance(given, Image.Image):
        return upright_rgb(given)
    return upright_rgb(_from_array(given))


def _from_array(given: np.ndarray | torch.Tensor) -> Image.Image:
    """Pixels ``(height, width)``, ``(height, width, channels)`` or ``(channels, height, width)`` as a picture.

    Bytes are taken as they are, floats as shares of white.
    """
    named = f"{kind_of(given)} of shape {tuple(given.shape)}"
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    pixels = _channels_last(given, named)

    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):
            raise CallError(
                f"{named} has values from {low:g} to {high:g}; floats are shares of white in [0, 1], whole numbers uint8"
            )
        pixels = np.round(pixels.astype(np.float64) * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise CallError(f"{named} is of dtype {pixels.dtype}; allowed: uint8, or floats in [0, 1]")
    mode = CHANNELS[pixels.shape[2]]
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if mode == "L" else pixels))


def _channels_last(pixels: np.ndarray, named: str) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    first, last = (pixels.ndim == 3 and pixels.shape[axis] in CHANNELS for axis in (0, -1))
    if not pixels.size or not (first or last):
        raise CallError(
            f"{named} is no image; allowed: (height, width), (height, width, channels) or (channels, height, width) "
            "with 1, 3 or 4 channels"
        )
    if first and last and pixels.shape[0] != 1:
        raise CallError(f"{named} has its channels first or last, which cannot be told; give a Pillow image")
    return pixels if last else pixels.transpose(1, 2, 0)


def embedded(part: Mapping[str, Any]) -> Any:
    """The image that a part of a chat message holds, under one of the usual keys; null: a mere place for one."""
    held = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
    if len(held) > 1:
        raise CallError("a message's image has one of image, path and url, not several")
    return held[0] if held else None
