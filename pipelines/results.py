"""The result store: one Parquet file a finished work unit, visible by one rename.

A unit holds every one of some trials on every one of some examples; both are named by digests of all that decides the
answers. What is done is what the files' footers say, so an interrupted sweep, or one with more trials, images or
benchmarks, computes just the answers that are missing.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.atomic import atomic_path

PREDICTIONS = pa.schema(
    {
        "trial_id": pa.string(),
        "example_id": pa.string(),
        "prediction": pa.string(),
        "kept_final": pa.list_(pa.int16()),  # patches alive in the last layer
    }
)
KEPT = pa.schema(
    {
        "trial_id": pa.string(),
        "image": pa.string(),
        "indices": pa.list_(pa.int16()),  # patches after stage 1, in raster order
        "pillar": pa.list_(pa.bool_()),  # Nüwa's roles; true where a token is untouched
    }
)
TIMINGS = pa.schema(
    {
        "trial_id": pa.string(),
        "unit": pa.string(),
        "questions": pa.int32(),
        "selection_s": pa.float64(),  # stage 1, in full for every trial that shares it
        "trunk_s": pa.float64(),  # layers shared with the trials of the same unit, in full
        "answer_s": pa.float64(),  # the trial's own layers and decoding
    }
)
PARTS = {"kept": KEPT, "timings": TIMINGS, "predictions": PREDICTIONS}  # in the order they are written


class DamagedUnit(RuntimeError):
    """A stored unit does not match its checksums."""


class StorageFull(RuntimeError):
    """No space is left where results are kept; what is finished is whole."""

    stops_the_run = True


class StoredUnit(NamedTuple):
    """A finished unit: it holds every one of ``trials`` on every one of ``examples`` (digests)."""

    unit: str
    trials: tuple[str, ...]
    examples: tuple[str, ...]


class ResultStore:
    """Units under ``folder``: ``<unit>.<part>.parquet``, the predictions written last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, stored: StoredUnit, tables: Mapping[str, pa.Table]) -> None:
        """Store the parts of a unit; raises :class:`StorageFull`."""
        footer = {"trials": json.dumps(stored.trials), "examples": json.dumps(stored.examples)}
        try:
            for part, schema in PARTS.items():
                table = tables[part].cast(schema).replace_schema_metadata(footer)
                with atomic_path(self.folder / f"{stored.unit}.{part}.parquet") as path:
                    pq.write_table(table, path, write_page_checksum=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageFull(
                f"{self.folder}: no space is left ({error.strerror}); finished work is kept: free some space and run "
                "the same command again"
            ) from None

    def done(self) -> list[StoredUnit]:
        """Every finished unit. Unreadable or partial units are removed and not counted."""
        found = []
        for path in sorted(self.folder.glob("*.predictions.parquet")):
            unit = path.name.partition(".")[0]
            try:
                for part in PARTS:
                    metadata = pq.ParquetFile(self.folder / f"{unit}.{part}.parquet").schema_arrow.metadata
                found.append(StoredUnit(unit, *(tuple(json.loads(metadata[key])) for key in (b"trials", b"examples"))))
            except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
                self.remove(unit)
        return found

    def remove(self, unit: str) -> None:
        for part in PARTS:
            (self.folder / f"{unit}.{part}.parquet").unlink(missing_ok=True)

    def read(self, part: str, unit: str) -> pa.Table:
        """All rows of one part of ``unit``; one damaged since it was written is removed and reported."""
        path = self.folder / f"{unit}.{part}.parquet"
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            self.remove(unit)
            raise DamagedUnit(f"{path} was damaged and is removed; run the same command again ({error})") from None
        return table.replace_schema_metadata(None)
