"""What the units of a store hold → sorted Parquet files, in memory that does not grow with the answers.

Units hold a few trials on a few images, in any order; a table wants all rows of a trial together. So rows are sorted on
disk: trials are cut into chunks; what is read is gathered up to a bound and left as a *run*, one batch a chunk; then each
chunk is taken from all runs, sorted and written as a row group. The runs of a table lie in one file, one behind the other,
so that however many there are, few files are open. Chunks follow from trials and
examples alone, so the same answers give the same bytes, whatever units they came in.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import os
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
SLICE_ROWS = 128  # of one chunk side by side from which it is taken as it stands


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
    files = contextlib.ExitStack()
    try:
        with room_in(scratch):
            scratch.mkdir(parents=True)
            runs = {
                part: files.enter_context(_Runs(scratch / f"{part}.runs", PARTS[part], ordered, len(examples)))
                for part in KEYS
            }
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
        files.close()
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
    # Many units hold the same trials: what is asked of these is found once.
    answers_of = functools.cache(
        lambda ids: {one: known[key] for one in ids if (key := reuse_key(one, reuse)) in known}
    )
    ids_of = functools.cache(lambda ids: pa.array(answers_of(ids).values(), pa.string()))
    is_own = functools.cache(lambda ids: own.issuperset(answers_of(ids)))
    found = [unit for unit in stored if answers_of(unit.trials) and held_by(unit.examples)]

    units, taken, together = [], [], dict[tuple[str, ...], int]()
    for unit in (unit for unit in found if is_own(unit.trials)):
        units.append(unit)
        taken.append(ids_of(unit.trials))
        together[unit.trials] = together.get(unit.trials, 0) | held_by(unit.examples)
    there: dict[str, int] = {}
    for ids, held in together.items():
        for answer, trial_id in answers_of(ids).items():
            there[trial_id] = there.get(trial_id, 0) | held
            origins.answers.setdefault(trial_id, set()).add(answer)

    for unit in (unit for unit in found if not is_own(unit.trials)):
        held = held_by(unit.examples)
        answers = {one: trial for one, trial in answers_of(unit.trials).items() if held & ~there.get(trial, 0)}
        if not answers:
            continue
        units.append(unit)
        taken.append(pa.array(answers.values(), pa.string()))
        for answer, trial_id in answers.items():
            there[trial_id] = there.get(trial_id, 0) | held
            origins.answers.setdefault(trial_id, set()).add(answer)
    origins.units.update(unit.provenance for unit in units if unit.provenance)

    for unit, trials, tables in zip(units, taken, store.read_all(unit.unit for unit in units), strict=True):
        here = [by_digest[digest] for digest in unit.examples if digest in by_digest]
        if len(trials) == len(unit.trials) and len(here) == len(unit.examples):
            yield tables
            continue
        wanted = {"example_id": {example.example_id for example in here}, "image": {example.image for example in here}}
        rows = {}
        for part, (_, key) in KEYS.items():
            chosen = pc.is_in(tables[part]["trial_id"], trials)
            if key in wanted:
                chosen = pc.and_(chosen, pc.is_in(tables[part][key], pa.array(sorted(wanted[key]), pa.string())))
            rows[part] = tables[part].filter(chosen)
        yield rows


class _Runs:
    """Rows of one part, on their way to chunks of ``trials``, in the file at ``path``."""

    def __init__(self, path: Path, schema: pa.Schema, trials: Sequence[str], examples: int) -> None:
        self.schema, self.trials = schema, pa.array(trials, pa.string())
        self.file = open(path, "w+b")  # noqa: SIM115 (open as long as this is)
        self.chunk_trials = max(1, CHUNK_ROWS // max(examples, 1))
        self.count = -(-len(trials) // self.chunk_trials)
        self.gathered: list[pa.Table] = []
        self.bytes = 0
        self.places: list[np.ndarray] = []  # of each run: where its chunks begin, and where the last one ends

    def __enter__(self) -> _Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, rows: pa.Table) -> None:
        self.gathered.append(rows)
        self.bytes += rows.get_total_buffer_size()
        if self.bytes > RUN_BYTES:
            self._put_down()

    def _put_down(self) -> None:
        """Leave what is gathered as a run; the order of rows within a chunk stays."""
        rows = pa.concat_tables(self.gathered or [self.schema.empty_table()])
        chunk = pc.index_in(rows["trial_id"], self.trials).to_numpy() // self.chunk_trials
        ends = np.flatnonzero(chunk[1:] != chunk[:-1]) + 1
        # Units have the rows of a trial together, in any order of trials; a few long slices cost less than a copy of each row.
        if len(ends) * SLICE_ROWS > len(rows):
            order = np.argsort(chunk, kind="stable")
            rows, chunk = rows.combine_chunks().take(order), chunk[order]
            ends = np.flatnonzero(chunk[1:] != chunk[:-1]) + 1
        pieces = collections.defaultdict[int, list[pa.Table]](list)
        for start, end in itertools.pairwise([0, *ends.tolist(), len(rows)]):
            if end > start:
                pieces[int(chunk[start])].append(rows.slice(start, end - start))
        self.gathered, self.bytes = [], 0

        places = np.full(self.count + 1, self.file.seek(0, os.SEEK_END))
        for number in range(self.count):
            if number in pieces:
                (batch,) = pa.concat_tables(pieces.pop(number)).combine_chunks().to_batches()
                self.file.write(batch.serialize())
            places[number + 1] = self.file.tell()
        self.places.append(places)

    def chunks(self) -> Iterator[pa.Table]:
        """The rows of each chunk, in the order they were added."""
        self._put_down()
        for number in range(self.count):
            batches = []
            for places in self.places:
                start, end = places[number : number + 2].tolist()
                if end > start:
                    self.file.seek(start)
                    batches.append(pa.ipc.read_record_batch(pa.py_buffer(self.file.read(end - start)), self.schema))
            yield pa.Table.from_batches(batches, self.schema)


def _sorted_once(table: pa.Table, key: tuple[str, str]) -> pa.Table:
    """The rows by ``key``, the first of those that have the same."""
    # Texts of a key repeat, so numbers are sorted for them; they are ordered as their texts are.
    codes = np.zeros(len(table), np.int64)
    for name in key:
        texts = table[name].combine_chunks().dictionary_encode()
        rank = np.empty(len(texts.dictionary), np.int64)
        rank[pc.sort_indices(texts.dictionary).to_numpy()] = np.arange(len(rank))
        codes = codes * max(len(rank), 1) + rank[texts.indices.to_numpy()]

    order = np.argsort(codes, kind="stable")
    first = np.ones(len(order), bool)
    first[1:] = codes[order[1:]] != codes[order[:-1]]
    return table.take(order[first]).combine_chunks()
