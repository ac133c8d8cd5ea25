"""What the units of a store hold → sorted Parquet files, in memory that does not grow with the answers.

Units hold a few trials on a few images, in any order; a table wants all rows of a trial together. So rows are sorted on
disk: trials are cut into chunks; what is read is gathered up to a bound and left as a *run*, an Arrow file with one
batch a chunk; then each chunk is taken from all runs, sorted and written as a row group. Chunks follow from trials and
examples alone, so the same answers give the same bytes, whatever units they came in.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.files.atomic import atomic_path
from pipelines.files.storage import room_in
from pipelines.settings import Reuse
from pipelines.sweep.results import PARTS, ResultStore, StoredUnit, reuse_key
from pipelines.sweep.units import UnitExample, bits

KEYS = {"predictions": ("trial_id", "example_id"), "kept": ("trial_id", "image"), "timings": ("trial_id", "unit")}
CHUNK_ROWS = 2**16  # answers of a row group, unless one trial has more
RUN_BYTES = 32 * 1024**2  # gathered of each part before it is put on disk


@dataclass
class Origins:
    """Where collected rows came from: the provenance of their units, each once, and trial id → the answer ids they were
    stored under. Units of which nothing was taken do not count."""

    units: set[str] = field(default_factory=set)
    answers: dict[str, set[str]] = field(default_factory=dict)

    @property
    def provenance(self) -> list[dict[str, Any]]:
        return [json.loads(one) for one in sorted(self.units)]


def collect(
    store: ResultStore,
    answers: Iterable[str],
    examples: Sequence[UnitExample],
    targets: Mapping[str, Path],
    scratch: Path,
    reuse: Reuse = "any",
    stored: Sequence[StoredUnit] | None = None,
) -> Origins:
    """Write the stored rows of trials, by their ``answers`` (answer ids), and ``examples``, sorted, each once.

    ``targets``: part → file. ``stored``: what the store is known to hold; null: it is listed.

    Units may overlap and hold a row twice; where ``reuse`` takes answers of other versions, those of these very ones are
    taken first. ``scratch``: a folder for what is under way; it is made, and removed in the
    end, with what a killed run left there. Raises :class:`DamagedUnit`, :class:`StorageFull` and
    :class:`StorageUnavailable`; a target is whole or as it was.
    """
    own = frozenset(answers)
    known = {reuse_key(one, reuse): one.partition(".")[0] for one in own}
    ordered, origins = sorted(known.values()), Origins()

    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with room_in(scratch):
            scratch.mkdir(parents=True)
            runs = {part: _Runs(scratch / part, PARTS[part], ordered, len(examples)) for part in KEYS}
            held = store.done() if stored is None else stored
            for rows in _relevant(store, held, own, known, examples, reuse, origins):
                for part, table in rows.items():
                    runs[part].add(table)

        for part, target in targets.items():
            with (
                room_in(target.parent),
                atomic_path(target) as fresh,
                pq.ParquetWriter(fresh, PARTS[part]) as writer,
            ):
                for rows in runs[part].chunks():
                    chunk = _sorted_once(rows, KEYS[part])
                    writer.write_table(chunk, row_group_size=max(len(chunk), 1))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return origins


def _relevant(
    store: ResultStore,
    stored: Sequence[StoredUnit],
    own: frozenset[str],
    known: Mapping[str, str],
    examples: Sequence[UnitExample],
    reuse: Reuse,
    origins: Origins,
) -> Iterator[dict[str, pa.Table]]:
    """Unit by unit the rows that are of trials ``known`` (by reuse key) and of ``examples``; ``origins`` are noted.

    Units whose answers are all among ``own`` come first; of others what these lack is taken.
    """
    by_digest = {example.digest: example for example in examples}
    number = {digest: place for place, digest in enumerate(by_digest)}
    held_by = functools.cache(
        lambda digests: bits([number[digest] for digest in digests if digest in number], len(number))
    )
    found = []
    for unit in stored:
        answers = {one: known[key] for one in unit.trials if (key := reuse_key(one, reuse)) in known}
        if answers and held_by(unit.examples):
            found.append((unit, answers))
    found.sort(key=lambda one: not own.issuperset(one[1]))

    units, taken, there = [], [], dict[str, int]()
    for unit, answers in found:
        held = held_by(unit.examples)
        if not own.issuperset(answers):
            answers = {answer: trial for answer, trial in answers.items() if held & ~there.get(trial, 0)}
        if not answers:
            continue
        units.append(unit)
        taken.append(pa.array(answers.values(), pa.string()))
        origins.units.update([unit.provenance] if unit.provenance else [])
        for answer, trial_id in answers.items():
            there[trial_id] = there.get(trial_id, 0) | held
            origins.answers.setdefault(trial_id, set()).add(answer)

    for unit, trials, tables in zip(units, taken, store.read_all(unit.unit for unit in units), strict=True):
        here = [by_digest[digest] for digest in unit.examples if digest in by_digest]
        wanted = {"example_id": {example.example_id for example in here}, "image": {example.image for example in here}}
        rows = {}
        for part, (_, key) in KEYS.items():
            chosen = pc.is_in(tables[part]["trial_id"], trials)
            if key in wanted:
                chosen = pc.and_(chosen, pc.is_in(tables[part][key], pa.array(sorted(wanted[key]), pa.string())))
            rows[part] = tables[part].filter(chosen)
        yield rows


class _Runs:
    """Rows of one part, on their way to chunks of ``trials``."""

    def __init__(self, folder: Path, schema: pa.Schema, trials: Sequence[str], examples: int) -> None:
        folder.mkdir()
        self.folder, self.schema, self.trials = folder, schema, pa.array(trials, pa.string())
        self.chunk_trials = max(1, CHUNK_ROWS // max(examples, 1))
        self.count = -(-len(trials) // self.chunk_trials)
        self.gathered: list[pa.Table] = []
        self.bytes = 0
        self.files: list[Path] = []

    def add(self, rows: pa.Table) -> None:
        self.gathered.append(rows)
        self.bytes += rows.nbytes
        if self.bytes > RUN_BYTES:
            self._put_down()

    def _put_down(self) -> None:
        """Leave what is gathered as a run; the order of rows within a chunk stays."""
        rows = pa.concat_tables([self.schema.empty_table(), *self.gathered]).combine_chunks()
        self.gathered, self.bytes = [], 0
        chunk = pc.index_in(rows["trial_id"], self.trials).to_numpy() // self.chunk_trials
        order = np.argsort(chunk, kind="stable")
        ends = np.cumsum(np.bincount(chunk, minlength=self.count))
        self.files.append(self.folder / f"{len(self.files)}.arrow")
        with pa.OSFile(str(self.files[-1]), "wb") as sink, pa.ipc.new_file(sink, self.schema) as writer:
            for start, end in zip([0, *ends], ends, strict=False):
                batch = rows.take(order[start:end]).combine_chunks().to_batches()
                writer.write_batch(batch[0] if batch else pa.RecordBatch.from_pylist([], self.schema))

    def chunks(self) -> Iterator[pa.Table]:
        """The rows of each chunk, in the order they were added."""
        self._put_down()
        readers = [pa.ipc.open_file(pa.OSFile(str(path))) for path in self.files]
        for number in range(self.count):
            yield pa.Table.from_batches([reader.get_batch(number) for reader in readers])


def _sorted_once(table: pa.Table, key: tuple[str, str]) -> pa.Table:
    table = table.sort_by([(name, "ascending") for name in key]).combine_chunks()
    if len(table) < 2:
        return table
    again = [pc.equal(table[name].slice(1), table[name].slice(0, len(table) - 1)) for name in key]
    return table.filter(pa.concat_arrays([pa.array([True]), pc.invert(pc.and_(*again)).combine_chunks()]))
