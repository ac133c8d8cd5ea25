"""What a call takes for an image: a file, encoded bytes, a Pillow image, an array or a tensor."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image

from nuwa.generation import image_id
from nuwa.images import image_size, read_image, upright_rgb
from nuwa.library.refusal import CallError, kind_of, shown

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}  # of an array, and the picture's mode
HOLDING = {
    "image": ("image", "path", "url", "base64"),
    "image_url": ("image_url",),
}  # type of a part → where its image is
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
    return isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image))


def picture(given: Any) -> Picture:
    """An image as it was given, looked over: of files the header, of all else the pixels.

    Raises ``ValueError`` in one line: :class:`nuwa.images.ImageError`, or :class:`CallError` where it is no image.
    """
    if isinstance(given, str) and given.startswith("data:"):
        given = _decoded(given)
    if isinstance(given, (bytearray, memoryview)):
        given = bytes(given)
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
    if text.startswith("file://"):
        text = url2pathname(urlsplit(text).path)
    if text.startswith(("http://", "https://")):
        raise CallError(f"{shown(text)} is no path; fetch the image and give {TAKEN}")
    path = Path(text).expanduser()
    if not path.is_file():
        raise CallError(f"there is no file {text!r}")
    return path


def _decoded(text: str) -> bytes:
    """The bytes of a file that stands in base64 in ``text``, behind the head of a ``data:`` URL or alone."""
    head, _, body = text.rpartition(",")
    try:
        if head and not (head.startswith("data:image/") and head.endswith(";base64")):
            raise binascii.Error
        return base64.b64decode(body, validate=True)
    except ValueError:
        raise CallError(
            f"{shown(text)} is no image in base64; write the bytes of its file so, alone or behind data:image/png;base64,"
        ) from None


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
        if given.layout != torch.strided or given.is_meta or given.is_quantized:
            raise CallError(
                f"{named} does not hold a number for every pixel; give a dense tensor of uint8 or floats in [0, 1]"
            )
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
    keys = HOLDING[part["type"]]
    held = {key: part[key] for key in keys if part.get(key) is not None}
    if len(held) > 1:
        raise CallError(f"a message's image has one of {', '.join(keys[:-1])} and {keys[-1]}, not several")
    if "base64" in held:
        if not isinstance(held["base64"], str):
            raise CallError(f"a message's base64 is of type {kind_of(held['base64'])}; give a string")
        return _decoded(held["base64"])
    if "image_url" in held:
        url = held["image_url"]
        if isinstance(url, Mapping) and set(url) == {"url"}:
            url = url["url"]
        if not isinstance(url, str):
            raise CallError(f"a message's image_url {shown(url)} must be a URL, or a dictionary of url alone")
        return url
    return next(iter(held.values()), None)
