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
import io
import itertools
import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from nuwa.layout import VisualLayout, layout_from_json, layout_order, layout_to_json
from nuwa.signals import SIGNAL_NAMES
from nuwa.source import code_fingerprint
from nuwa.vlm import Adapter, EncodedImage, load_adapter
from pipelines.atomic import atomic_path
from pipelines.executor import UnitsFailed, reason, run_units
from pipelines.settings import ClusterSettings, FeatureSettings, ModelSettings
from pipelines.storage import Folder, is_uri

ENCODING = ("grid", "layout", "signals", "vlm")  # the code that decides what is stored
CACHE_BYTES = 1024**3  # what a worker keeps of what it read
SHARD_CACHE = Path(tempfile.gettempdir()) / f"nuwa-features-{os.getuid()}"  # shards of remote stores, on each machine


class MissingFeatures(LookupError):
    """An image is not in the store."""

    stops_the_run = True


def signal_dtype(name: str, dtype: str) -> torch.dtype:
    """What a store of ``dtype`` keeps a signal in: shares of attention always in float32.

    They are one number a token, and among thousands of tokens they fall below what float16 holds in full precision.
    """
    return torch.float32 if name == "cls_attention" else getattr(torch, dtype)


def store_identity(encoder_fingerprint: str, dtype: str, keep: Sequence[str] = SIGNAL_NAMES) -> str:
    """What decides the stored numbers; batch size, device and worker count do not belong to it."""
    kept = {name: str(signal_dtype(name, dtype)) for name in keep}
    content = json.dumps([code_fingerprint(ENCODING), encoder_fingerprint, kept])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


class ImpossibleImage(UnitsFailed):
    """An image whose size the model cannot take."""


def layouts_of(vlm: Adapter, sizes: Mapping[str, tuple[int, int]]) -> dict[str, VisualLayout]:
    """The layout of every image from its width and height; raises :class:`ImpossibleImage` naming the first that has none."""
    of = cache(vlm.layout_of)
    found = {}
    for image, (width, height) in sizes.items():
        try:
            found[image] = of((width, height))
        except ValueError as error:
            raise ImpossibleImage(
                f"image {image[:12]} of {width}x{height} pixels: the model takes no such image ({error}); take its rows "
                "out of the benchmark's table"
            ) from None
    return found


class BrokenImages(UnitsFailed):
    """Images whose bytes cannot be decoded; all others are stored."""

    @classmethod
    def found(cls, broken: Mapping[str, str], images_path: Path) -> BrokenImages:
        """One line from digest → what is wrong with it; ``images_path`` as :func:`read_images` takes it."""
        image, fault = min(broken.items())
        first = f"image {image[:12]} cannot be decoded ({fault})"
        if len(broken) > 1:
            first = f"{len(broken)} images cannot be decoded, first {image[:12]} ({fault})"
        return cls(
            f"{first}; {_asked_about(image, images_path)}: fetch the published file again or take these rows out of it, "
            "then run the same command again; all other images are encoded and kept"
        )


def _asked_about(image: str, images_path: Path) -> str:
    """The questions about an image, from the table that ``prepare`` leaves beside the images."""
    examples = images_path.with_name("examples.parquet")
    if examples.exists():
        held = pq.read_table(examples, columns=["example_id"], filters=[("image", "=", image)])
        names = held["example_id"].to_pylist()
        if names:
            more = f" and {len(names) - 1} more rows" if len(names) > 1 else ""
            return f"it is asked about by {names[0]}{more} of {examples}"
    return f"its questions have image = {image}"


class NotFinite(UnitsFailed):
    """A signal that the store cannot hold; other images would meet it too."""

    stops_the_run = True

    @classmethod
    def found(cls, image: str, name: str, value: Tensor, spec: EncodeSpec) -> NotFinite:
        """``value``: the signal as the encoder gave it."""
        if value.isfinite().all():
            end = torch.finfo(signal_dtype(name, spec.dtype)).max
            return cls(
                f"image {image[:12]}: signal {name} goes beyond {end:g}, the end of features.dtype: {spec.dtype}; "
                "set features.dtype: float32"
            )
        remedy = f"mend the weights in {spec.model}" if spec.loading.dtype == "float32" else "set model.dtype: float32"
        return cls(
            f"image {image[:12]}: signal {name} is not finite as the encoder gives it in model.dtype: "
            f"{spec.loading.dtype}, whatever features.dtype is; {remedy}"
        )


