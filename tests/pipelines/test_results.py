"""The result store: a unit is whole or not there, on a folder and behind a URI; nothing is read twice in vain."""

from __future__ import annotations

import collections
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench import PATHS, ROOT, same
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from nuwa.own_folder import UnsafeFolder
from pipelines.files import storage
from pipelines.files.storage import ASIDE, ATTEMPTS, LEFTOVER_S, Folder, StorageFull, StorageUnavailable
from pipelines.sweep import results
from pipelines.sweep.results import PARTS, SUFFIX, DamagedUnit, ResultStore, StoredUnit, file_of, unit_name


@pytest.fixture(autouse=True)
def footers(tmp_path, monkeypatch):
    """An index of its own, and no pauses between attempts."""
    monkeypatch.setattr(results, "FOOTERS", tmp_path / "footers")
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.0)
    return tmp_path / "footers"


@pytest.fixture(params=["local", "s3", "memory"])
def place(request, bucket, tmp_path) -> str:
    return {"local": str(tmp_path / "store"), "s3": bucket, "memory": f"memory://{uuid.uuid4().hex}"}[request.param]


def unit_of(number: int, trials: int = 2, examples: int = 3) -> tuple[StoredUnit, dict[str, pa.Table]]:
    """A unit whose content follows from ``number``."""
    mine = tuple(f"t{number}-{trial}" for trial in range(trials))
    asked = tuple(f"d{number}-{example}" for example in range(examples))
    unit = unit_name(mine, asked)
    rows = [(trial, example) for trial in mine for example in asked]
    predictions = [
        {"trial_id": trial, "example_id": f"e{example}", "prediction": f"{trial} {example}", "kept_final": [number, 7]}
        for trial, example in rows
    ]
    kept = [{"trial_id": trial, "image": "i", "indices": [number], "pillar": [True]} for trial in mine]
    timings = [
        {"trial_id": trial, "unit": unit, "questions": examples, "selection_s": 0.1, "trunk_s": 0.2, "answer_s": 0.3}
        for trial in mine
    ]
    rows = {"predictions": predictions, "kept": kept, "timings": timings}
    return StoredUnit(unit, mine, asked), {part: pa.Table.from_pylist(rows[part], PARTS[part]) for part in PARTS}


def fill(store: ResultStore, count: int) -> list[StoredUnit]:
    """Units 0, 1, ... in the order the store lists them."""
    written = [unit_of(number) for number in range(count)]
    for unit, tables in written:
        store.write(unit, tables)
    return sorted(unit for unit, _ in written)


def flip(store: ResultStore, name: str, part: str) -> None:
    """Damage the last byte of the part's first column, which is inside a page."""
    content = bytearray(store.storage.read(name))
    column = pq.read_metadata(pa.BufferReader(bytes(content))).row_group(list(PARTS).index(part)).column(0)
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    store.storage.write(name, bytes(content))


def test_what_is_written_is_listed_and_read(place):
    store = ResultStore(place)
    assert store.done() == []
    written = fill(store, 5)
    elsewhere = ResultStore(place)
    assert elsewhere.done() == written
    assert [set(tables) for tables in elsewhere.read_all(unit.unit for unit in written)] == [set(PARTS)] * 5
    for number in range(5):
        unit, tables = unit_of(number)
        assert elsewhere.read(unit.unit) == tables
    elsewhere.remove(written[0].unit)
    assert store.done() == written[1:]


def test_parts_may_be_empty_and_footers_long(place):
    unit, tables = unit_of(0, trials=40, examples=4000)
    tables["kept"] = tables["kept"].slice(0, 0)
    store = ResultStore(place)
    store.write(unit, tables)
    (name,) = store.storage.stamps()
    content = store.storage.read(name)
    assert int.from_bytes(content[-8:-4], "little") > results.FOOTER_BYTES
    assert store.done() == [unit]
    assert store.read(unit.unit) == tables


def test_what_a_footer_states_is_what_parquet_reads_there(tmp_path, monkeypatch):
    """Texts are looked up in its bytes; Parquet itself is asked where they do not tell, as in stores of old."""
    store = ResultStore(tmp_path)
    spoof = b'\x18\x06trials\x18\x05["x"]\x00'.decode()
    for number, (trials, examples) in enumerate([(1, 1), (2, 3), (40, 40), (3, 5000)]):
        unit, tables = unit_of(number, trials, examples)
        if number == 1:
            said = pa.array([spoof] * (trials * examples), pa.string())
            tables["predictions"] = tables["predictions"].set_column(2, "prediction", said)
        origin = (None, '{"torch": "2"}', json.dumps({"\x18": "\x00\x18\x06trials"}), "{}")[number]
        store.write(unit._replace(provenance=origin, replaces=("a", "b") * (number % 2)), tables)
    asked = []
    read = pq.read_metadata
    monkeypatch.setattr(pq, "read_metadata", lambda *where: (asked.append(where), read(*where))[1])
    stated = store.done()
    assert len(stated) == 4 and not asked
    monkeypatch.setattr(results, "_stated", lambda *what: None)
    assert store.done() == stated and len(asked) == 4


