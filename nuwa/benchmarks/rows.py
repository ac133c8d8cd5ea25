"""Rows of a published table with the place of each: a table in memory, a dataset, or Parquet files of any shape.

Tools differ in how they write what means the same: strings as views or large strings, columns encoded as dictionaries,
integers and floats of other widths, a column without values as ``null``, whole numbers beside missing ones as floats,
partitions of a folder instead of a column. Rows come out as the published schema has them. Files are read a few rows at
a time, so neither their size nor that of a row group (more than 2 GB in one column is no single array of Arrow) matters.
"""

from __future__ import annotations

import decimal
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from nuwa.benchmarks.records import RecordError
from nuwa.errors import UserError

ROWS_AT_ONCE = 256  # bounds how many decoded rows with their images are in memory
BYTES_AT_ONCE = 64 * 1024**2  # the same for rows with large images, as a file stores them
DECODED_AT_ONCE = 32  # rows of a file; what many rows repeat is stored once, so their true size is not known before
POINTER = b"version https://git-lfs.github.com/spec/"
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


class UnreadableTable(UserError, OSError):
    """A file that is no whole Parquet file."""


class Row(NamedTuple):
    """``place``: the file it lies in, null for a table in memory; ``number``: from 0, within that file."""

    place: str | None
    number: int
    values: dict[str, Any]


class Rows(Protocol):
    """A table that hands out its rows in the published schema."""

    @property
    def schema(self) -> pa.Schema: ...

    def rows(self, published: pa.Schema) -> Iterator[Row]: ...


Source: TypeAlias = pa.Table | ds.Dataset | Rows


@dataclass(frozen=True)
class ParquetFiles:
    """Files of one table, in order. ``partitions``: columns that a file's folders name (``category=count``), by file."""

    files: Sequence[Path]
    partitions: Sequence[dict[str, str]] = field(default=())

    @property
    def schema(self) -> pa.Schema:
        """Of the first file; :func:`check_files` tells whether the others are like it."""
        return self.schema_of(0)

    def schema_of(self, number: int) -> pa.Schema:
        """Raises :class:`UnreadableTable`."""
        with open_parquet(self.files[number]) as held:
            schema = held.schema_arrow
        for name in self._partition(number):
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.string()))
        return schema

    def count_rows(self) -> int:
        total = 0
        for path in self.files:
            with open_parquet(path) as held:
                total += held.metadata.num_rows
        return total

    def rows(self, published: pa.Schema) -> Iterator[Row]:
        """Raises :class:`UnreadableTable` for a damaged page, :class:`RecordError` for a value of another meaning."""
        for number, path in enumerate(self.files):
            yield from self._rows_of(number, path, published)

    def _rows_of(
        self, number: int, path: Path, published: pa.Schema, groups: list[int] | None = None, at: int = 0
    ) -> Iterator[Row]:
        """``groups``: numbers of row groups, null for all; ``at``: the number of the first row."""
        partition = self._partition(number)
        with open_parquet(path) as held:
            stored = [name for name in published.names if name in held.schema_arrow.names]
            convert = _converters(held.schema_arrow, published, stored)
            added = {name: partition[name] for name in published.names if name not in stored and name in partition}
            batches = held.iter_batches(_rows_at_once(held), row_groups=groups, columns=stored, use_threads=False)
            while (batch := _next_batch(batches, path)) is not None:
                for values in batch.to_pylist():
                    values |= _partition_values(added, published)
                    yield Row(str(path), at, _converted(values, convert, f"{path}: row {at}"))
                    at += 1

    def ends(self, published: pa.Schema) -> list[Row]:
        """The first and the last row; of each end's file one row group is read at most.

        Raises as :meth:`rows`.
        """
        first = next(self.rows(published), None)
        if first is None:
            return []
        number = len(self.files) - 1
        while number and not self._length(number):
            number -= 1
        with open_parquet(self.files[number]) as held:
            groups = held.num_row_groups
            while groups > 1 and not held.metadata.row_group(groups - 1).num_rows:
                groups -= 1
            before = sum(held.metadata.row_group(group).num_rows for group in range(groups - 1))
        (last,) = deque(self._rows_of(number, self.files[number], published, [groups - 1], before), maxlen=1)
        return [first] if last == first else [first, last]

    def _length(self, number: int) -> int:
        with open_parquet(self.files[number]) as held:
            return held.metadata.num_rows

    def _partition(self, number: int) -> dict[str, str]:
        return self.partitions[number] if self.partitions else {}

    def whole(self, published: pa.Schema) -> pa.Table:
        """All rows of the published columns as one table, in types that hold more than 2 GB."""
        wide = pa.schema([field.with_type(large(field.type)) for field in published])
        parts = []
        for number, path in enumerate(self.files):
            rows = self._rows_of(number, path, published)
            while batch := [row.values for _, row in zip(range(ROWS_AT_ONCE), rows, strict=False)]:
                parts.append(pa.Table.from_pylist(batch, wide))
        return pa.concat_tables(parts) if parts else wide.empty_table()


