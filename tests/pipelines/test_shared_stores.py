"""Stores that several drivers, hosts and versions share: a fault that passes costs nothing, and nobody takes what is not his."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from refusing_kernel import OPENING, PASSING, where_refused
from test_results import unit_of

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout
from pipelines.features import store as feature_store
from pipelines.features.faults import UnreadableFeatures
from pipelines.features.store import FeatureStore
from pipelines.files import storage
from pipelines.files.storage import ASIDE, LEFTOVER_S, Folder, StorageUnavailable
from pipelines.sweep.results import PARTS, SUFFIX, ResultStore, file_of
from pipelines.workers.policy import Fault, fault_of

LAYOUT = VisualLayout((View(PatchGrid(2, 2)),))
IMAGES = ["a" * 64, "b" * 64]
named = pytest.mark.parametrize("number", PASSING, ids=os.strerror)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(feature_store, "SHARD_CACHE", tmp_path / "machine")


def signals(seed: int) -> dict[str, torch.Tensor]:
    return {"features": torch.randn(len(IMAGES), 4, 3, generator=torch.Generator().manual_seed(seed))}


def shared(place, seed: int = 0) -> FeatureStore:
    """Another reader of ``place``, which holds a shard of both images."""
    FeatureStore(place, "encoder").write(IMAGES, signals(seed), LAYOUT)
    return FeatureStore(place, "encoder")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- faults that pass ------------------------------------------------------------------------------------------------


@named
def test_a_shard_that_cannot_be_opened_for_now_stays(tmp_path, number):
    store, before = shared(tmp_path), files(tmp_path)
    (name,) = store.storage.sizes(".arrow")
    with pytest.raises(UnreadableFeatures) as raised:
        where_refused(OPENING, number, lambda: store.read(IMAGES))
    assert str(raised.value) == (
        f"{tmp_path}/encoder/{name} cannot be read now ({os.strerror(number)}); it is left as it is: see that it can be "
        "read, then run the same command again"
    )
    assert fault_of(raised.value) == Fault.PASSING and files(tmp_path) == before
    assert torch.equal(store.read(IMAGES)["features"], signals(0)["features"]), "the same reader, later"


@named
def test_looking_over_a_store_that_cannot_be_read_for_now_moves_nothing(tmp_path, number):
    store = shared(tmp_path)
    (name,) = store.storage.sizes(".arrow")
    os.utime(tmp_path / "encoder" / name, (0, time.time() + 10))  # younger than its manifest: it would be read through
    before = files(tmp_path)
    with pytest.raises(StorageUnavailable, match=r"encoder: could not read \w+\.json in 4 attempts"):
        where_refused(OPENING, number, store.tidy)
    assert files(tmp_path) == before


@named
def test_a_unit_that_cannot_be_opened_for_now_stays(tmp_path, number):
    store, (unit, tables) = ResultStore(tmp_path), unit_of(0)
    store.write(unit, tables)
    os.utime(tmp_path / file_of(unit.unit), (0, 0))
    before = files(tmp_path)
    for action in (lambda: store.read(unit.unit), lambda: store.done(tidy=True)):
        with pytest.raises(StorageUnavailable, match=rf"could not read {file_of(unit.unit)} in 4 attempts") as raised:
            where_refused(OPENING, number, action)
        assert fault_of(raised.value) == Fault.PASSING and files(tmp_path) == before
    assert store.done(tidy=True) == [unit] and store.read(unit.unit) == tables


def test_a_disk_that_fails_while_it_is_read_condemns_nothing(tmp_path):
    """What opens and then cannot be read: the kernel says EIO of a process's own memory."""
    store, (unit, tables) = ResultStore(tmp_path), unit_of(0)
    store.write(unit, tables)
    path = tmp_path / file_of(unit.unit)
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(StorageUnavailable, match="Input/output error"):
        store.read(unit.unit)
    assert path.is_symlink() and list(path.parent.iterdir()) == [path]


def test_a_damaged_copy_of_a_machine_does_not_condemn_what_it_is_of(tmp_path):
    store = shared(f"memory://{uuid.uuid4().hex}")
    (copy,) = (tmp_path / "machine").rglob("*.arrow")
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    assert torch.equal(store.read(IMAGES)["features"], signals(0)["features"])
    assert len(store.storage.sizes()) == 2


def test_copies_of_remote_shards_leave_a_tenth_of_the_disk_free(tmp_path, monkeypatch):
    """On a disk of four shards three are copied; the fourth takes the place of the one used longest ago."""
    place = f"memory://{uuid.uuid4().hex}"
    writer = FeatureStore(place, "encoder")
    names = [writer.write([f"{number}a", f"{number}b"], signals(number), LAYOUT) for number in range(4)]
    copies = tmp_path / "machine" / "encoder"
    size = (copies / names[0]).stat().st_size
    for name in names:
        (copies / name).unlink()

    def disk(_path):
        used = sum(path.stat().st_size for path in copies.iterdir())
        return SimpleNamespace(total=4 * size, free=4 * size - used)

    monkeypatch.setattr("shutil.disk_usage", disk)
    reader = FeatureStore(place, "encoder", cache_bytes=0)
    held = {}
    for step, number in enumerate((0, 1, 2)):
        held[number] = reader.read([f"{number}a", f"{number}b"])["features"]
        os.utime(copies / names[number], (0, step))
    assert sorted(path.name for path in copies.iterdir()) == sorted(names[:3])
    again = FeatureStore(place, "encoder", cache_bytes=0)
    again.read(["0a"])  # used anew
    held[3] = again.read(["3a", "3b"])["features"]
    assert sorted(path.name for path in copies.iterdir()) == sorted([names[0], names[2], names[3]])
    assert all(torch.equal(held[number], signals(number)["features"]) for number in held), "who has one keeps it"