def test_texts_that_do_not_agree_with_a_files_name_or_rows_are_not_taken(tmp_path):
    """Each change leaves a footer that Parquet reads; the unit in it is another, or not whole."""
    store = ResultStore(tmp_path)
    (unit,) = fill(store, 1)
    path = tmp_path / file_of(unit.unit)
    content = path.read_bytes()
    for old, new in ((b'"t0-1"]', b'"t0-2"]'), (b"\x06trials", b"\x06trialz")):
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        assert store.done() == []
    path.write_bytes(content.replace(b"[6, 2, 2]", b"[9, 2, 2]"))
    assert store.done() == [unit], "Parquet counts the rows themselves"


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.3, 0.9, -9, -8, -1])
def test_a_part_of_a_unit_is_none(place, kept):
    """Whatever was written of a unit, it is not counted; it is moved aside once nobody can be at it any more."""
    store = ResultStore(place)
    written = fill(store, 2)
    name = file_of(written[0].unit)
    content = store.storage.read(name)
    store.storage.write(name, content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert store.done() == written[1:]
    assert store.done(tidy=True) == written[1:]
    assert name in store.storage.stamps(), "another driver may be writing it"
    if store.storage.local:
        os.utime(store.storage.local / name, (0, time.time() - LEFTOVER_S - 1))
        assert store.done(tidy=True) == written[1:]
        assert list(store.storage.stamps()) == [file_of(written[1].unit)]
        assert [path.name.startswith(name.partition("/")[2]) for path in (store.storage.local / ASIDE).iterdir()] == [
            True
        ]


def test_a_unit_under_another_name_is_none(place):
    store = ResultStore(place)
    one, other = fill(store, 2)
    store.storage.write(file_of(one.unit), store.storage.read(file_of(other.unit)))
    assert store.done() == [other]


def test_other_files_are_left_alone(place):
    store = ResultStore(place)
    store.storage.write("predictions.parquet", b"someone's own")
    assert store.done(tidy=True) == []
    assert list(store.storage.stamps()) == ["predictions.parquet"]


def test_a_footer_that_is_damaged_where_nobody_looks_is_found_when_read(tmp_path):
    store = ResultStore(tmp_path)
    (unit,) = fill(store, 1)
    path = tmp_path / file_of(unit.unit)
    content = bytearray(path.read_bytes())
    content[len(content) - 8 - int.from_bytes(content[-8:-4], "little") + 4] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DamagedUnit, match=r"is moved to .*; run the same command again"):
        store.read(unit.unit)
    assert store.done() == []


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_page_is_found_when_read(place, part):
    store = ResultStore(place)
    (unit,) = fill(store, 1)
    name = file_of(unit.unit)
    flip(store, name, part)
    assert store.done() == [unit], "a footer does not tell"
    content = store.storage.read(name)
    with pytest.raises(DamagedUnit) as raised:
        store.read(unit.unit)
    (aside,) = Folder.at(place, ASIDE).sizes()
    assert re.fullmatch(
        rf"{re.escape(store.storage.place)}/{name} is damaged \(.*\) and is moved to "
        rf"{re.escape(store.storage.place)}/damaged/{aside}; run the same command again",
        str(raised.value),
    )
    assert Folder.at(place, ASIDE).read(aside) == content
    assert store.done() == []
    with pytest.raises(DamagedUnit, match=rf"{name} is gone; run the same command again"):
        store.read(unit.unit)


def test_a_damaged_unit_that_another_driver_has_moved_aside_is_told_in_a_line(tmp_path, monkeypatch):
    store = ResultStore(tmp_path)
    (unit,) = fill(store, 1)
    (tmp_path / file_of(unit.unit)).write_bytes(b"PAR1")
    move = Folder.set_aside
    monkeypatch.setattr(Folder, "set_aside", lambda *asked: (move(*asked), move(*asked))[1])
    with pytest.raises(DamagedUnit, match=rf"{file_of(unit.unit)} is gone; run the same command again"):
        store.read(unit.unit)


def test_what_another_user_says_of_footers_is_refused(tmp_path, monkeypatch):
    """The folder lies where all of a machine may write."""
    monkeypatch.setattr(results, "FOOTERS", tmp_path)
    store = ResultStore(f"memory://{uuid.uuid4().hex}")
    written = fill(store, 1)
    assert store.done() == written
    held = json.loads(store._index.read_text())
    store._index.write_text(json.dumps(held | {"lists": [["another"]] * len(held["lists"])}))
    assert store.done() != written
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(UnsafeFolder, match=f"^{tmp_path} belongs to user {own}, not to {own + 1}; "):
        store.done()