def rows_of(table: Source, published: pa.Schema) -> Iterator[Row]:
    """The rows of ``table`` in the ``published`` schema; its columns have been checked."""
    if not isinstance(table, (pa.Table, ds.Dataset)):
        yield from table.rows(published)
        return
    if isinstance(table, pa.Table):
        batches = iter(table.select(published.names).to_batches(max_chunksize=ROWS_AT_ONCE))
    else:
        batches = table.to_batches(
            columns=published.names, batch_size=ROWS_AT_ONCE, batch_readahead=1, fragment_readahead=1
        )
    convert = _converters(table.schema, published, published.names)
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            yield Row(None, number, _converted(values, convert, f"row {number}"))
            number += 1


def open_parquet(path: Path) -> pq.ParquetFile:
    """Raises :class:`UnreadableTable`: a pointer of git-lfs, cut off, or another format."""
    if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
        raise UnreadableTable(f"{path}: no file but a folder, a pipe or a device; put the table's file there")
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        raise UnreadableTable(_unreadable(path, error)) from None


def large(kind: pa.DataType) -> pa.DataType:
    """``kind`` with offsets of 64 bits, which more than 2 GB need."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_binary(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.large_list(large(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([one.with_type(large(one.type)) for one in kind])
    return kind


def _unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as content:
        start = content.read(len(POINTER))
    if start == POINTER:
        return f"{path}: a git-lfs pointer of {path.stat().st_size} bytes, not the file; `git lfs pull` fetches it"
    if not start:
        return f"{path}: an empty file; fetch it again"
    return f"{path}: no whole Parquet file ({' '.join(str(error).split())[:160]}); fetch it again"


def _next_batch(batches: Iterator[pa.RecordBatch], path: Path) -> pa.RecordBatch | None:
    try:
        batch = next(batches, None)
        if batch is not None:
            batch.validate(full=True)
        return batch
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: no UTF-8
        raise UnreadableTable(_unreadable(path, error)) from None


def _rows_at_once(held: pq.ParquetFile) -> int:
    """So few that their images stay below ``BYTES_AT_ONCE`` on average."""
    groups = [held.metadata.row_group(number) for number in range(held.num_row_groups)]
    heaviest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
    return max(1, min(DECODED_AT_ONCE, int(BYTES_AT_ONCE / max(1, heaviest))))


# Values of another width or wrapping than the published


def _converters(stored: pa.Schema, published: pa.Schema, names: Sequence[str]) -> dict[str, Callable[[Any], Any]]:
    """Column → what makes its values those of the published type; columns that need nothing are left out."""
    return {
        name: functools.partial(_as, published.field(name).type)
        for name in names
        if _differs(published.field(name).type, stored.field(name).type)
    }


def _differs(published: pa.DataType, stored: pa.DataType) -> bool:
    """Whether Python values of the two types may differ."""
    if pa.types.is_dictionary(stored) or pa.types.is_run_end_encoded(stored):
        return _differs(published, stored.value_type)
    if pa.types.is_list(published) and hasattr(stored, "value_type"):
        return _differs(published.value_type, stored.value_type)
    if pa.types.is_struct(published):
        if not pa.types.is_struct(stored) or {one.name for one in published} != {one.name for one in stored}:
            return True  # an image's bytes without a path, or with more than that
        return any(_differs(one.type, stored.field(one.name).type) for one in published)
    if pa.types.is_integer(published):
        return not pa.types.is_integer(stored)
    return pa.types.is_floating(published) and not pa.types.is_floating(stored)


def _converted(values: dict[str, Any], convert: dict[str, Callable[[Any], Any]], place: str) -> dict[str, Any]:
    for name, as_published in convert.items():
        try:
            values[name] = as_published(values[name])
        except ValueError as error:
            raise RecordError(f"{place}: column {name!r} {error}; mend or drop the row") from None
    return values


def _as(kind: pa.DataType, value: Any) -> Any:
    """``value`` as Python has it in ``kind``; raises ``ValueError`` in words that follow a column's name."""
    if value is None:
        return None
    if pa.types.is_list(kind):
        return [_as(kind.value_type, one) for one in value]
    if pa.types.is_struct(kind):
        held = {"bytes": value} if isinstance(value, bytes) else value
        return {one.name: _as(one.type, held.get(one.name)) for one in kind}
    if pa.types.is_floating(kind):
        return float(value)
    if pa.types.is_integer(kind) and isinstance(value, (float, decimal.Decimal)):
        if math.isnan(value):  # a missing number beside whole ones, as pandas writes it
            return None
        if math.isinf(value) or value != int(value):
            raise ValueError(f"should be a whole number, found {value}")
        return int(value)
    return value


def _partition_values(added: dict[str, str], published: pa.Schema) -> dict[str, Any]:
    """Values of columns that folders name; numbers stand there as words."""
    values: dict[str, Any] = {}
    for name, word in added.items():
        kind, word = published.field(name).type, unquote(word)
        if word == NO_VALUE:
            values[name] = None
        else:
            values[name] = int(word) if pa.types.is_integer(kind) else word
    return values
