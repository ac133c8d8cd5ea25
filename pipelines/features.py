"""The feature store: what the vision encoder says of an image, encoded once, addressed by content.

A store is a folder per encoder identity (weights, layers read, preprocessing, dtype). A shard is one Arrow IPC file,
memory-mapped by readers, beside a small JSON manifest that is written last: size, digest and the images it holds.
A shard without a manifest, or that does not match it, is never read; it is encoded again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from nuwa.source import code_fingerprint
from nuwa.vlm import SIGNAL_NAMES, LlavaAdapter
from pipelines.atomic import atomic_path
from pipelines.executor import UnitsFailed, run_units
from pipelines.settings import ClusterSettings, FeatureSettings

ENCODING = ("grid", "layout", "signals", "vlm")  # the code that decides what is stored


class MissingFeatures(LookupError):
    """An image is not in the store."""


def store_identity(encoder_fingerprint: str, dtype: str) -> str:
    """What decides the stored numbers; batch size, device and worker count do not belong to it."""
    content = json.dumps([code_fingerprint(ENCODING), encoder_fingerprint, dtype, SIGNAL_NAMES])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def signal_bytes(config: Any, dtype: str) -> int:
    """Bytes the store takes for one image, from the configuration of a LLaVA-style model."""
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    numbers = tokens * (3 * vision.hidden_size + 1)  # features, keys and similarity; CLS attention
    return numbers * np.dtype(dtype).itemsize


@dataclass(frozen=True)
class Shard:
    path: Path
    size: int
    sha256: str
    images: tuple[str, ...]

    @property
    def manifest(self) -> Path:
        return self.path.with_suffix(".json")

    def intact(self) -> bool:
        """Whether the file is exactly what its manifest says."""
        if not self.path.exists() or self.path.stat().st_size != self.size:
            return False
        with open(self.path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == self.sha256


class FeatureStore:
    """Reads and writes the shards of one encoder identity under ``root``."""

    def __init__(self, root: Path, identity: str) -> None:
        self.folder = root / identity
        self.identity = identity
        self._tables: dict[Path, pa.RecordBatch] = {}
        self._index: dict[str, tuple[Shard, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read all manifests; unreadable ones count as absent."""
        self._index = {}
        for manifest in sorted(self.folder.glob("*.json")):
            try:
                held = json.loads(manifest.read_text())
                shard = Shard(manifest.with_suffix(".arrow"), held["size"], held["sha256"], tuple(held["images"]))
            except (ValueError, KeyError, TypeError):
                continue
            self._index.update({image: (shard, row) for row, image in enumerate(shard.images)})

    def discard_damaged(self) -> list[Path]:
        """Remove shards that do not match their manifests, and leftovers of interrupted writes; return their paths."""
        shards = {shard.path: shard for shard, _ in self._index.values()}
        damaged = [path for path, shard in shards.items() if not shard.intact()]
        damaged += [path for path in self.folder.glob("*.arrow") if path not in shards]
        for path in damaged:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        self.refresh()
        return damaged

    def missing(self, images: Sequence[str]) -> list[str]:
        return [image for image in images if image not in self._index]

    def write(self, images: Sequence[str], signals: dict[str, Tensor]) -> Path:
        """Store ``signals`` (each ``(images, ...)``) as one shard; visible only when whole."""
        name = hashlib.sha256("".join(images).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.arrow"
        columns, fields = [pa.array(list(images), pa.string())], [pa.field("image", pa.string())]
        for key in SIGNAL_NAMES:
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(signals[key].numpy()))
            columns.append(column)
            fields.append(pa.field(key, column.type))
        batch = pa.record_batch(columns, schema=pa.schema(fields))
        with atomic_path(path) as fresh:
            with pa.OSFile(str(fresh), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            with open(fresh, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            size = fresh.stat().st_size
        with atomic_path(path.with_suffix(".json")) as fresh:
            fresh.write_text(json.dumps({"size": size, "sha256": digest, "images": list(images)}))
        return path

    def _open(self, shard: Shard) -> pa.RecordBatch:
        """Map a shard; its digest is checked the first time this process touches it."""
        if shard.path not in self._tables:
            if not shard.intact():
                raise MissingFeatures(f"{shard.path} is damaged or gone; `dvc repro -f features` encodes it again")
            self._tables[shard.path] = pa.ipc.open_file(pa.memory_map(str(shard.path))).get_batch(0)
        return self._tables[shard.path]

    def read(self, images: Sequence[str]) -> dict[str, Tensor]:
        """Signals of ``images`` in their order, in the stored dtype; raises :class:`MissingFeatures`."""
        absent = self.missing(images)
        if absent:
            raise MissingFeatures(
                f"{len(absent)} of {len(images)} images are not in {self.folder}, first {absent[0][:12]}; "
                "`dvc repro -f features` encodes them"
            )
        places = [self._index[image] for image in images]
        out = {}
        for key in SIGNAL_NAMES:
            rows = [self._open(shard).column(key).to_numpy_ndarray()[row] for shard, row in places]
            out[key] = torch.from_numpy(np.stack(rows))
        return out


@cache
def load_model(path: str, device: str) -> LlavaAdapter:
    """One model a process, however many workers it hosts in turn."""
    return LlavaAdapter.load(path, device)


@dataclass(frozen=True)
class EncodeSpec:
    """A worker that encodes shards; ``threads`` is fixed so that equal machines give equal numbers."""

    model: str
    images: str
    root: str
    identity: str
    dtype: str
    batch_size: int
    threads: int
    device: str

    def build(self) -> EncodeWorker:
        torch.set_num_threads(self.threads)
        return EncodeWorker(self)


class EncodeWorker:
    def __init__(self, spec: EncodeSpec) -> None:
        self.spec, self.vlm = spec, load_model(spec.model, spec.device)
        self.store = FeatureStore(Path(spec.root), spec.identity)

    def run(self, images: Sequence[str], _upcoming: Sequence[str] | None = None) -> int:
        """Encode one shard's ``images``; returns how many."""
        content = read_images(Path(self.spec.images), images)
        parts: dict[str, list[Tensor]] = {key: [] for key in SIGNAL_NAMES}
        for start in range(0, len(images), self.spec.batch_size):
            batch = [content[image] for image in images[start : start + self.spec.batch_size]]
            for key, value in self.vlm.encode(self.vlm.pixels(batch)).items():
                parts[key].append(value.to("cpu", getattr(torch, self.spec.dtype)))
        self.store.write(images, {key: torch.cat(value) for key, value in parts.items()})
        return len(images)


def read_images(path: Path, images: Sequence[str]) -> dict[str, Image.Image]:
    """Decoded RGB images of ``images.parquet`` by digest."""
    table = pq.read_table(path, filters=[("image", "in", list(images))])
    rows = zip(table["image"].to_pylist(), table["bytes"].to_pylist(), strict=True)
    return {digest: Image.open(io.BytesIO(content)).convert("RGB") for digest, content in rows}


def encode_missing(
    model: str,
    images_path: Path,
    root: Path,
    settings: FeatureSettings,
    cluster: ClusterSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    in_process: bool = False,
) -> tuple[FeatureStore, int]:
    """Bring the store up to date with ``images.parquet``; returns it and how many images were encoded.

    Damaged shards are discarded first and encoded again.
    """
    identity = store_identity(LlavaAdapter.load(model).encoder_fingerprint(), settings.dtype)
    store = FeatureStore(root, identity)
    store.discard_damaged()
    wanted = pq.read_table(images_path, columns=["image"])["image"].to_pylist()
    missing = sorted(store.missing(wanted))
    shards = [missing[i : i + settings.shard_images] for i in range(0, len(missing), settings.shard_images)]
    spec = EncodeSpec(
        model,
        str(images_path.resolve()),
        str(root.resolve()),
        identity,
        settings.dtype,
        settings.batch_size,
        cluster.cpus,
        cluster.device,
    )
    done = 0

    def count(_unit: str, encoded: int) -> None:
        nonlocal done
        done += encoded
        on_progress(done, len(missing))

    failures = run_units(spec, dict(enumerate_ids(shards)), cluster, count, in_process=in_process)
    if failures:
        _, worst = next(iter(failures.values()))
        raise UnitsFailed(
            f"{len(failures)} of {len(shards)} feature shards failed, first: {worst.reason}\n{worst.detail}"
        )
    store.refresh()
    return store, len(missing)


def enumerate_ids(shards: Sequence[Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    return [(f"shard-{number}", shard) for number, shard in enumerate(shards)]