class Counting(fs.FSSpecHandler):
    """A filesystem that counts the files it opens for reading."""

    opened = 0

    def open_input_file(self, path):
        self.opened += 1
        return super().open_input_file(path)


def test_a_remote_footer_is_read_once_a_machine(footers):
    name = uuid.uuid4().hex
    handler = Counting(fsspec.filesystem("memory"))

    def opened() -> ResultStore:
        store = ResultStore(f"memory://{name}")
        store.storage = dataclasses.replace(store.storage, filesystem=fs.PyFileSystem(handler))
        return store

    written = fill(opened(), 200)
    assert opened().done() == written
    assert handler.opened == 200
    assert opened().done() == written, "another process"
    assert handler.opened == 200
    opened().write(*unit_of(200))
    assert len(opened().done()) == 201
    assert handler.opened == 201, "just the new one"
    victim = file_of(written[0].unit)
    opened().storage.write(victim, opened().storage.read(victim)[:-1])
    assert len(opened().done()) == 200, "it is not what it was"
    for index in footers.iterdir():
        index.write_text(index.read_text()[:-5])
    assert len(opened().done()) == 200, "a damaged index is no index"


def test_a_place_where_nothing_can_be_remembered_costs_reading_alone(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(results, "FOOTERS", tmp_path / "file" / "footers")
    store = ResultStore(f"memory://{uuid.uuid4().hex}")
    written = fill(store, 3)
    assert store.done() == written and store.done() == written
    monkeypatch.setattr(results, "FOOTERS", tmp_path)
    store._index.write_text('{"lists": [], "origins": [], "units": []}')
    assert store.done() == written, "an index of another form is none"


def test_one_listing_and_no_footer_tell_what_a_bucket_holds(bucket, caplog):
    """As its server counts requests: in any number of folders, and a second time without opening a file."""
    written = fill(ResultStore(bucket), 40)
    assert len({file_of(unit.unit).partition("/")[0] for unit in written}) > 20
    caplog.set_level("INFO", "werkzeug")
    for footers_read in (40, 0):
        caplog.clear()
        store = ResultStore(bucket)
        assert store.done() == written
        asked = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
        assert len([line for line in asked if "list-type=2" in line]) == 1
        read = {name for line in asked for name in re.findall(rf"GET (\S+{SUFFIX}) ", line)}
        assert len(read) == footers_read
    caplog.clear()
    store.describe("code", "0" * 16, {"a": "b"})
    assert not [record for record in caplog.records if "list-type=2" in record.getMessage()]
    assert store.described("code") == {"0" * 16: {"a": "b"}}


def test_footers_of_a_large_folder_are_read_once(tmp_path, monkeypatch):
    """What cannot be read any more is still known, as long as size and time stamp say that it is what it was."""
    monkeypatch.setattr(results, "REMEMBERED_FROM", 5)
    store = ResultStore(tmp_path / "store")
    written = fill(store, 5)
    assert store.done() == written
    path = tmp_path / "store" / file_of(written[0].unit)
    state = path.stat()
    path.write_bytes(bytes(state.st_size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert ResultStore(tmp_path / "store").done() == written
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert ResultStore(tmp_path / "store").done() == written[1:]


def test_a_store_of_old_has_all_units_in_one_folder(tmp_path):
    """They are known, read and removed as others are; one that lies in both places is one."""
    store = ResultStore(tmp_path)
    written = fill(store, 4)
    for unit in written[:3]:
        os.rename(tmp_path / file_of(unit.unit), tmp_path / f"{unit.unit}{SUFFIX}")
    number = next(number for number in range(4) if unit_of(number)[0] == written[0])
    store.write(*unit_of(number))
    assert store.done() == written
    assert [store.read(unit.unit) == store.read(unit.unit) for unit in written] == [True] * 4
    store.remove(written[0].unit)
    store.remove(written[1].unit)
    assert store.done() == written[2:]
    assert len(list(tmp_path.rglob(f"*{SUFFIX}"))) == 2


class Flaky(MemoryFileSystem):
    """A storage that refuses requests: ``refuses`` is asked with the request and how often it was made before."""

    protocol = "flaky"
    refuses = staticmethod(lambda request, before: False)
    made: ClassVar[collections.Counter] = collections.Counter()
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    def _request(self, kind: str, path: str) -> None:
        request = (kind, path)
        before = self.made[request]
        self.made[request] += 1
        if Flaky.refuses(request, before):
            raise OSError(errno.ECONNRESET, "connection reset by peer")

    def _open(self, path, mode="rb", **options):
        self._request({"rb": "read", "wb": "write"}[mode], path)
        return super()._open(path, mode, **options)

    def find(self, path, *arguments, **options):
        self._request("list", path)
        return super().find(path, *arguments, **options)


@pytest.fixture
def flaky(monkeypatch):
    """Tells the storage which requests to refuse; returns a place there."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)

    def refuse(refuses):
        monkeypatch.setattr(Flaky, "refuses", staticmethod(refuses))
        return f"flaky://{uuid.uuid4().hex}"

    return refuse


def test_a_sweep_on_a_bucket_equals_one_on_a_folder(bench, undisturbed, cluster, bucket):
    """That Ray's workers reach a bucket, test_blocks.py shows."""
    assert same(bench.run(bucket, cluster), undisturbed)
    again = []
    assert same(bench.run(bucket, cluster, done=lambda unit, report: again.append(unit)), undisturbed)
    assert not again


def test_a_sweep_outlives_faults_that_pass(few, undisturbed_few, cluster, flaky):
    place = flaky(lambda request, before: before < ATTEMPTS - 1)
    assert same(few.run(place, cluster), undisturbed_few)
    refused = {kind for (kind, path), made in Flaky.made.items() if place.removeprefix("flaky:/") in f"/{path}"}
    assert refused == {"list", "read", "write"}


@pytest.mark.parametrize("what", ["list", "read", "write"])
def test_a_fault_that_lasts_stops_the_sweep_by_name(few, undisturbed_few, cluster, flaky, what):
    """Two units are written before writing fails; listing and reading fail when all is done."""
    written = set()

    def refuses(request, before):
        if request[0] == "write" == what and len(written) < 2:
            written.add(request)
        return request[0] == what and request not in written

    place = flaky(refuses)
    said = {"list": "list files", "read": rf"read \w\w/\w{{24}}{SUFFIX}", "write": rf"write \w\w/\w{{24}}{SUFFIX}"}[
        what
    ]
    with pytest.raises(
        StorageUnavailable, match=rf"^{place}: could not {said} in 4 attempts, last: .*connection reset by peer"
    ):
        few.run(place, cluster)
    flaky(lambda request, before: False)
    if what == "write":
        assert len(ResultStore(place).done()) == 2
    assert bool(few.units(place)) == (what == "write")
    assert same(few.run(place, cluster), undisturbed_few), "what was finished is kept, the rest is done"


def test_a_full_storage_is_no_fault_that_passes(flaky, monkeypatch):
    def full(self, kind, path):
        raise OSError(errno.EDQUOT, "quota exceeded")

    store = ResultStore(flaky(lambda request, before: False))
    monkeypatch.setattr(Flaky, "_request", full)
    with pytest.raises(
        StorageFull, match=rf"^{store.storage.place}: no space is left \(quota exceeded\); finished work"
    ):
        store.write(*unit_of(0))


def test_a_damaged_unit_of_a_bucket_is_asked_again(few, undisturbed_few, cluster, bucket):
    few.run(bucket, cluster)
    store = ResultStore(bucket)
    victim = store.done()[0].unit
    flip(store, file_of(victim), "predictions")
    with pytest.raises(DamagedUnit, match=victim):
        few.run(bucket, cluster)
    redone = []
    assert same(few.run(bucket, cluster, done=lambda unit, report: redone.append(unit)), undisturbed_few)
    assert redone == [victim]


KILLED = """
import dataclasses, os, signal, sys
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs
from pipelines.sweep.results import ResultStore
from test_results import unit_of

class HalfWritten:
    closed = False
    def __init__(self, stream):
        self.stream = stream
    def write(self, content):
        self.stream.write(memoryview(content)[: len(content) // 2])
        self.stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

class Killing(fs.FSSpecHandler):
    def create_dir(self, path, recursive):
        inner.create_dir(path, recursive=recursive)
    def open_output_stream(self, path, metadata=None):
        return pa.PythonFile(HalfWritten(inner.open_output_stream(path)), mode="w")

store = ResultStore(sys.argv[1])
inner = fs.PyFileSystem(fs.FSSpecHandler(LocalFileSystem())) if store.storage.local else store.storage.filesystem
store.write(*unit_of(0))
store.storage = dataclasses.replace(store.storage, filesystem=fs.PyFileSystem(Killing(None)))
store.write(*unit_of(1))
"""


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_a_killed_upload_leaves_nothing_that_counts(place):
    """Killed half-way into the second unit: on a bucket, and where files are written in place, without a rename."""
    killed = subprocess.run([sys.executable, "-c", KILLED, place], cwd=ROOT, env=os.environ | {"PYTHONPATH": PATHS})
    assert killed.returncode == -signal.SIGKILL
    store = ResultStore(place)
    assert store.done(tidy=True) == [unit_of(0)[0]]
    store.write(*unit_of(1))
    assert len(store.done()) == 2