class NoRoom(UnitsFailed):
    """The features of all images do not fit where they are stored."""


def signal_bytes(widths: Mapping[str, int], layout: VisualLayout, settings: FeatureSettings) -> int:
    """Bytes the store takes for one image of ``layout``; ``widths`` as of :meth:`nuwa.vlm.Adapter.signal_widths`."""
    return layout.patches * sum(widths[name] * signal_dtype(name, settings.dtype).itemsize for name in settings.keep)


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
        value = zlib.crc32(memoryview(np.ascontiguousarray(array)).cast("B"), value)
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
        names = [key for key in SIGNAL_NAMES if key in signals]
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


def _check_room(store: FeatureStore, images: int, needed: int) -> None:
    """Refuse before anything is encoded; of remote storage the room is not known."""
    if store.storage.local is None or not images:
        return
    store.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise NoRoom(
            f"features of {images} images need {needed / 1e9:.1f} GB in {store.folder}, which has {free / 1e9:.1f} GB "
            "free; make room, set features.dtype: float16, or name another place in features.store"
        )


class Loading(NamedTuple):
    """How a model is loaded. ``spread``: over all GPUs the worker has, by Accelerate."""

    dtype: str = "float32"
    attention: str = "sdpa"
    conversation: str = "template"
    image_aspect_ratio: str = "processor"
    spread: bool = False

    @classmethod
    def of(cls, model: ModelSettings, cluster: ClusterSettings) -> Loading:
        return cls(model.dtype, model.attention, model.conversation, model.image_aspect_ratio, spread=cluster.gpus > 1)

    @property
    def identity(self) -> tuple[str, ...]:
        """What decides the model's digests beside its files."""
        return self.dtype, self.conversation, self.image_aspect_ratio

    @property
    def framing(self) -> dict[str, str]:
        """How words and images are handed to the model."""
        return {"conversation": self.conversation, "image_aspect_ratio": self.image_aspect_ratio}

    def here(self, path: str) -> Adapter:
        """The same weights for the driver, which encodes and answers nothing itself."""
        return load_adapter(path, dtype=getattr(torch, self.dtype), **self.framing)


FULL_PRECISION = Loading()


@cache  # one model a process, however many workers it hosts in turn
def load_model(path: str, device: str, loading: Loading = FULL_PRECISION) -> Adapter:
    return load_adapter(
        path,
        device,
        getattr(torch, loading.dtype),
        attention=loading.attention,
        device_map="auto" if loading.spread else None,
        **loading.framing,
    )


@dataclass(frozen=True)
class EncodeSpec:
    """A worker that encodes shards; ``threads`` is fixed so that equal machines give equal numbers."""

    model: str
    images: str
    root: str
    identity: str
    dtype: str
    keep: tuple[str, ...]
    batch_size: int
    threads: int
    device: str
    loading: Loading = FULL_PRECISION

    def build(self) -> EncodeWorker:
        torch.set_num_threads(self.threads)
        return EncodeWorker(self)


class EncodeWorker:
    def __init__(self, spec: EncodeSpec) -> None:
        self.spec, self.vlm = spec, load_model(spec.model, spec.device, spec.loading)
        self.store = FeatureStore(spec.root, spec.identity)

    def run(self, images: Sequence[str], _upcoming: Sequence[str] | None = None) -> Encoded:
        """Encode one shard's ``images``, all of one layout; those that cannot be decoded are left out and named."""
        content, broken = decode_images(Path(self.spec.images), images)
        whole = [image for image in images if image in content]
        encoded = []
        for start in range(0, len(whole), self.spec.batch_size):
            names = whole[start : start + self.spec.batch_size]
            batch = self.vlm.encode_images([content[image] for image in names])
            encoded += [self._stored(*one) for one in zip(names, batch, strict=True)]
        if whole:
            (layout,) = {image.layout for image in encoded}
            signals = {key: torch.stack([image.signals[key] for image in encoded]) for key in self.spec.keep}
            self.store.write(whole, signals, layout)
        return Encoded(len(whole), broken)

    def _stored(self, name: str, image: EncodedImage) -> EncodedImage:
        """``image`` as the store keeps it; raises :class:`NotFinite`."""
        stored = {}
        for key in self.spec.keep:
            value = image.signals[key].to(signal_dtype(key, self.spec.dtype))
            if not value.isfinite().all():  # before the copy: a GPU looks faster
                raise NotFinite.found(name, key, image.signals[key], self.spec)
            stored[key] = value.cpu()
        return EncodedImage(image.layout, stored)


