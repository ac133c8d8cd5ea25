"""Collection: the rows that sorting in memory would give, the same bytes from any units, in bounded memory."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.sweep import collection
from pipelines.sweep.collection import collect
from pipelines.sweep.results import PARTS, DamagedUnit, ResultStore, StoredUnit, file_of, unit_name
from pipelines.sweep.units import UnitExample

TRIALS = ["t3", "t0", "t4", "t1", "t2"]
EXAMPLES = [UnitExample(f"d{n}", f"e{n}", f"i{n // 2}", "", 8) for n in (3, 0, 5, 1, 4, 2)]


def prediction(trial: str, example: UnitExample) -> dict:
    return {
        "trial_id": trial,
        "example_id": example.example_id,
        "prediction": f"{trial} says {example.digest}",
        "kept_final": [len(trial), int(example.digest[1:])],
        "limit_reached": int(example.digest[1:]) % 2 == 1,
    }


def kept(trial: str, image: str) -> dict:
    return {"trial_id": trial, "image": image, "indices": [int(image[1:]), 7], "pillar": [True, False]}


def store_unit(store: ResultStore, trials: list[str], examples: list[UnitExample]) -> None:
    unit = unit_name(trials, [example.digest for example in examples])
    images = dict.fromkeys(example.image for example in examples)
    seconds = {"selection_s": 0.1, "trunk_s": 0.2, "answer_s": 0.3}
    rows = {
        "predictions": [prediction(trial, example) for trial in trials for example in examples],
        "kept": [kept(trial, image) for trial in trials for image in images],
        "timings": [{"trial_id": trial, "unit": unit, "questions": len(examples), **seconds} for trial in trials],
    }
    tables = {part: pa.Table.from_pylist(rows[part], PARTS[part]) for part in PARTS}
    store.write(StoredUnit(unit, tuple(trials), tuple(example.digest for example in examples)), tables)


def collected(store: ResultStore, folder: Path, trials=TRIALS, examples=EXAMPLES) -> dict[str, Path]:
    targets = {part: folder / f"{part}.parquet" for part in PARTS}
    collect(store, trials, examples, targets, folder / "collecting")
    assert not (folder / "collecting").exists()
    return targets


FOREIGN = [UnitExample("d8", "e8", "i4", "", 8), UnitExample("d9", "e0", "i0", "", 8)]  # the second: e0 in other words
some_units = st.lists(
    st.tuples(
        st.lists(st.sampled_from([*TRIALS, "foreign"]), min_size=1, unique=True),
        st.lists(st.sampled_from([*EXAMPLES, *FOREIGN]), min_size=1, unique_by=lambda example: example.example_id),
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(some_units, st.integers(1, 40), st.sampled_from([0, 1500, 10**9]))
def test_rows_are_those_asked_for_sorted_and_once(units, chunk_rows, run_bytes):
    """Overlapping units, trials and words nobody asks for, chunks and runs of any size; against sets in memory."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(collection, "CHUNK_ROWS", chunk_rows)
        patch.setattr(collection, "RUN_BYTES", run_bytes)
        folder = Path(name)
        store, one_by_one = ResultStore(folder / "store"), ResultStore(folder / "one by one")
        for trials, examples in units:
            store_unit(store, trials, examples)
        answers = {
            (trial, example)
            for trials, examples in units
            for trial in trials
            for example in examples
            if trial in TRIALS and example in EXAMPLES
        }
        for trial, example in answers:
            store_unit(one_by_one, [trial], [example])
        found = collected(store, folder)
        ordered = sorted(answers, key=lambda answer: (answer[0], answer[1].example_id))
        assert pq.read_table(found["predictions"]).to_pylist() == [prediction(*answer) for answer in ordered]
        images = sorted({(trial, example.image) for trial, example in answers})
        assert pq.read_table(found["kept"]).to_pylist() == [kept(*shown) for shown in images]
        timed = [(row["trial_id"], row["unit"]) for row in pq.read_table(found["timings"]).to_pylist()]
        assert timed == sorted(set(timed))

        written = {part: found[part].read_bytes() for part in ("predictions", "kept")}
        again = collected(one_by_one, folder)
        assert {part: again[part].read_bytes() for part in written} == written, "units do not show in the bytes"


def peak(trials: int, folder: Path) -> tuple[int, int]:
    """Most bytes Arrow held while ``trials`` x 120 answers were collected, and bytes of the table."""
    examples = [UnitExample(f"d{n}", f"e{n}", f"i{n // 4}", "", 8) for n in range(120)]
    names = [f"t{number:05}" for number in range(trials)]
    store = ResultStore(folder / "store")
    for start in range(0, trials, 10):
        for first in range(0, 120, 40):
            store_unit(store, names[start : start + 10], examples[first : first + 40])
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        found = collected(store, folder, names, examples)
    finally:
        pa.set_memory_pool(usual)
    table = pq.read_table(found["predictions"])
    assert len(table) == trials * 120
    return pool.max_memory(), table.nbytes


