"""A folder that is local or behind a URI: ``s3://``, ``gs://``, ``abfs://``, or any scheme fsspec knows.

What is written becomes visible whole: locally by one rename, on an object store by one put. Faults that may pass are
tried again a few times; what lasts is one error that names the place. Several drivers may share a folder: what is proven
damaged is moved aside, and only leftovers of a day ago are removed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from nuwa.errors import UserError
from pipelines.files.atomic import atomic_path

ATTEMPTS = 4
S3_TRIES = 3  # within each of them
FIRST_PAUSE_S = 0.2  # doubles with every attempt
COPY_BYTES = 8 * 1024**2
LEFTOVER_S = 24 * 3600.0  # a file under way that did not change for so long is no one's any more
ASIDE = "damaged"  # the folder below into which damaged files are moved
ARROW_SCHEMES = ("s3", "gs", "abfs", "abfss", "hdfs")  # without further packages

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class StorageUnavailable(UserError, RuntimeError):
    """A storage kept failing; the message names place, attempts and the last fault."""

    stops_the_run = True
    may_pass = True  # another machine may reach it


class StorageFull(UserError, RuntimeError):
    """No space is left where results are kept; what is finished is whole."""

    stops_the_run = True


@contextlib.contextmanager
def room_in(place: str | Path) -> Iterator[None]:
    """What runs inside raises :class:`StorageFull` where ``place`` has no space, or a user's share of it, left."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageFull(
            f"{place}: no space is left ({error.strerror}); finished work is kept: free some space and run the same "
            "command again"
        ) from None


def is_uri(place: str | Path) -> bool:
    return "://" in str(place)


def everywhere(place: str | Path) -> str:
    """``place`` as workers in other folders can use it: a URI as it is, a path from the root."""
    return str(place if is_uri(place) else Path(place).resolve())


