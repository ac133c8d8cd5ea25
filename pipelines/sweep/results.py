"""The result store: one Parquet file a finished work unit, in a folder or behind a storage URI.

A unit holds every one of some trials on every one of some examples; both are named by digests of all that decides the
answers, and the unit by them. It appears by one rename, or one put on an object store; what a killed upload may leave
elsewhere lacks the footer and is not counted. What is done is what the footers say, so an interrupted sweep, or one
with more trials, images or benchmarks, computes just the answers that are missing. Several drivers may share a store:
what cannot be read is left as it is, and so are units whose form another version decided; what is proven damaged is
moved aside.

Files lie in folders named by how their units begin; those of a store of old, all in one, are read as well. A footer is read
once where that takes long, in a remote store or one of many units: what it said is kept on this machine, by the file's name,
size and time stamp. A store of any size is then known from one listing.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nuwa.errors import UserError
from nuwa.own_folder import own_folder
from pipelines.files.atomic import atomic_path
from pipelines.files.storage import Folder, Stamp
from pipelines.settings import Reuse

PREDICTIONS = pa.schema(
    {
        "trial_id": pa.string(),
        "example_id": pa.string(),
        "prediction": pa.string(),
        "kept_final": pa.list_(pa.int16()),  # patches alive in the last layer
        "limit_reached": pa.bool_(),  # the answer has as many tokens as are allowed; null in stores of old
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
PARTS = {"predictions": PREDICTIONS, "kept": KEPT, "timings": TIMINGS}  # a file's row groups, in this order
COLUMNS = pa.schema({column.name: column.type for schema in PARTS.values() for column in schema})

SUFFIX = ".unit.parquet"
FOOTER = (b"trials", b"examples")  # keys of its metadata; JSON
PROVENANCE = b"provenance"  # likewise; absent in stores of old
REPLACES = b"replaces"  # names of the units that were put together in it; absent where there are none
ROWS = b"rows"  # of each of PARTS; JSON; absent in stores of old
# Units are read whole, by this module, so their footers hold neither statistics nor Arrow's own schema, which would be most
# of them. Numbers of tokens repeat; of texts and the rest a unit has too few rows for a dictionary to be worth its page.
LAYOUT: Any = {
    "write_statistics": False,
    "store_schema": False,
    "use_dictionary": ["kept_final.list.element", "indices.list.element"],
    "write_page_checksum": True,
}
FAN = 2  # characters of a unit's name that its folder has
REMEMBERED_FROM = 1000  # units of a folder of this machine; fewer footers are sooner read than remembered
FOOTER_BYTES = 32 * 1024  # read at first; a longer footer is asked for again
READERS = 16  # requests under way at once
AHEAD = 4  # units fetched while one is worked on; of a folder of this machine one, as reading it is all processor
FOOTERS = Path(tempfile.gettempdir()) / f"nuwa-footers-{os.getuid()}"  # what footers said, on each machine


class DamagedUnit(UserError, RuntimeError):
    """A stored unit does not match its checksums, or is not there any more."""


class NoParquet(ValueError):
    """What was read, whole, is no Parquet file, or its pages do not match their checksums."""


def unit_name(trials: Sequence[str], examples: Sequence[str]) -> str:
    """The name of the unit that holds every one of ``trials`` on every one of ``examples`` (digests)."""
    return hashlib.sha256(json.dumps([list(trials), list(examples)]).encode()).hexdigest()[:24]


def reuse_key(answer_id: str, reuse: Reuse) -> str:
    """What two answer ids must have in common for one's answers to be taken for the other's."""
    trial, separator, code = answer_id.partition(".")
    return answer_id if reuse == "same_versions" or not separator else f"{trial}.{code.partition('.')[0]}"


def file_of(unit: str) -> str:
    """Where the file of a unit lies in its store."""
    return f"{unit[:FAN]}/{unit}{SUFFIX}"


class StoredUnit(NamedTuple):
    """A finished unit: it holds every one of ``trials`` (answer ids) on every one of ``examples`` (digests).

    ``provenance``, JSON: versions, device, kernel, dtype and the composition of its batches; null in old stores.
    ``replaces``: units whose rows it holds, which may still be there.
    """

    unit: str
    trials: tuple[str, ...]
    examples: tuple[str, ...]
    provenance: str | None = None
    replaces: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, str]:
        """Where its file lies, and where earlier versions left it."""
        return file_of(self.unit), self.unit + SUFFIX

    @property
    def origin(self) -> dict[str, Any]:
        """The provenance, read."""
        return json.loads(self.provenance) if self.provenance else {}


class ResultStore:
    """Units in ``place``, a folder or a storage URI: one file each, a row group for each of :data:`PARTS`."""

    def __init__(self, place: Path | str) -> None:
        self.storage = Folder.at(place)

    def write(self, stored: StoredUnit, tables: Mapping[str, pa.Table]) -> None:
        """Store the parts of a unit; raises :class:`StorageFull` and :class:`StorageUnavailable`."""
        footer = dict(zip(FOOTER, map(json.dumps, (stored.trials, stored.examples)), strict=True))
        if stored.provenance is not None:
            footer[PROVENANCE] = stored.provenance
        if stored.replaces:
            footer[REPLACES] = json.dumps(stored.replaces)
        footer[ROWS] = json.dumps([len(tables[part]) for part in PARTS])
        content = pa.BufferOutputStream()
        with pq.ParquetWriter(content, COLUMNS, **LAYOUT) as writer:
            writer.add_key_value_metadata(footer)
            for part, schema in PARTS.items():
                table = tables[part].cast(schema)
                columns = [
                    table[column.name] if column.name in schema.names else pa.nulls(len(table), column.type)
                    for column in COLUMNS
                ]
                writer.write_table(pa.table(columns, schema=writer.schema), row_group_size=max(len(table), 1))
        self.storage.write(file_of(stored.unit), content.getvalue().to_pybytes())

    def done(self, *, tidy: bool = False) -> list[StoredUnit]:
        """Every finished unit; files without a footer, of another form, and units that another one replaces are not counted.

        ``tidy``: what was half-written a day ago is moved aside, and what killed writers left is removed; younger files
        may be under way. Raises :class:`StorageUnavailable` where a file cannot be read.
        """
        known = self._known(tidy)
        if tidy:
            self.storage.remove_leftovers()
        # A unit may lie in its folder and, written by an earlier version, above it.
        units = {unit.unit: unit for unit in known.values()}
        replaced = {name for unit in units.values() for name in unit.replaces}
        return [units[name] for name in sorted(units) if name not in replaced]

    def present(self) -> list[StoredUnit]:
        """Every finished unit, those too that another one replaces."""
        return list({unit.unit: unit for unit in self._known().values()}.values())

    def _known(self, tidy: bool = False) -> dict[str, StoredUnit]:
        """Every finished unit by its file, replaced or not."""
        stamps = self.storage.stamps(SUFFIX)
        remembers = self.storage.local is None or len(stamps) >= REMEMBERED_FROM
        known = self._remembered(stamps) if remembers else {}
        unread = [name for name in stamps if name not in known]
        # Units of one batch of images hold the same examples, and many hold the same trials: each list is held once.
        listed = functools.cache(lambda text: tuple(json.loads(text)))

        def footers(names: Sequence[str]) -> list[StoredUnit | NoParquet | None]:
            return [self._footer(name, stamps[name].size, listed) for name in names]

        # Files of this machine come by the handful: what a thread costs to be given one is as much as to read it.
        step = 1 if self.storage.local is None else 64
        parts = [unread[start : start + step] for start in range(0, len(unread), step)]
        with ThreadPoolExecutor(READERS, thread_name_prefix="footers") as pool:
            found = itertools.chain.from_iterable(pool.map(footers, parts))
            for name, unit in zip(unread, found, strict=True):
                if isinstance(unit, StoredUnit):
                    known[name] = unit
                elif tidy and unit is not None and self.storage.is_old(name):
                    self.storage.set_aside(name, str(unit), self._is_damaged)
        if unread and remembers:
            self._remember(known, stamps)
        return known

    def _footer(
        self, name: str, size: int, listed: Callable[[bytes], tuple[str, ...]]
    ) -> StoredUnit | NoParquet | None:
        """What the file says of itself; null for one that is gone, or no unit of ours."""
        try:
            tail = self.storage.tail(name, FOOTER_BYTES)
            needed = int.from_bytes(tail[-8:-4], "little") + 8
            if len(tail) < needed <= size:
                tail = self.storage.tail(name, needed)
        except FileNotFoundError:
            return None
        if (stated := _stated(name, tail, needed, listed)) is not None:
            return stated

        try:
            footer = pq.read_metadata(pa.BufferReader(tail))
        except (OSError, pa.ArrowException) as error:  # of bytes at hand: they are no footer
            return NoParquet(f"no footer: {error}")
        try:
            texts = footer.metadata
            trials, examples = (listed(texts[key]) for key in FOOTER)
            stored = _unit_of(trials, examples, texts.get(PROVENANCE), texts.get(REPLACES))
        except (KeyError, TypeError, ValueError):
            return None
        whole = name in stored.files and footer.num_row_groups == len(PARTS)
        return stored if whole and footer.row_group(0).num_rows == len(trials) * len(examples) else None

    @staticmethod
    def _is_damaged(folder: Folder, name: str) -> bool:
        try:
            _read_whole(folder.read(name))
        except NoParquet:
            return True
        return False

    @property
    def _index(self) -> Path:
        """Where this machine keeps what footers said."""
        return own_folder(FOOTERS) / f"{hashlib.sha256(self.storage.place.encode()).hexdigest()[:24]}.json"

    def _remembered(self, stamps: Mapping[str, Stamp]) -> dict[str, StoredUnit]:
        """Units whose files are as they were, by file; a unit's name is a digest of what its footer lists."""
        try:
            held = json.loads(self._index.read_text())
            lists = [tuple(each) for each in held["lists"]]
            return {
                name: StoredUnit(
                    name.rpartition("/")[2].removesuffix(SUFFIX),
                    lists[trials],
                    lists[examples],
                    held["origins"][origin],
                    lists[replaces],
                )
                for name, (*stamp, trials, examples, origin, replaces) in held["units"].items()
                if stamps.get(name) == tuple(stamp)
            }
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            return {}

    def _remember(self, known: Mapping[str, StoredUnit], stamps: Mapping[str, Stamp]) -> None:
        """Keep what footers said; a place that cannot be written to costs the next listing some reading."""
        lists: dict[tuple[str, ...], int] = {}
        origins: dict[str | None, int] = {}
        units = {
            name: (
                *stamps[name],
                *(lists.setdefault(each, len(lists)) for each in (unit.trials, unit.examples)),
                origins.setdefault(unit.provenance, len(origins)),
                lists.setdefault(unit.replaces, len(lists)),
            )
            for name, unit in known.items()
        }
        with contextlib.suppress(OSError), atomic_path(self._index) as path:
            path.write_text(json.dumps({"lists": list(lists), "origins": list(origins), "units": units}))

    def describe(self, kind: str, digest: str, parts: Mapping[str, str]) -> None:
        """Keep what a digest in this store is of, so that a plan can say what has changed."""
        name = f"{digest}.{kind}.json"
        if not self.storage.exists(name):
            self.storage.write(name, json.dumps(dict(parts), indent=0).encode())

    def described(self, kind: str) -> dict[str, dict[str, str]]:
        """Every digest of a ``kind`` that the store can explain, and its parts."""
        suffix, found = f".{kind}.json", {}
        for name in self.storage.sizes(suffix):
            with contextlib.suppress(FileNotFoundError, ValueError):  # half-written: a reason less
                found[name.removesuffix(suffix)] = json.loads(self.storage.read(name))
        return found

    def remove(self, unit: str) -> None:
        for name in (file_of(unit), unit + SUFFIX):
            self.storage.remove(name)

    def read(self, unit: str) -> dict[str, pa.Table]:
        """All rows of ``unit``, part by part; one damaged since it was written is moved aside and reported."""
        name = file_of(unit)
        try:
            try:
                return _read_whole(self.storage.read(name))
            except FileNotFoundError:  # in a store of old
                name = unit + SUFFIX
                return _read_whole(self.storage.read(name))
        except FileNotFoundError:
            raise self._gone(unit) from None

        except NoParquet as error:
            place = self.storage.set_aside(name, str(error), self._is_damaged)
            if place is None:  # another driver has put a whole one there, or has moved it aside
                with contextlib.suppress(FileNotFoundError, NoParquet):
                    return _read_whole(self.storage.read(name))
                raise self._gone(unit) from None
            raise DamagedUnit(
                f"{self.storage.place}/{name} is damaged ({error}) and is moved to {place}; run the same command again"
            ) from None

    def _gone(self, unit: str) -> DamagedUnit:
        return DamagedUnit(f"{self.storage.place}/{file_of(unit)} is gone; run the same command again")

    def read_all(self, units: Iterable[str]) -> Iterator[dict[str, pa.Table]]:
        """:meth:`read` of each of ``units``, in their order; a few are fetched ahead and no more are held."""
        most = AHEAD if self.storage.local is None else 1
        with ThreadPoolExecutor(most, thread_name_prefix="units") as pool:
            ahead: collections.deque[Future[dict[str, pa.Table]]] = collections.deque()
            for unit in units:
                ahead.append(pool.submit(self.read, unit))
                if len(ahead) > most:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


