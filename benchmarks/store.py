"""What a large result store costs: to know what it holds, to tell what a sweep lacks of that, to collect its tables, and to
put its small units together.

Each part runs in a process of its own, so its peak memory is its own. The folder of many units holds files whose footers
are whole and tell different units; their pages are copies of one another and are never read. The last line is one JSON
object.

    python -m benchmarks.store
    python -m benchmarks.store --units 200000 --answers 10000000
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sweep import results
from pipelines.sweep.collection import collect
from pipelines.sweep.compaction import compact
from pipelines.sweep.results import PARTS, ResultStore, StoredUnit, file_of, unit_name
from pipelines.sweep.units import UnitExample, answers_there

QUESTIONS, TRIALS_A_UNIT, QUESTIONS_A_UNIT, QUESTIONS_AN_IMAGE = 2500, 20, 50, 5
LIMITS = {"first_s": 60.0, "again_s": 10.0, "collect_us": 3.0, "open_files": 64}


def write_units(folder: Path, count: int) -> None:
    """``count`` units of two trials and three questions each, which just their footers tell apart."""
    digits = 10
    trials, examples = (tuple(f"{kind}{'0' * digits}{n}" for n in range(many)) for kind, many in (("t", 2), ("d", 3)))
    store = ResultStore(folder / "template")
    store.write(
        StoredUnit(unit_name(trials, examples), trials, examples, json.dumps({"torch": "2"})), _rows(trials, examples)
    )
    (path,) = (folder / "template").rglob("*.parquet")
    template, zeros = path.read_bytes(), b"0" * digits
    path.unlink()

    for number in range(count):
        own = f"{number:0{digits}}"
        unit = unit_name(*([name.replace("0" * digits, own) for name in names] for names in (trials, examples)))
        target = folder / file_of(unit)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(template.replace(zeros, own.encode()))


def _rows(trials: tuple[str, ...], examples: tuple[str, ...]) -> dict[str, pa.Table]:
    """Rows of a unit, 32 tokens kept of each image."""
    rng = np.random.default_rng(0)
    kept = rng.integers(0, 576, 32).astype(np.int16)
    said = [str([round(float(x), 2) for x in rng.random(4)]) for _ in range(len(trials) * len(examples))]
    places = [(trial, example) for trial in trials for example in examples]
    images = dict.fromkeys(f"i{int(example[1:]) // QUESTIONS_AN_IMAGE}" for example in examples)

    answers = {
        "trial_id": [trial for trial, _ in places],
        "example_id": [f"e{example[1:]}" for _, example in places],
        "prediction": said,
        "kept_final": [kept] * len(places),
        "limit_reached": [False] * len(places),
    }
    shown = [(trial, image) for trial in trials for image in images]
    selections = {
        "trial_id": [trial for trial, _ in shown],
        "image": [image for _, image in shown],
        "indices": [kept] * len(shown),
        "pillar": [[False] * 32] * len(shown),
    }
    timings = {
        "trial_id": list(trials),
        "unit": [examples[0]] * len(trials),
        "questions": [len(examples)] * len(trials),
    }
    timings |= {name: [0.1] * len(trials) for name in ("selection_s", "trunk_s", "answer_s")}
    tables = zip(PARTS.items(), (answers, selections, timings), strict=True)
    return {part: pa.table(columns, schema=schema) for (part, schema), columns in tables}


def write_answers(folder: Path, answers: int) -> None:
    """A store of whole units: every trial on every question."""
    store, trials = ResultStore(folder), answers // QUESTIONS
    for first in range(0, trials, TRIALS_A_UNIT):
        ids = tuple(f"t{number:06}" for number in range(first, min(first + TRIALS_A_UNIT, trials)))
        for start in range(0, QUESTIONS, QUESTIONS_A_UNIT):
            examples = tuple(f"d{number:06}" for number in range(start, start + QUESTIONS_A_UNIT))
            store.write(StoredUnit(unit_name(ids, examples), ids, examples, '{"torch": "2"}'), _rows(ids, examples))


class Watched:
    """CPU seconds, and the most files that were open beside those at first."""

    def __enter__(self) -> Watched:
        self.done, self.most, self.first = threading.Event(), 0, len(os.listdir("/proc/self/fd"))
        self.watch = threading.Thread(target=self._count, daemon=True)
        self.watch.start()
        self.cpu, self.wall = time.process_time(), time.perf_counter()
        return self

    def _count(self) -> None:
        while not self.done.wait(0.01):
            self.most = max(self.most, len(os.listdir("/proc/self/fd")) - self.first)

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        self.done.set()
        self.watch.join()


def listing(folder: Path) -> dict[str, float]:
    """Know what the store holds, twice."""
    results.FOOTERS = folder / "footers"
    figures: dict[str, float] = {}
    for name in ("first", "again"):
        with Watched() as watched:
            count = len(ResultStore(folder / "units").done(tidy=True))
        figures |= {f"{name}_s": watched.cpu, f"{name}_wall_s": watched.wall}
    return {"units": count} | figures | decision(count)


def decision(units: int) -> dict[str, float]:
    """Tell of units that are known, of trials in groups on images in batches, which of 100 million answers are there."""
    trials, batches = max(units * TRIALS_A_UNIT // 2000, TRIALS_A_UNIT), min(2000, units)
    groups = [
        tuple(f"t{number:015}.code.versions" for number in range(first, first + TRIALS_A_UNIT))
        for first in range(0, trials, TRIALS_A_UNIT)
    ]
    asked = [
        tuple(f"d{batch * QUESTIONS_A_UNIT + number:023}" for number in range(QUESTIONS_A_UNIT))
        for batch in range(batches)
    ]
    there = [(ids, digests) for ids in groups for digests in asked]
    of_sweep: Any = [SimpleNamespace(trial_id=one.partition(".")[0], answer_id=one) for ids in groups for one in ids]
    examples = [UnitExample(digest, f"e{digest}", "i", "", 8) for digests in asked for digest in digests]
    with Watched() as watched:
        held = answers_there(of_sweep, examples, there, "any")
    assert all(present.bit_count() == len(examples) for present in held.values())
    return {"decision_s": watched.cpu}


def collection(folder: Path) -> dict[str, float]:
    """Collect the tables, copy the largest for comparison, compact the store and collect again."""
    store = ResultStore(folder / "answers")
    stored = store.done()
    trials = sorted({trial for unit in stored for trial in unit.trials})
    digests = sorted({example for unit in stored for example in unit.examples})
    examples = [UnitExample(one, f"e{one[1:]}", f"i{int(one[1:]) // QUESTIONS_AN_IMAGE}", "", 8) for one in digests]
    answers, figures = len(trials) * len(examples), {"small_units": float(len(stored))}
    targets = {part: folder / f"{part}.parquet" for part in PARTS}

    for name in ("collect", "compacted"):
        held = store.done()
        with Watched() as watched:
            collect(store, trials, examples, targets, folder / "collecting", stored=held)
        figures |= {f"{name}_us": 1e6 * watched.cpu / answers, f"{name}_open_files": watched.most}
        if name == "collect":
            with Watched() as watched:
                compact(store)
            figures |= {"compact_us": 1e6 * watched.cpu / answers}
    assert pq.read_metadata(targets["predictions"]).num_rows == answers
    with Watched() as watched:
        whole = pq.ParquetFile(targets["predictions"])
        with pq.ParquetWriter(folder / "copy.parquet", whole.schema_arrow) as writer:
            for number in range(whole.num_row_groups):
                writer.write_table(whole.read_row_group(number, use_threads=False))
    return {"answers": answers, "units_left": len(store.done())} | figures | {"copy_us": 1e6 * watched.cpu / answers}


PARTS_MEASURED = {"listing": listing, "collection": collection}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--units", type=int, default=20_000, help="of the store that is listed (default: 20,000)")
    parser.add_argument("--answers", type=int, default=1_000_000, help="that are collected (default: 1,000,000)")
    parser.add_argument("--measure", choices=PARTS_MEASURED, help=argparse.SUPPRESS)  # the child's half
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        figures = PARTS_MEASURED[options.measure](options.folder)
        print(json.dumps(figures | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2}))
        return

    measured = {"benchmark": "store", **{f"limit_{name}": limit for name, limit in LIMITS.items()}}
    with tempfile.TemporaryDirectory() as name:
        for part, write, count in (
            ("listing", lambda many: write_units(Path(name, "units"), many), options.units),
            ("collection", lambda many: write_answers(Path(name, "answers"), many), options.answers),
        ):
            if count:
                write(count)
                command = [sys.executable, "-m", "benchmarks.store", "--measure", part, "--folder", name]
                told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(f"{part}: " + ", ".join(f"{key} {value:.3g}" for key, value in told.items()))
                measured |= {f"{part}_peak_gib" if key == "peak_gib" else key: value for key, value in told.items()}
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in measured.items()}))


if __name__ == "__main__":
    main()
