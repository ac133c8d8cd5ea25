"""The feature store: what the vision encoder says of an image, encoded once, addressed by content.

A store is a folder per encoder identity (weights, layers read, preprocessing, dtype, signals kept), local or behind a
storage URI. A shard holds images of one layout: one Arrow IPC file beside a small JSON manifest that is written last:
size, layout, the images it holds and a checksum of each. A shard without a manifest, or that does not match it, is never
used; it is encoded again.

Readers map shards and hand out what is mapped, without a copy where the images stand side by side. An image's checksum
is compared the first time a process reads it, so a worker starts without reading a store through, and no damaged byte
is ever used. Shards of a remote store are fetched once per machine.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from nuwa.layout import VisualLayout, layout_from_json, layout_to_json
from nuwa.signals import OPTIONAL_SIGNALS, SIGNAL_NAMES
from pipelines.features.faults import MissingFeatures
from pipelines.files.atomic import atomic_path
from pipelines.files.storage import Folder

CACHE_BYTES = 1024**3  # what a worker keeps of what it read


SHARD_CACHE = Path(tempfile.gettempdir()) / f"nuwa-features-{os.getuid()}"  # shards of remote stores, on each machine


@dataclass(frozen=True)
class Shard:
    """What a manifest says: the Arrow file's name and bytes, its images, the CRC-32 of each one's signals, their layout."""

    name: str
    size: int
    images: tuple[str, ...]
    checksums: tuple[int, ...]
    layout: VisualLayout

    @classmethod
    def parse(cls, manifest: str, content: bytes) -> Shard | None:
        """``None`` for a manifest that is none."""
        try:
            held = json.loads(content)
            images, sums = tuple(held["images"]), tuple(held["checksums"])
            size, layout = held["size"], layout_from_json(held["layout"])
        except (ValueError, KeyError, TypeError):
            return None
        whole = len(images) == len(sums) and isinstance(size, int)
        return cls(f"{Path(manifest).stem}.arrow", size, images, sums, layout) if whole else None

    @property
    def manifest(self) -> str:
        return f"{Path(self.name).stem}.json"


class MappedShard:
    """The signals of a shard as arrays ``(images, ...)`` over its mapped file.

    The mapping is private: the arrays can be written to, as torch wants, and the file never changes.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        """Raises ``OSError`` or ``pa.ArrowInvalid`` for a file that is not what ``shard`` says."""
        if path.stat().st_size != shard.size:
            raise OSError(f"{path.stat().st_size} bytes, not {shard.size}")
        with open(path, "rb") as content:
            mapped = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_COPY)
        whole = pa.py_buffer(mapped)
        batch = pa.ipc.open_file(whole).get_batch(0)
        if batch.num_rows != len(shard.images):
            raise OSError(f"{batch.num_rows} images, not {len(shard.images)}")
        self.signals: dict[str, np.ndarray] = {}
        for key in batch.schema.names[1:]:
            stored = batch.column(key).to_numpy_ndarray()
            offset = stored.__array_interface__["data"][0] - whole.address
            self.signals[key] = np.ndarray(stored.shape, stored.dtype, mapped, offset)
        self.shard, self.checked = shard, np.zeros(batch.num_rows, bool)

    def matches(self, row: int) -> bool:
        """Whether the image in ``row`` is what was written; looked at once."""
        if not self.checked[row]:
            found = checksum([values[row] for values in self.signals.values()])
            self.checked[row] = found == self.shard.checksums[row]
        return bool(self.checked[row])


def checksum(signals: Sequence[np.ndarray]) -> int:
    """CRC-32 of one image's signals, in the order they are stored."""
    value = 0
    for array in signals:
        value = zlib.crc32(np.ascontiguousarray(array).data.cast("B"), value)
    return value