def _stated(name: str, tail: bytes, needed: int, listed: Callable[[bytes], tuple[str, ...]]) -> StoredUnit | None:
    """The unit at ``name`` by the texts in its footer, the last ``needed`` bytes of ``tail``; null: that does not tell.

    To read a footer as Parquet takes ten times as long, nearly all of it for columns that nobody asks about here. What is
    found is right where its digest is the file's name.
    """
    if not len(tail) >= needed > 12 or not tail.endswith(b"PAR1"):
        return None
    try:
        (trials, examples, rows), (origin, replaces) = (
            [_text_of(tail, key, len(tail) - needed) for key in keys]
            for keys in ((*FOOTER, ROWS), (PROVENANCE, REPLACES))
        )
        if trials is None or examples is None or rows is None:
            return None
        unit = _unit_of(listed(trials), listed(examples), origin, replaces)
        first, *others = json.loads(rows)
    except (TypeError, ValueError, IndexError):
        return None
    whole = len(others) == len(PARTS) - 1 and first == len(unit.trials) * len(unit.examples)
    return unit if whole and name in unit.files else None


def _unit_of(
    trials: tuple[str, ...], examples: tuple[str, ...], origin: bytes | None, replaces: bytes | None
) -> StoredUnit:
    """The unit of what a footer lists, ``origin`` and ``replaces`` as they stand there."""
    provenance = sys.intern(origin.decode()) if origin is not None else None
    return StoredUnit(unit_name(trials, examples), trials, examples, provenance, tuple(json.loads(replaces or b"[]")))


