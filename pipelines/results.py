"""The result store: one Parquet file a finished work unit, visible by one rename.

A unit answers some *cells*; a cell is one trial on one shard of images, named by the digest of all that decides its
answers. What is done is what the files' footers say, so an interrupted sweep, or a grid that has grown, computes just
the cells that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        "cell": pa.string(),
        "questions": pa.int32(),
        "selection_s": pa.float64(),  # stage 1
        "trunk_s": pa.float64(),  # layers shared with the trials of the same unit, in full
        "answer_s": pa.float64(),  # the trial's own layers and decoding
    }
)
PARTS = {"predictions": PREDICTIONS, "kept": KEPT, "timings": TIMINGS}


def cell_id(context: str, trial_id: str, example_digest: str) -> str:
    """``context``: digest of model, features and code; ``example_digest``: of the shard's questions."""
    return hashlib.sha256(f"{context} {trial_id} {example_digest}".encode()).hexdigest()[:24]


class DamagedUnit(RuntimeError):
    """A stored unit does not match its checksums."""


@dataclass(frozen=True)
class UnitResult:
    """Rows of each part of :data:`PARTS`."""

    rows: Mapping[str, list[dict[str, Any]]]


class ResultStore:
    """Units under ``folder``: ``<unit>.<part>.parquet``, the predictions written last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, unit_id: str, cells: Sequence[str], result: UnitResult) -> None:
        for part in ("kept", "timings", "predictions"):
            schema = PARTS[part].with_metadata({"cells": json.dumps(list(cells))})
            with atomic_path(self.folder / f"{unit_id}.{part}.parquet") as path:
                pq.write_table(pa.Table.from_pylist(result.rows[part], schema), path, write_page_checksum=True)

    def done(self) -> dict[str, str]:
        """Finished cells → the unit that holds them. Unreadable or partial units are removed and not counted."""
        found: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.predictions.parquet")):
            unit = path.name.partition(".")[0]
            try:
                for part in PARTS:
                    metadata = pq.ParquetFile(self.folder / f"{unit}.{part}.parquet").schema_arrow.metadata
                cells = json.loads(metadata[b"cells"])
            except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
                self.remove(unit)
                continue
            for cell in cells:
                found.setdefault(cell, unit)
        return found

    def remove(self, unit: str) -> None:
        for part in PARTS:
            (self.folder / f"{unit}.{part}.parquet").unlink(missing_ok=True)

    def read(self, part: str, units: Iterable[str]) -> pa.Table:
        """All rows of one part of ``units``; a unit damaged since it was written is removed and reported."""
        tables = []
        for unit in units:
            path = self.folder / f"{unit}.{part}.parquet"
            try:
                table = pq.read_table(path, page_checksum_verification=True)
            except (OSError, pa.ArrowException) as error:
                self.remove(unit)
                raise DamagedUnit(f"{path} was damaged and is removed; run the same command again ({error})") from None
            tables.append(table.replace_schema_metadata(None))
        return pa.concat_tables(tables)
