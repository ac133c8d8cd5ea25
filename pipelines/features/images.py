"""Images of ``images.parquet``, as people see them (:mod:`nuwa.images`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from nuwa.images import ImageError, read_image
from pipelines.features.faults import BrokenImages


def read_images(path: Path, images: Sequence[str]) -> dict[str, Image.Image]:
    """Decoded RGB images of ``images.parquet`` by digest; raises :class:`BrokenImages`."""
    decoded, broken = decode_images(path, images)
    if broken:
        raise BrokenImages.found(broken, path)
    return decoded


def decode_images(path: Path, images: Sequence[str]) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """Decoded RGB images of ``images.parquet`` by digest, and digest → fault of those that cannot be decoded."""
    groups = _row_groups(path, path.stat().st_mtime_ns)
    held = pq.ParquetFile(path)
    table = held.read_row_groups(sorted({groups[image] for image in images}), columns=["image", "bytes"])
    table = table.filter(pc.is_in(table["image"], pa.array(images, pa.string())))
    decoded, broken = {}, {}
    for digest, content in zip(table["image"].to_pylist(), table["bytes"].to_pylist(), strict=True):
        try:
            decoded[digest] = read_image(content)
        except ImageError as error:
            broken[digest] = error.fault
    return decoded, broken


@cache
def _row_groups(path: Path, _changed: int) -> dict[str, int]:
    """The row group of every image: a file of many gigabytes is not searched for each batch."""
    held = pq.ParquetFile(path)
    lengths = [held.metadata.row_group(number).num_rows for number in range(held.num_row_groups)]
    names = held.read(columns=["image"])["image"].to_pylist()
    return dict(zip(names, np.repeat(np.arange(len(lengths)), lengths).tolist(), strict=True))
