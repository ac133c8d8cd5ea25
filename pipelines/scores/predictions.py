"""A table of predictions, read a few trials at a time.

Its rows may lie in any order. A sweep leaves them sorted by trial, so a row group is about few trials, as its statistics
say, and each is read about once.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.scores.evidence import LIMIT_REACHED

TEXTS = ["trial_id", "example_id", "prediction"]
ANY = chr(0x10FFFF)  # behind every trial's id


class PredictionFile:
    """Of the file at ``path`` what scoring needs; ``rows``: how many it holds."""

    def __init__(self, path: Path) -> None:
        self.file = pq.ParquetFile(path, read_dictionary=TEXTS)
        self.columns = [*TEXTS, *([LIMIT_REACHED] if LIMIT_REACHED in self.file.schema_arrow.names else [])]
        self.rows = self.file.metadata.num_rows
        bounds = [self._bounds(number) for number in range(self.file.num_row_groups)]
        self.first, self.final = np.array(bounds, object).reshape(-1, 2).T
        self.last: tuple[int, pa.Table] | None = None  # neighbouring blocks of trials share a row group

    def _bounds(self, group: int) -> tuple[str, str]:
        """The first and last trial of a row group; where its statistics do not say, it may hold any."""
        known = self.file.metadata.row_group(group).column(self.file.schema.names.index("trial_id")).statistics
        return (known.min, known.max) if known is not None and known.has_min_max else ("", ANY)

    def of(self, trial_ids: Collection[str]) -> pd.DataFrame:
        """All rows of some trials; texts are categories, of which there may be more than occur."""
        ordered = np.array([*sorted(trial_ids), ANY], object)
        next_trial = ordered[np.searchsorted(ordered, self.first)]
        tables = [self.file.schema_arrow.empty_table().select(self.columns)]
        for number in np.flatnonzero(next_trial <= self.final).tolist():
            table = self._group(number)
            tables.append(table.filter(pc.is_in(table["trial_id"], pa.array(ordered[:-1], pa.string()))))
        return pa.concat_tables(tables).unify_dictionaries().to_pandas()

    def _group(self, number: int) -> pa.Table:
        if self.last is None or self.last[0] != number:
            self.last = None  # two at once are not needed
            self.last = number, self.file.read_row_group(number, self.columns, use_threads=False)
        return self.last[1]

    def limits(self, trial_ids: Collection[str]) -> tuple[bool, bool]:
        """Whether it is known of every answer if it ran into its limit; and of those of ``trial_ids``, where some did."""
        if LIMIT_REACHED not in self.columns:
            return False, False
        of_all, of_these, some, wanted = True, True, False, pa.array(sorted(trial_ids), pa.string())
        for number in range(self.file.num_row_groups):
            group = self.file.read_row_group(number, ["trial_id", LIMIT_REACHED], use_threads=False)
            of_all &= group[LIMIT_REACHED].null_count == 0
            chosen = group[LIMIT_REACHED].filter(pc.is_in(group["trial_id"], wanted))
            of_these &= chosen.null_count == 0
            some |= bool(pc.any(chosen).as_py())
        return of_all, of_these and some
