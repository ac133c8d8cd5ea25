"""Small units put together: the same tables from fewer files, whoever reads or compacts the store meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from forked import begin
from test_collection import collected, store_unit

from pipelines.files.storage import LEFTOVER_S
from pipelines.sweep import compaction
from pipelines.sweep.compaction import Compacted, compact
from pipelines.sweep.results import DamagedUnit, ResultStore, file_of
from pipelines.sweep.units import UnitExample

TRIALS = [["t0", "t1"], ["t2"]]
EXAMPLES = [UnitExample(f"d{n:02}", f"e{n:02}", f"i{n // 2:02}", "", 8) for n in range(16)]
ALL = [trial for trials in TRIALS for trial in trials]


def small_units(folder: Path) -> ResultStore:
    """Sixteen units: two groups of trials, two questions of one image each."""
    store = ResultStore(folder)
    for trials in TRIALS:
        for start in range(0, len(EXAMPLES), 2):
            store_unit(store, trials, EXAMPLES[start : start + 2])
    return store


def tables(store: ResultStore, folder: Path) -> dict[str, bytes]:
    found = collected(store, folder, ALL, EXAMPLES)
    return {part: found[part].read_bytes() for part in ("predictions", "kept")}


def grow_old(store: ResultStore) -> None:
    for path in store.storage.local.rglob("*.parquet"):
        os.utime(path, (0, time.time() - LEFTOVER_S - 1))


def test_tables_stay_and_files_go_when_the_new_ones_are_old(tmp_path):
    store = small_units(tmp_path / "store")
    before, old = tables(store, tmp_path), store.done()
    assert compact(store) == Compacted(made=2, small=16, removed=0, wait=16)
    assert [len(unit.trials) * len(unit.examples) for unit in store.done()] in ([32, 16], [16, 32])
    assert tables(store, tmp_path) == before
    assert all(store.read(unit.unit) for unit in old), "who listed the store before finds what it listed"

    assert compact(store) == Compacted(made=0, small=0, removed=0, wait=16), "not yet"
    grow_old(store)
    assert compact(store) == Compacted(made=0, small=0, removed=16, wait=0)
    assert len(list((tmp_path / "store").rglob("*.parquet"))) == 2
    assert tables(store, tmp_path) == before
    assert compact(store) == Compacted(0, 0, 0, 0)


def test_units_that_overlap_or_are_large_stay_and_what_is_put_together_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "MOST_EXAMPLES", 4)
    store = ResultStore(tmp_path)
    for chosen in (EXAMPLES[:2], EXAMPLES[1:3], EXAMPLES[4:6], EXAMPLES[6:8], EXAMPLES[8:12]):
        store_unit(store, ["t"], list(chosen))
    compact(store)
    counts = sorted(len(unit.examples) for unit in store.done())
    # Of the first four, which overlap in one question, two make one; of the rest one or two remain.
    assert max(counts) == 4 and counts.count(4) >= 2 and sum(counts) >= 11
    held = [example for unit in store.done() for example in unit.examples]
    assert set(held) == {example.digest for example in (*EXAMPLES[:3], *EXAMPLES[4:12])}


def test_a_unit_that_is_put_together_again_replaces_all_that_came_before(tmp_path):
    store = small_units(tmp_path / "store")
    before = tables(store, tmp_path)
    compact(store)
    more = [UnitExample(f"d{n}", f"e{n}", f"i{n}", "", 8) for n in (98, 99)]
    for example in more:
        store_unit(store, TRIALS[1], [example])
    assert compact(store) == Compacted(made=1, small=3, removed=0, wait=19)
    grow_old(store)
    assert compact(store) == Compacted(made=0, small=0, removed=19, wait=0), "each counts once"
    assert len(store.done()) == len(list((tmp_path / "store").rglob("*.parquet"))) == 2
    assert tables(store, tmp_path) == before


def test_nothing_is_removed_for_a_unit_that_is_damaged(tmp_path, capsys):
    store = small_units(tmp_path / "store")
    before = tables(store, tmp_path)
    compact(store)
    made = next(unit for unit in store.done() if len(unit.trials) == 2)
    path = tmp_path / "store" / file_of(made.unit)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    grow_old(store)
    assert compact(store).removed == 8, "those of the whole one alone"
    assert f"{file_of(made.unit)} is damaged" in capsys.readouterr().err
    assert tables(store, tmp_path) == before
    with pytest.raises(DamagedUnit):
        store.read(made.unit)


def test_two_processes_compact_while_a_third_reads_and_writes(tmp_path):
    store = small_units(tmp_path / "store")
    before = tables(store, tmp_path)

    def compact_often() -> None:
        for _ in range(12):
            compact(ResultStore(tmp_path / "store"))

    running = [begin(compact_often) for _ in range(2)]
    for number in range(6):
        assert tables(store, tmp_path) == before
        store_unit(store, [f"new{number}"], EXAMPLES[:8])
        store_unit(store, [f"new{number}"], EXAMPLES[8:])
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in running] == [0, 0]
    compact(store)
    assert {len(unit.examples) for unit in store.done()} == {16}
    assert sorted(trial for unit in store.done() for trial in unit.trials) == sorted(
        [*ALL, *(f"new{n}" for n in range(6))]
    )
    assert tables(store, tmp_path) == before


def test_replaced_units_are_removed_while_another_process_reads(tmp_path):
    """A reader that lists and reads again and again beside one that puts together and removes, at once, what is replaced:
    a table is whole, or a unit that was listed is gone, which the next listing does without."""
    store = small_units(tmp_path / "store")
    before, (saw, say) = tables(store, tmp_path), os.pipe()

    def read_on() -> None:
        os.close(saw)
        reader, whole = ResultStore(tmp_path / "store"), 0
        while whole < 20:  # every unit that is gone was removed, and the other process ends with that
            try:
                assert tables(reader, tmp_path / "read") == before
            except DamagedUnit as error:
                assert str(error).endswith(" is gone; run the same command again")
                continue
            whole += 1
            if whole == 2:
                os.write(say, b".")

    running = begin(read_on)
    os.close(say)
    assert os.read(saw, 1) == b"."  # it reads by now
    removed = 0
    for number in range(6):
        compact(store)
        removed += compact(store, age_s=0).removed
        grown = [UnitExample(f"d9{number}", f"e9{number}", "i99", "", 8)]
        store_unit(store, TRIALS[0], grown)
    assert os.waitstatus_to_exitcode(os.waitpid(running, 0)[1]) == 0
    os.close(saw)
    assert removed > 16 and tables(store, tmp_path) == before