def filesystem_of(uri: str) -> tuple[fs.FileSystem, str]:
    """Arrow's own filesystem for ``uri`` and the path in it; fsspec's where Arrow has none."""
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        return _impatient(filesystem), path
    except OSError as error:  # no such bucket, no Java for HDFS
        raise StorageUnavailable(f"{uri.partition('?')[0]}: {' '.join(str(error).split())}") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as unknown:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise StorageUnavailable(f"{uri}: no filesystem for it: {error} ({unknown})") from None
        return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def _impatient(filesystem: fs.FileSystem) -> fs.FileSystem:
    """An S3 client that gives up after ``S3_TRIES``, whatever else as it is: Arrow's own goes on for a hundred seconds where a
    server takes connections and says nothing, each time that it is asked."""
    if not isinstance(filesystem, fs.S3FileSystem):
        return filesystem
    make, (options,) = filesystem.__reduce__()  # what pickling it keeps: all that the URI said
    return make({**options, "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=S3_TRIES)})


class Stamp(NamedTuple):
    """What tells that a file is as it was: its bytes, and the time stamp (ns) where a file system gives one of its own."""

    size: int
    time: int


@dataclass(frozen=True)
class Folder:
    """Files under one folder, by name; a name may hold one folder below, ``folder/name``."""

    place: str  # as the user wrote it, for messages
    filesystem: fs.FileSystem
    path: str
    pause: Callable[[float], None] = time.sleep

    @classmethod
    def at(cls, place: str | Path, *below: str) -> Folder:
        """``place`` is a path or a URI; ``below`` are folders under it."""
        if not is_uri(place):
            folder = str(Path(place, *below).absolute())
            return cls(folder, fs.LocalFileSystem(), folder)
        # A query (``?endpoint_override=…``) belongs to the filesystem, not to the path.
        filesystem, path = filesystem_of(str(place))
        return cls("/".join((str(place).partition("?")[0].rstrip("/"), *below)), filesystem, "/".join((path, *below)))

    @property
    def local(self) -> Path | None:
        """Where its files can be mapped, if this machine has them."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def _try(self, what: str, action: Callable[[], Result]) -> Result:
        """Do ``action``; faults of input and output are tried again. A missing file and a full disk are none of them."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with room_in(self.place):
                    return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if attempt == ATTEMPTS:
                    raise StorageUnavailable(
                        f"{self.place}: could not {what} in {ATTEMPTS} attempts, last: {type(error).__name__}: {error}; "
                        "see that it can be reached and the credentials allow it, then run the same command again"
                    ) from error
                log.warning("%s: %s failed (%s); trying again", self.place, what, error)
                # Workers that failed together should not come back together.
                self.pause(FIRST_PAUSE_S * 2 ** (attempt - 1) * (1 + random.random()))
            except pa.ArrowException as error:  # what Azure's client says where it finds no credentials
                reason = " ".join(str(error).split())[:200]
                raise StorageUnavailable(
                    f"{self.place}: could not {what}: {reason}; see that it can be reached and the credentials are there"
                ) from error
        raise AssertionError("unreachable")

    def sizes(self, suffix: str = "") -> dict[str, int]:
        """Names that end with ``suffix`` and do not begin with a dot, sorted, and their bytes."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        entries = self._try("list files", lambda: self.filesystem.get_file_info(selector))
        files = [info for info in entries if info.type == fs.FileType.File]
        named = {info.base_name: info.size for info in files if info.base_name.endswith(suffix)}
        return {name: named[name] for name in sorted(named) if not name.startswith(".")}

    def stamps(self, suffix: str = "") -> dict[str, Stamp]:
        """As :meth:`sizes`, with files of the folders directly below too, as ``folder/name``: one listing.

        Folders that begin with a dot and what was set aside are left out.
        """
        if self.local is not None:
            found = self._try("list files", lambda: dict(_scanned(Path(self.path), suffix)))
        else:
            selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
            entries = self._try("list files", lambda: self.filesystem.get_file_info(selector))
            start = len(self.path.rstrip("/")) + 1
            found = {
                info.path[start:]: Stamp(info.size, 0)
                for info in entries
                if info.type == fs.FileType.File and info.base_name.endswith(suffix)
            }
        shown = (name for name in sorted(found) if name.count("/") < 2 and not name.startswith((".", f"{ASIDE}/")))
        return {name: found[name] for name in shown if not name.rpartition("/")[2].startswith(".")}

    def exists(self, name: str) -> bool:
        """Whether ``name`` can be opened; an object store that is asked what it is would list for it."""
        with contextlib.suppress(FileNotFoundError):
            self._try(f"look at {name}", lambda: self.filesystem.open_input_file(self._at(name)).close())
            return True
        return False

    def read(self, name: str) -> bytes:
        def action() -> bytes:
            with self.filesystem.open_input_stream(self._at(name)) as stream:
                return stream.read()

        return self._try(f"read {name}", action)

    def tail(self, name: str, count: int) -> bytes:
        """The last ``count`` bytes of ``name``, or all there are; no more is fetched."""

        def action() -> bytes:
            if self.local is not None:  # hundreds of thousands of times, for a large store
                with open(self._at(name), "rb", buffering=0) as content:
                    if (before := os.fstat(content.fileno()).st_size - count) > 0:
                        content.seek(before)
                    return content.read()
            with self.filesystem.open_input_file(self._at(name)) as content:
                content.seek(max(content.size() - count, 0))
                return content.read()

        return self._try(f"read {name}", action)

    def fetch(self, name: str, target: Path) -> None:
        """Copy ``name`` to the local ``target``, which appears whole."""

        def action() -> None:
            opened = self.filesystem.open_input_stream(self._at(name))
            with room_in(target.parent), atomic_path(target) as fresh, opened as stream, open(fresh, "wb") as sink:
                while block := stream.read(COPY_BYTES):
                    sink.write(block)

        self._try(f"fetch {name}", action)

    def write(self, name: str, content: bytes) -> None:
        """Publish ``content`` as ``name``."""

        def action() -> None:
            if self.local is not None:
                with atomic_path(self.local / name) as fresh:
                    fresh.write_bytes(content)
                return
            self.filesystem.create_dir(self._at(name).rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(self._at(name)) as sink:
                sink.write(content)

        self._try(f"write {name}", action)

    def publish(self, source: Path, name: str) -> None:
        """Bring the whole local file ``source`` here as ``name``.

        A killed upload may leave a part of it on a filesystem without atomic puts: what must be whole is named by a
        manifest written after it.
        """

        def action() -> None:
            if self.local is not None:
                with atomic_path(self.local / name) as fresh:
                    shutil.copyfile(source, fresh)
                return
            self.filesystem.create_dir(self.path, recursive=True)
            with open(source, "rb") as content, self.filesystem.open_output_stream(self._at(name)) as sink:
                while block := content.read(COPY_BYTES):
                    sink.write(block)

        self._try(f"write {name}", action)

    def remove(self, name: str) -> None:
        def action() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(self._at(name))

        self._try(f"remove {name}", action)

    def set_aside(self, name: str, why: str, still: Callable[[Folder, str], bool] | None = None) -> str | None:
        """Move ``name``, which is damaged, into the folder ``damaged`` below; returns its new place.

        ``still(folder, name)``: whether what was moved is damaged. Another driver may have put a whole file in its place
        meanwhile: that goes back, and so does what cannot be looked at. Null: nothing is set aside.
        """
        aside = replace(self, place=f"{self.place}/{ASIDE}", path=f"{self.path}/{ASIDE}")
        moved, damaged = f"{name.rpartition('/')[2]}.{secrets.token_hex(4)}", False
        try:
            self._move(name, aside, moved)
        except FileNotFoundError:
            return None

        try:
            damaged = still is None or still(aside, moved)
        finally:
            if not damaged:
                aside._move(moved, self, name)
        if not damaged:
            return None
        log.warning("%s/%s is damaged (%s); it is moved to %s/%s", self.place, name, why, aside.place, moved)
        return f"{aside.place}/{moved}"

    def _move(self, name: str, folder: Folder, new: str) -> None:
        def action() -> None:
            self.filesystem.create_dir(folder._at(new).rpartition("/")[0], recursive=True)
            if self.local is not None:
                os.rename(self._at(name), folder._at(new))
            else:
                self.filesystem.move(self._at(name), folder._at(new))

        self._try(f"move {name}", action)

    def is_old(self, name: str, age_s: float = LEFTOVER_S) -> bool:
        """Whether ``name`` was written so long ago that nobody is at it any more; false where that is not known."""
        info = self._try(f"look at {name}", lambda: self.filesystem.get_file_info(self._at(name)))
        return info.mtime_ns is not None and time.time() - info.mtime_ns / 1e9 > age_s

    def remove_leftovers(self) -> None:
        """Remove what killed writers left here; what others may be writing now is younger, and stays."""
        if self.local is None:  # a put leaves nothing
            return
        found = self._try("list files", lambda: dict(_scanned(Path(self.path), ".tmp")))
        for name in found:
            if name.rpartition("/")[2].startswith(".") and self.is_old(name):
                self.remove(name)


def _scanned(folder: Path, suffix: str) -> Iterator[tuple[str, Stamp]]:
    """Files of ``folder`` and of the folders in it whose names end with ``suffix``; what goes meanwhile is left out."""
    below = [""]
    for under in below:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder / under) as entries:
            for entry in entries:
                if not under and entry.is_dir() and not entry.name.startswith("."):
                    below.append(f"{entry.name}/")
                elif entry.name.endswith(suffix) and entry.is_file():
                    state = entry.stat()
                    yield f"{under}{entry.name}", Stamp(state.st_size, state.st_mtime_ns)
