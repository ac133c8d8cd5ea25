"""Bringing a feature store up to date: images grouped into shards of one layout, encoded by workers."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import torch

from nuwa.layout import VisualLayout, layout_order
from nuwa.signals import OPTIONAL_SIGNALS, SIGNAL_NAMES
from nuwa.source import closure
from nuwa.vlm import Adapter, EncodedImage
from pipelines.features.faults import BrokenImages, NoRoom, SignalNotFinite
from pipelines.features.identity import Described, ModelIdentity, code_names, model_type, stored_signals
from pipelines.features.images import decode_images
from pipelines.features.known_code import known_code
from pipelines.features.layouts import layouts_of
from pipelines.features.loading import FULL_PRECISION, Loading, load_model
from pipelines.features.signals import signal_bytes, signal_dtype
from pipelines.features.store import FeatureStore, make_room
from pipelines.files.storage import everywhere
from pipelines.settings import ClusterSettings, FeatureSettings
from pipelines.workers import UnitsFailed, run_units


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


@dataclass(frozen=True, kw_only=True)
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
        # In half precision a batch's shape moves the last bits: there every image is encoded alone.
        size = self.spec.batch_size if self.spec.loading.dtype == "float32" else 1
        further = [key for key in self.spec.keep if key in OPTIONAL_SIGNALS]
        for start in range(0, len(whole), size):
            names = whole[start : start + size]
            batch = self.vlm.encode_images([content[image] for image in names], further)
            encoded += [self._stored(*one) for one in zip(names, batch, strict=True)]
        if whole:
            (layout,) = {image.layout for image in encoded}
            signals = {key: torch.stack([image.signals[key] for image in encoded]) for key in self.spec.keep}
            self.store.write(whole, signals, layout)
        return Encoded(len(whole), broken)

    def _stored(self, name: str, image: EncodedImage) -> EncodedImage:
        """``image`` as the store keeps it; raises :class:`SignalNotFinite`."""
        stored = {}
        for key in self.spec.keep:
            value = image.signals[key].to(signal_dtype(key, self.spec.dtype))
            if not value.isfinite().all():  # before the copy: a GPU looks faster
                raise SignalNotFinite.found(
                    name,
                    key,
                    image.signals[key],
                    stored_dtype=self.spec.dtype,
                    model_dtype=self.spec.loading.dtype,
                    model=self.spec.model,
                )
            stored[key] = value.cpu()
        return EncodedImage(image.layout, stored)


class Encoded(NamedTuple):
    """What became of a shard: how many images are stored, and digest → fault of those that are not."""

    images: int
    broken: dict[str, str]


def features_identity(model: ModelIdentity, vlm: Adapter, dtype: str, keep: Sequence[str] = SIGNAL_NAMES) -> Described:
    """What decides the stored numbers; batch size, device and worker count do not belong to it."""
    return Described.of({**model.encoder, **stored_signals(dtype, keep), **encoding_code(model_type(vlm))})


@functools.cache
def encoding_code(family: str) -> dict[str, str]:
    """The code between an image's bytes and its stored signals, by file; ``family``: a model type."""
    roots = (EncodeWorker.run, EncodeWorker._stored, load_model, decode_images, FeatureStore.write)
    return known_code(("features", family), lambda: closure(roots, code_names(family), without=(Loading, make_room)))


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
    known: ModelIdentity | None = None,
    in_process: bool = False,
) -> tuple[FeatureStore, int]:
    """Bring the store up to date with ``images.parquet``; returns it and how many images were encoded.

    ``vlm``, ``known``: the model's shape and identity, where they are at hand. Damaged shards are moved aside first and
    encoded again. Raises :class:`BrokenImages` once all whole images are stored.
    """
    vlm = vlm or loading.here(model)
    known = known or ModelIdentity.of(model, loading, vlm)
    identity = features_identity(known, vlm, settings.dtype, settings.keep).digest[:16]
    store = FeatureStore(root, identity)
    store.tidy()

    layouts = _missing_layouts(store, vlm, images_path)
    missing = sorted(layouts, key=lambda image: (layout_order(layouts[image]), image))  # as units will read them
    widths = vlm.signal_widths(vlm.model.config)
    _check_room(store, len(missing), sum(signal_bytes(widths, layout, settings) for layout in layouts.values()))
    shards = _shards(missing, layouts, settings.shard_images)

    spec = EncodeSpec(
        model=model,
        images=str(images_path.resolve()),
        root=everywhere(root),
        identity=identity,
        dtype=settings.dtype,
        keep=settings.keep,
        batch_size=settings.batch_size,
        threads=cluster.cpus,
        device=cluster.device,
        loading=loading,
    )
    done, broken = 0, {}

    def count(_unit: str, encoded: Encoded) -> None:
        nonlocal done
        done += encoded.images
        broken.update(encoded.broken)
        on_progress(done, len(missing))

    units = {f"shard-{number}": shard for number, shard in enumerate(shards)}
    failures = run_units(spec, units, cluster, count, in_process=in_process)
    if failures:
        _, worst = next(iter(failures.values()))
        lost = f"{len(failures)} of {len(shards)} feature shards failed"
        raise UnitsFailed(f"{lost}, first: {worst.reason}\n{worst.detail}")
    if broken:
        raise BrokenImages.found(broken, images_path)
    store.refresh()
    return store, len(missing)


def _missing_layouts(store: FeatureStore, vlm: Adapter, images_path: Path) -> dict[str, VisualLayout]:
    """The images of ``images.parquet`` that the store lacks, with their layouts."""
    columns = pq.read_table(images_path, columns=["image", "width", "height"]).to_pydict().values()
    sizes = {image: (width, height) for image, width, height in zip(*columns, strict=True)}
    return layouts_of(vlm, {image: sizes[image] for image in store.missing(list(sizes))})


def _shards(images: Sequence[str], layouts: Mapping[str, VisualLayout], size: int) -> list[list[str]]:
    """Runs of at most ``size`` images of one layout, in their order: a shard's arrays have one shape."""
    shards = []
    for _, of_one_layout in itertools.groupby(images, key=layouts.__getitem__):
        alike = list(of_one_layout)
        shards += [alike[first : first + size] for first in range(0, len(alike), size)]
    return shards