@pytest.mark.parametrize("alone", [True, False])
def test_answers_of_these_versions_are_taken_before_others(tmp_path, alone):
    """A trial is not mixed of two versions where one has all of it, whatever the names of the units."""
    store, digests = ResultStore(tmp_path / "store"), tuple(example.digest for example in EXAMPLES)
    for version, kept_back in (("old", 0), ("new", 0 if alone else 1)):
        for count in range(len(EXAMPLES) - kept_back):
            answers, (digest,) = tuple(f"{trial}.code.{version}" for trial in TRIALS), digests[count : count + 1]
            rows = [prediction(trial, EXAMPLES[count]) | {"prediction": version} for trial in TRIALS]
            tables = {part: pa.Table.from_pylist(rows if part == "predictions" else [], PARTS[part]) for part in PARTS}
            unit = StoredUnit(unit_name(answers, [digest]), answers, (digest,), json.dumps({"torch": version}))
            store.write(unit, tables)

    target = {"predictions": tmp_path / "predictions.parquet"}
    asked = [f"{trial}.code.new" for trial in TRIALS]
    origins = collect(store, asked, EXAMPLES, target, tmp_path / "collecting")
    told = pq.read_table(target["predictions"]).group_by(["prediction"]).aggregate([("trial_id", "count")]).to_pydict()
    others = 0 if alone else len(TRIALS)
    assert dict(zip(told["prediction"], told["trial_id_count"], strict=True)) == {
        "new": len(TRIALS) * len(EXAMPLES) - others,
        **({"old": others} if others else {}),
    }
    assert [one["torch"] for one in origins.provenance] == (["new"] if alone else ["new", "old"])
    versions = {"new"} if alone else {"new", "old"}
    assert origins.answers == {trial: {f"{trial}.code.{version}" for version in versions} for trial in TRIALS}


def test_memory_hardly_grows_with_the_answers(tmp_path, monkeypatch):
    """Eight times the answers: what is held grows by less than a tenth of what the table does."""
    monkeypatch.setattr(collection, "CHUNK_ROWS", 1200)
    monkeypatch.setattr(collection, "RUN_BYTES", 100_000)
    few, small = peak(100, tmp_path / "few")
    many, large = peak(800, tmp_path / "many")
    assert large > 7.9 * small
    assert many - few < (large - small) / 10


def test_few_files_are_open_however_many_runs_there_are(tmp_path, monkeypatch):
    """As long as units are read and as chunks are written, from hundreds of runs."""
    monkeypatch.setattr(collection, "CHUNK_ROWS", 6)
    monkeypatch.setattr(collection, "RUN_BYTES", 1)
    store, names = ResultStore(tmp_path / "store"), [f"t{number:02}" for number in range(40)]
    for trial in names:
        for example in EXAMPLES[:3]:
            store_unit(store, [trial], [example])

    at_first, most = len(os.listdir("/proc/self/fd")), []
    for name in ("_put_down", "chunks"):
        wrapped = getattr(collection._Runs, name)
        watched = lambda runs, do=wrapped: (most.append(len(os.listdir("/proc/self/fd"))), do(runs))[1]  # noqa: E731 (binds the loop's own)
        monkeypatch.setattr(collection._Runs, name, watched)
    collected(store, tmp_path, names, EXAMPLES[:3])
    assert len(most) > 3 * 100
    assert max(most) - at_first <= 20


def test_a_damaged_unit_leaves_the_tables_as_they_were(tmp_path):
    store = ResultStore(tmp_path / "store")
    store_unit(store, TRIALS, EXAMPLES)
    before = {part: path.read_bytes() for part, path in collected(store, tmp_path).items()}
    (unit,) = store.done()
    path = tmp_path / "store" / file_of(unit.unit)
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(0)
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedUnit, match=unit.unit):
        collected(store, tmp_path)
    assert {part: (tmp_path / f"{part}.parquet").read_bytes() for part in before} == before
    assert not (tmp_path / "collecting").exists()


def test_what_a_killed_run_left_is_removed(tmp_path):
    store = ResultStore(tmp_path / "store")
    store_unit(store, TRIALS, EXAMPLES)
    (tmp_path / "collecting").mkdir()
    (tmp_path / "collecting" / "predictions.runs").write_bytes(b"half a run")
    assert pq.read_metadata(collected(store, tmp_path)["predictions"]).num_rows == len(TRIALS) * len(EXAMPLES)