# --- two drivers ------------------------------------------------------------------------------------------------------


class Waiting(Folder):
    """A folder whose writer stands still before each file that it writes in one piece, until it is told to go on."""

    def write(self, name: str, content: bytes) -> None:
        self.pause("about to write")
        super().write(name, content)


def write_slowly(place: str, pipe, seed: int) -> None:
    def stand_still(word) -> None:
        pipe.send(word)
        pipe.recv()

    store = FeatureStore(place, "encoder")
    store.storage = Waiting(**{**vars(store.storage), "pause": stand_still})
    pipe.send(store.write(IMAGES, signals(seed), LAYOUT))


class Driver:
    """Another process, at the point where its shard is there and the manifest is not."""

    def __init__(self, place: str, seed: int = 0) -> None:
        processes = multiprocessing.get_context("fork")
        self.pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=write_slowly, args=(place, theirs, seed))
        self.process.start()
        assert self.pipe.recv() == "about to write"

    def go_on(self) -> str:
        self.pipe.send("go on")
        name = self.pipe.recv()
        self.process.join()
        assert self.process.exitcode == 0
        return name


def test_a_driver_does_not_remove_the_shard_whose_manifest_another_is_about_to_write(tmp_path):
    other = Driver(str(tmp_path))
    store = FeatureStore(tmp_path, "encoder")
    assert store.tidy() == [] and store.missing(IMAGES) == IMAGES
    other.go_on()
    store.refresh()
    assert torch.equal(store.read(IMAGES)["features"], signals(0)["features"])


@pytest.mark.parametrize("theirs", [0, 1], ids=["the same numbers", "other numbers"])
def test_two_drivers_that_encode_the_same_images_at_once_do_not_spoil_each_others_shard(tmp_path, theirs):
    """Between a driver's shard and its manifest another writes both, tidies up and reads."""
    other = Driver(str(tmp_path), seed=theirs)
    ours = shared(tmp_path, seed=0)
    assert ours.tidy() == []
    assert torch.equal(ours.read(IMAGES)["features"], signals(0)["features"])
    other.go_on()
    assert torch.equal(ours.read(IMAGES)["features"], signals(0)["features"])
    later = FeatureStore(tmp_path, "encoder")
    assert later.tidy() == []
    read = later.read(IMAGES)["features"]
    assert any(torch.equal(read, signals(seed)["features"]) for seed in {0, theirs})


def test_a_shard_that_was_made_again_meanwhile_is_not_moved_aside(tmp_path):
    """A driver that has found damage comes too late: another has put a whole file there."""
    store = shared(tmp_path)
    (name,) = store.storage.sizes(".arrow")
    shard = store._index[IMAGES[0]][0]
    assert store._set_aside(shard, "damaged a moment ago") is None
    assert torch.equal(store.read(IMAGES)["features"], signals(0)["features"])
    assert list((tmp_path / "encoder" / ASIDE).iterdir()) == [], name


def test_what_cannot_be_looked_at_goes_back_to_its_place(tmp_path):
    folder = Folder.at(tmp_path)
    folder.write("a", b"x")

    def still(moved: Folder, name: str) -> bool:
        raise StorageUnavailable("not now")

    with pytest.raises(StorageUnavailable, match="not now"):
        folder.set_aside("a", "damaged", still)
    assert files(tmp_path) == {"a": b"x"}


# --- two versions -----------------------------------------------------------------------------------------------------


def test_units_and_shards_of_another_version_are_left_alone(tmp_path):
    """Units of more parts, of other keys, under names by another rule; manifests with other fields; however old."""
    results, features = ResultStore(tmp_path / "results"), shared(tmp_path / "features")
    unit, tables = unit_of(0)
    footer = {b"trials": json.dumps(unit.trials), b"examples": json.dumps(unit.examples)}
    rows = tables["predictions"].cast(PARTS["predictions"])
    for name, held, groups in ((unit.unit, footer, 4), ("f" * 24, footer, 3), ("e" * 24, {b"answers": b"1"}, 3)):
        target = tmp_path / "results" / f"{name}{SUFFIX}"
        target.parent.mkdir(exist_ok=True)
        with pq.ParquetWriter(target, rows.schema.with_metadata(held)) as writer:
            for _ in range(groups):
                writer.write_table(pa.table(rows.columns, schema=writer.schema), row_group_size=len(rows))
    (features.storage.local / "of-tomorrow.json").write_text(json.dumps({"format": 9, "images": ["c"]}))
    (features.storage.local / "of-tomorrow.arrow").write_bytes(b"another layout of numbers")
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, time.time() - 2 * LEFTOVER_S))
    before = files(tmp_path)
    assert results.done(tidy=True) == [] and features.tidy() == []
    assert files(tmp_path) == before
    assert torch.equal(features.read(IMAGES)["features"], signals(0)["features"])
