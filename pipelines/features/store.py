"""The feature store: what the vision encoder says of an image, encoded once, addressed by content.

A store is a folder per encoder identity (weights, layers read, preprocessing, dtype, signals kept), local or behind a
storage URI. A shard holds images of one layout: one Arrow IPC file beside a small JSON manifest that is written last:
size, layout, the images it holds and a checksum of each. A shard without a manifest, or that does not match it, is never
used; its images are encoded again.

Several drivers may share a store, of several hosts and versions. So files are named by their content and never change;
what cannot be read is left as it is; what is proven damaged, by its length or its checksums, is moved aside; and a shard
whose manifest is yet to come is removed only when nobody can be at it any more.

Readers map shards and hand out what is mapped, without a copy where the images stand side by side. An image's checksum
is compared the first time a process reads it, so a worker starts without reading a store through, and no damaged byte
is ever used. Shards of a remote store are fetched once per machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
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
from nuwa.own_folder import own_folder
from nuwa.signals import OPTIONAL_SIGNALS, SIGNAL_NAMES
from pipelines.features.faults import MissingFeatures, UnreadableFeatures
from pipelines.files.atomic import atomic_path
from pipelines.files.storage import Folder

CACHE_BYTES = 1024**3  # what a worker keeps of what it read
KEPT_FREE = 0.1  # of a machine's disk, beside copies of remote shards


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


class DamagedShard(ValueError):
    """A file that was read, and is not what its manifest says."""


class MappedShard:
    """The signals of a shard as arrays ``(images, ...)`` over its mapped file.

    The mapping is private: the arrays can be written to, as torch wants, and the file never changes.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        """Raises ``OSError`` where the file cannot be read, and :class:`DamagedShard` where it is not what ``shard`` says."""
        with open(path, "rb") as content:
            if (size := os.fstat(content.fileno()).st_size) != shard.size:
                raise DamagedShard(f"{size} bytes, not {shard.size}")
            mapped = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_COPY)
        self.shard, self.checked = shard, np.zeros(len(shard.images), bool)
        try:
            self.signals = self._signals(mapped, len(shard.images))
        except (OSError, pa.ArrowException, KeyError) as error:  # Arrow calls content it cannot read an OSError too
            raise DamagedShard(str(error)) from None

    @staticmethod
    def _signals(mapped: mmap.mmap, images: int) -> dict[str, np.ndarray]:
        whole, signals = pa.py_buffer(mapped), {}
        batch = pa.ipc.open_file(whole).get_batch(0)
        if batch.num_rows != images:
            raise DamagedShard(f"{batch.num_rows} images, not {images}")
        for key in batch.schema.names[1:]:
            stored = batch.column(key).to_numpy_ndarray()
            offset = stored.__array_interface__["data"][0] - whole.address
            signals[key] = np.ndarray(stored.shape, stored.dtype, mapped, offset)
        return signals

    def check(self) -> MappedShard:
        """This shard, every image compared with its checksum; raises :class:`DamagedShard`."""
        for row in range(len(self.shard.images)):
            if not self.matches(row):
                raise DamagedShard(f"image {self.shard.images[row][:12]} fails its checksum")
        return self

    def matches(self, row: int) -> bool:
        """Whether the image in ``row`` is what was written; looked at once."""
        if not self.checked[row]:
            actual = checksum([values[row] for values in self.signals.values()])
            self.checked[row] = actual == self.shard.checksums[row]
        return bool(self.checked[row])


def checksum(signals: Sequence[np.ndarray]) -> int:
    """CRC-32 of one image's signals, in the order they are stored."""
    value = 0
    for array in signals:
        value = zlib.crc32(np.ascontiguousarray(array).data.cast("B"), value)
    return value


def make_room(needed: int) -> None:
    """Let go of this machine's copies of remote shards, those used longest ago first, until ``needed`` bytes fit and
    ``KEPT_FREE`` of the disk stays free. Who has one mapped keeps it."""
    disk = shutil.disk_usage(own_folder(SHARD_CACHE))
    lacking = needed + KEPT_FREE * disk.total - disk.free
    if lacking <= 0:
        return
    copies = []
    for path in SHARD_CACHE.glob("*/*.arrow"):
        with contextlib.suppress(FileNotFoundError):
            copies.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    for _, size, path in sorted(copies):
        if lacking <= 0:
            break
        path.unlink(missing_ok=True)
        lacking -= size