class FeatureStore:
    """Reads and writes the shards of one encoder identity under ``root``, a folder or a storage URI.

    ``cache_bytes``: how much of what was read this process keeps, so that a worker reads an image from disk once
    however many trials use it; 0 hands out the mapped file.
    """

    def __init__(self, root: Path | str, identity: str, cache_bytes: int = CACHE_BYTES) -> None:
        self.storage = Folder.at(root, identity)
        self.identity = identity
        self.folder = self.storage.local or SHARD_CACHE / identity
        self.cache_bytes = cache_bytes
        self._held: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()
        self._held_bytes = 0
        self._mapped: dict[str, MappedShard] = {}
        self._index: dict[str, tuple[Shard, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read all manifests; unreadable ones count as absent."""
        self._index = {}
        for manifest in self.storage.sizes(".json"):
            shard = Shard.parse(manifest, self.storage.read(manifest))
            if shard is not None:
                self._index.update({image: (shard, row) for row, image in enumerate(shard.images)})

    def discard_damaged(self) -> list[str]:
        """Remove shards that do not match their manifests, and leftovers of interrupted writes; return their names.

        Sizes are always compared. A local file that changed after its manifest was written is read through as well;
        what no time stamp shows is found by the checksum of the first reader.
        """
        shards = {shard.name: shard for shard, _ in self._index.values()}
        sizes = self.storage.sizes(".arrow")
        damaged = [name for name, shard in shards.items() if sizes.get(name) != shard.size or not self._intact(shard)]
        damaged += [name for name in sizes if name not in shards]
        for name in damaged:
            self._remove(name)
        if self.storage.local is not None:
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        self.refresh()
        return damaged

    def _intact(self, shard: Shard) -> bool:
        if self.storage.local is None:
            return True
        path = self.folder / shard.name
        if path.stat().st_mtime_ns <= (self.folder / shard.manifest).stat().st_mtime_ns:
            return True
        try:
            mapped = MappedShard(path, shard)
        except (OSError, pa.ArrowException, KeyError):
            return False
        return all(mapped.matches(row) for row in range(len(shard.images)))

    def _remove(self, name: str) -> None:
        """The manifest goes first, so that no one takes what is left for a shard."""
        self._mapped.pop(name, None)
        for gone in (f"{Path(name).stem}.json", name):
            self.storage.remove(gone)
            (self.folder / gone).unlink(missing_ok=True)

    def missing(self, images: Sequence[str]) -> list[str]:
        return [image for image in images if image not in self._index]

    def by_layout(self, images: Sequence[str]) -> dict[VisualLayout, tuple[str, ...]]:
        """``images`` grouped by layout, in their order; raises :class:`MissingFeatures`."""
        self._refuse_missing(images)
        groups: dict[VisualLayout, list[str]] = {}
        for image in images:
            groups.setdefault(self._index[image][0].layout, []).append(image)
        return {layout: tuple(mine) for layout, mine in groups.items()}

    def write(self, images: Sequence[str], signals: Mapping[str, Tensor], layout: VisualLayout) -> str:
        """Store ``signals`` (each ``(images, layout.patches, ...)``) as one shard, visible only when whole; returns its
        name."""
        name = hashlib.sha256("".join(images).encode()).hexdigest()[:24]
        columns, fields = [pa.array(list(images), pa.string())], [pa.field("image", pa.string())]
        names = [key for key in (*SIGNAL_NAMES, *OPTIONAL_SIGNALS) if key in signals]
        arrays = [np.ascontiguousarray(signals[key].numpy()) for key in names]
        for key, array in zip(names, arrays, strict=True):
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(array)
            columns.append(column)
            fields.append(pa.field(key, column.type))
        batch = pa.record_batch(columns, schema=pa.schema(fields))
        path = self.folder / f"{name}.arrow"
        with atomic_path(path) as fresh:
            with pa.OSFile(str(fresh), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            size = fresh.stat().st_size
        if self.storage.local is None:
            self.storage.publish(path, path.name)
        sums = [checksum([array[row] for array in arrays]) for row in range(len(images))]
        manifest = {"size": size, "layout": layout_to_json(layout), "images": list(images), "checksums": sums}
        self.storage.write(f"{name}.json", json.dumps(manifest).encode())
        return path.name

    def _open(self, shard: Shard) -> MappedShard:
        """Map a shard; one of a remote store is fetched to this machine first."""
        if shard.name not in self._mapped:
            path = self.folder / shard.name
            try:
                if self.storage.local is None and not (path.exists() and path.stat().st_size == shard.size):
                    self.storage.fetch(shard.name, path)
                self._mapped[shard.name] = MappedShard(path, shard)
            except (FileNotFoundError, OSError, pa.ArrowException, KeyError) as error:
                raise self._damaged(shard, str(error)) from None
        return self._mapped[shard.name]

    def _damaged(self, shard: Shard, fault: str) -> MissingFeatures:
        """Remove the shard, so that the next run encodes it again."""
        self._remove(shard.name)
        return MissingFeatures(
            f"{self.storage.place}/{shard.name} is damaged or gone ({fault}) and is removed; "
            "`dvc repro -f features` encodes it again"
        )

    def read(self, images: Sequence[str]) -> dict[str, Tensor]:
        """Signals of ``images`` of one layout in their order, in the stored dtype; raises :class:`MissingFeatures`."""
        self._refuse_missing(images)
        if self.cache_bytes:
            rows = [self._held_row(image) for image in images]
            return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
        return self._mapped_rows([self._find(image) for image in images])

    def _refuse_missing(self, images: Sequence[str]) -> None:
        absent = self.missing(images)
        if absent:
            raise MissingFeatures(
                f"{len(absent)} of {len(images)} images are not in {self.storage.place}, first {absent[0][:12]}; "
                "`dvc repro -f features` encodes them"
            )

    def _find(self, image: str) -> tuple[MappedShard, int]:
        """Where ``image`` is mapped, its checksum compared."""
        shard, row = self._index[image]
        mapped = self._open(shard)
        if not mapped.matches(row):
            raise self._damaged(shard, f"image {image[:12]} fails its checksum")
        return mapped, row

    def _held_row(self, image: str) -> dict[str, np.ndarray]:
        """The signals of one image, kept while there is room; what was used longest ago goes first."""
        if image in self._held:
            self._held.move_to_end(image)
            return self._held[image]
        mapped, row = self._find(image)
        found = {key: values[row].copy() for key, values in mapped.signals.items()}
        size = sum(array.nbytes for array in found.values())
        while self._held and self._held_bytes + size > self.cache_bytes:
            _, oldest = self._held.popitem(last=False)
            self._held_bytes -= sum(array.nbytes for array in oldest.values())
        if size <= self.cache_bytes:
            self._held[image] = found
            self._held_bytes += size
        return found

    @staticmethod
    def _mapped_rows(places: Sequence[tuple[MappedShard, int]]) -> dict[str, Tensor]:
        """Rows of mapped shards; where they stand side by side, without a copy."""
        shard, start = places[0]
        if all(mapped is shard and row == start + step for step, (mapped, row) in enumerate(places)):
            run = slice(start, start + len(places))
            return {key: torch.from_numpy(values[run]) for key, values in shard.signals.items()}
        return {
            key: torch.from_numpy(np.stack([mapped.signals[key][row] for mapped, row in places]))
            for key in shard.signals
        }