class Encoded(NamedTuple):
    """What became of a shard: how many images are stored, and digest → fault of those that are not."""

    images: int
    broken: dict[str, str]


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
            decoded[digest] = Image.open(io.BytesIO(content)).convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # each of Pillow's decoders has errors of its own
            broken[digest] = reason(error)
    return decoded, broken


@cache
def _row_groups(path: Path, _changed: int) -> dict[str, int]:
    """The row group of every image: a file of many gigabytes is not searched for each batch."""
    held = pq.ParquetFile(path)
    lengths = [held.metadata.row_group(number).num_rows for number in range(held.num_row_groups)]
    names = held.read(columns=["image"])["image"].to_pylist()
    return dict(zip(names, np.repeat(np.arange(len(lengths)), lengths).tolist(), strict=True))


def encode_missing(
    model: str,
    images_path: Path,
    root: Path | str,
    settings: FeatureSettings,
    cluster: ClusterSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    loading: Loading = FULL_PRECISION,
    vlm: Adapter | None = None,
    in_process: bool = False,
) -> tuple[FeatureStore, int]:
    """Bring the store up to date with ``images.parquet``; returns it and how many images were encoded.

    ``vlm``: the model, where it is loaded already. Damaged shards are discarded first and encoded again. Raises
    :class:`BrokenImages` once all whole images are stored.
    """
    vlm = vlm or loading.here(model)
    identity = store_identity(vlm.encoder_identity, settings.dtype, settings.keep)
    store = FeatureStore(root, identity)
    store.discard_damaged()
    columns = pq.read_table(images_path, columns=["image", "width", "height"]).to_pydict().values()
    sizes = {image: (width, height) for image, width, height in zip(*columns, strict=True)}
    layouts = layouts_of(vlm, {image: sizes[image] for image in store.missing(list(sizes))})
    missing = sorted(layouts, key=lambda image: (layout_order(layouts[image]), image))  # as units will read them
    widths = vlm.signal_widths(vlm.model.config)
    _check_room(store, len(missing), sum(signal_bytes(widths, layout, settings) for layout in layouts.values()))
    shards = []
    for _, group in itertools.groupby(missing, key=layouts.__getitem__):
        alike = list(group)
        shards += [alike[i : i + settings.shard_images] for i in range(0, len(alike), settings.shard_images)]
    spec = EncodeSpec(
        model,
        str(images_path.resolve()),
        str(root if is_uri(root) else Path(root).resolve()),
        identity,
        settings.dtype,
        settings.keep,
        settings.batch_size,
        cluster.cpus,
        cluster.device,
        loading,
    )
    done, broken = 0, {}

    def count(_unit: str, encoded: Encoded) -> None:
        nonlocal done
        done += encoded.images
        broken.update(encoded.broken)
        on_progress(done, len(missing))

    failures = run_units(spec, dict(enumerate_ids(shards)), cluster, count, in_process=in_process)
    if failures:
        _, worst = next(iter(failures.values()))
        raise UnitsFailed(
            f"{len(failures)} of {len(shards)} feature shards failed, first: {worst.reason}\n{worst.detail}"
        )
    if broken:
        raise BrokenImages.found(broken, images_path)
    store.refresh()
    return store, len(missing)


def enumerate_ids(shards: Sequence[Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    return [(f"shard-{number}", shard) for number, shard in enumerate(shards)]