class FeatureStore:
    """Reads and writes the shards of one encoder identity under ``root``, a folder or a storage URI.

    ``cache_bytes``: how much of what was read this process keeps, so that a worker reads an image from disk once
    however many trials use it; 0 hands out the mapped file.
    """

    def __init__(self, root: Path | str, identity: str, cache_bytes: int = CACHE_BYTES) -> None:
        self.storage = Folder.at(root, identity)
        self.identity = identity
        self.folder = self.storage.local or own_folder(SHARD_CACHE) / identity
        self.cache_bytes = cache_bytes
        self._held: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()
        self._held_bytes = 0
        self._mapped: dict[str, MappedShard] = {}
        self._index: dict[str, tuple[Shard, int]] = {}
        self._unfit: list[Shard] = []  # whose file has another size
        self._sizes: dict[str, int] = {}  # of all files of shards
        self._named: set[str] = set()  # those that have a manifest, readable or not
        self.refresh()

    def refresh(self) -> None:
        """Read all manifests; those that are unreadable, and those whose file is not there whole, count as absent."""
        self._index, self._unfit = {}, []
        manifests = self.storage.sizes(".json")
        self._sizes = self.storage.sizes(".arrow")  # after the manifests, so that none seems to come before its file
        self._named = {f"{Path(manifest).stem}.arrow" for manifest in manifests}
        for manifest in manifests:
            try:
                shard = Shard.parse(manifest, self.storage.read(manifest))
            except FileNotFoundError:
                continue
            if shard is not None and self._sizes.get(shard.name) == shard.size:
                self._index.update({image: (shard, row) for row, image in enumerate(shard.images)})
            elif shard is not None and shard.name in self._sizes:
                self._unfit.append(shard)

    def tidy(self) -> list[str]:
        """Move shards aside that do not match their manifests, and remove old leftovers of killed writers; return the
        names of all.

        Sizes are always compared. A local file that changed after its manifest was written is read through as well;
        what no time stamp shows is found by the checksum of the first reader.
        """
        suspects = {shard.name: shard for shard, _ in self._index.values() if self._changed(shard)}
        for shard in self._unfit:
            if self.storage.local is not None or self.storage.is_old(shard.name):  # a put may not be over yet
                suspects[shard.name] = shard
        gone = [name for name, shard in suspects.items() if self._set_aside(shard)]
        for name in self._sizes:
            if name not in self._named and self.storage.is_old(name):
                self.storage.remove(name)
                gone.append(name)
        self.storage.remove_leftovers()
        self.refresh()
        return gone

    def _changed(self, shard: Shard) -> bool:
        """Whether the file is younger than its manifest, and not whole."""
        if self.storage.local is None:
            return False
        path = self.folder / shard.name
        try:
            if path.stat().st_mtime_ns > (self.folder / shard.manifest).stat().st_mtime_ns:
                MappedShard(path, shard).check()
        except DamagedShard:
            return True
        except OSError:  # says nothing of the file; its first reader will tell
            return False
        return False

    def _set_aside(self, shard: Shard, why: str = "it does not match its manifest") -> str | None:
        """Move a damaged shard out of the way, so that its images are encoded again; its new place."""
        self._mapped.pop(shard.name, None)

        def still(folder: Folder, name: str) -> bool:
            if folder.local is None:
                return True  # it was fetched twice
            try:
                MappedShard(folder.local / name, shard).check()
            except DamagedShard:
                return True
            return False

        return self.storage.set_aside(shard.name, why, still)

    def missing(self, images: Sequence[str]) -> list[str]:
        return [image for image in images if image not in self._index]

    def by_layout(self, images: Sequence[str]) -> dict[VisualLayout, tuple[str, ...]]:
        """``images`` grouped by layout, in their order; raises :class:`MissingFeatures`."""
        self._refuse_missing(images)
        groups: dict[VisualLayout, list[str]] = {}
        for image in images:
            groups.setdefault(self._index[image][0].layout, []).append(image)
        return {layout: tuple(of_layout) for layout, of_layout in groups.items()}

    def write(self, images: Sequence[str], signals: Mapping[str, Tensor], layout: VisualLayout) -> str:
        """Store ``signals`` (each ``(images, layout.patches, ...)``) as one shard, visible only when whole; returns its
        name."""
        columns, fields = [pa.array(list(images), pa.string())], [pa.field("image", pa.string())]
        names = [key for key in (*SIGNAL_NAMES, *OPTIONAL_SIGNALS) if key in signals]
        arrays = [np.ascontiguousarray(signals[key].numpy()) for key in names]
        for key, array in zip(names, arrays, strict=True):
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(array)
            columns.append(column)
            fields.append(pa.field(key, column.type))

        batch = pa.record_batch(columns, schema=pa.schema(fields))
        sums = [checksum([array[row] for array in arrays]) for row in range(len(images))]
        # By content: what another driver makes of the same images has another name, unless it is the same.
        name = hashlib.sha256(json.dumps([list(images), sums]).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.arrow"
        if self.storage.local is None:
            make_room(batch.nbytes)
        with atomic_path(path) as fresh:
            with pa.OSFile(str(fresh), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            size = fresh.stat().st_size
        if self.storage.local is None:
            self.storage.publish(path, path.name)

        # Last, because a shard is visible from its manifest on.
        manifest = {"size": size, "layout": layout_to_json(layout), "images": list(images), "checksums": sums}
        self.storage.write(f"{name}.json", json.dumps(manifest).encode())
        return path.name

    def _open(self, shard: Shard) -> MappedShard:
        """Map a shard; one of a remote store is fetched to this machine first.

        Raises :class:`UnreadableFeatures` and :class:`MissingFeatures`.
        """
        if shard.name not in self._mapped:
            try:
                self._mapped[shard.name] = self._map(shard)
            except DamagedShard as fault:
                return self._look_again(shard, str(fault))
        return self._mapped[shard.name]

    def _map(self, shard: Shard) -> MappedShard:
        try:
            return self._fetched(shard) if self.storage.local is None else MappedShard(self.folder / shard.name, shard)
        except FileNotFoundError:
            raise MissingFeatures(
                f"{self.storage.place}/{shard.name} is gone; `dvc repro -f features` encodes its images again"
            ) from None
        except OSError as error:
            raise UnreadableFeatures(
                f"{self.storage.place}/{shard.name} cannot be read now ({error.strerror or error}); it is left as it is: "
                "see that it can be read, then run the same command again"
            ) from error

    def _fetched(self, shard: Shard) -> MappedShard:
        """This machine's copy of a remote shard; another process may let go of it at any time."""
        path = self.folder / shard.name
        with contextlib.suppress(FileNotFoundError, DamagedShard):
            os.utime(path)  # copies that were used longest ago go first
            return MappedShard(path, shard)
        make_room(shard.size)
        self.storage.fetch(shard.name, path)
        return MappedShard(path, shard)

    def _look_again(self, shard: Shard, fault: str) -> MappedShard:
        """Take a shard that does not match its manifest once more from where it is stored; still damaged, it is moved
        aside, so that the next run encodes its images again."""
        self._mapped.pop(shard.name, None)
        if self.storage.local is None:  # what was damaged may be this machine's copy
            (self.folder / shard.name).unlink(missing_ok=True)
        try:
            self._mapped[shard.name] = self._map(shard).check()
            return self._mapped[shard.name]
        except DamagedShard as again:
            fault = str(again)
        place = self._set_aside(shard, fault)
        if place is None:
            raise UnreadableFeatures(f"{self.storage.place}/{shard.name} was replaced while it was read ({fault})")
        raise MissingFeatures(
            f"{self.storage.place}/{shard.name} is damaged ({fault}) and is moved to {place}; "
            "`dvc repro -f features` encodes its images again"
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
            mapped = self._look_again(shard, f"image {image[:12]} fails its checksum")
        return mapped, row

    def _held_row(self, image: str) -> dict[str, np.ndarray]:
        """The signals of one image, kept while there is room; what was used longest ago goes first."""
        if image in self._held:
            self._held.move_to_end(image)
            return self._held[image]
        mapped, row = self._find(image)
        signals = {key: values[row].copy() for key, values in mapped.signals.items()}
        size = sum(array.nbytes for array in signals.values())
        while self._held and self._held_bytes + size > self.cache_bytes:
            _, oldest = self._held.popitem(last=False)
            self._held_bytes -= sum(array.nbytes for array in oldest.values())
        if size <= self.cache_bytes:
            self._held[image] = signals
            self._held_bytes += size
        return signals

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