def _text_of(tail: bytes, key: bytes, start: int) -> bytes | None:
    """The text of ``key`` among a footer's pairs, from ``start`` on, as Thrift's compact protocol writes them: field 1, a
    length and the key, field 2, a length of seven bits a byte and the text, and a zero."""
    mark = b"\x18" + bytes([len(key)]) + key + b"\x18"
    at = tail.rfind(mark, start)
    if at < 0:
        return None
    at, length, shift = at + len(mark), 0, 0
    while True:
        byte = tail[at]
        at, length, shift = at + 1, length | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            break
    return tail[at : at + length] if tail[at + length : at + length + 1] == b"\0" else None


def _read_whole(content: bytes) -> dict[str, pa.Table]:
    """The parts in the bytes of a unit's file; raises :class:`NoParquet`."""
    try:
        # Of bytes at hand, small ones: nothing to fetch ahead, and no work for several threads.
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True, pre_buffer=False)
        groups = [file.read_row_group(at, schema.names, use_threads=False) for at, schema in enumerate(PARTS.values())]
    except (OSError, pa.ArrowException) as error:  # of bytes at hand: input and output have no part in it
        raise NoParquet(str(error)) from None
    return {part: _whole(group, schema) for group, (part, schema) in zip(groups, PARTS.items(), strict=True)}


def _whole(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` as ``schema`` has it; a column that an older store lacks is null."""
    if table.schema.equals(schema):
        return table.replace_schema_metadata()
    for name in schema.names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
    return table.select(schema.names).cast(schema)
