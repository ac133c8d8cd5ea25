"""Files that are either whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; on success it becomes ``target`` in one rename, else it is removed.

    The data is flushed to disk before the rename and the folder after it, so a power cut leaves no half file. A link at
    ``target`` is replaced and what it leads to stays as it is: DVC may have linked its cache there.

    Raises ``OSError`` with ``target`` as its file name where nothing can be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None

    os.close(handle)
    fresh = Path(name)
    try:
        yield fresh
        with open(fresh, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files for their owner alone; a table is as readable as any other file.
        fresh.chmod(0o666 & ~_umask())
        os.replace(fresh, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` to write into; on success it becomes ``target``, whole.

    What was there goes only when the new folder is complete. A link at ``target`` to a folder stays: its folder is
    replaced. Links inside, such as DVC's to its cache, go with the old folder, and what they lead to stays.
    """
    place = target.resolve() if target.is_symlink() else target
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None

    fresh, old = work / "fresh", work / "old"
    try:
        fresh.mkdir()
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():
                with open(path, "rb") as written:
                    os.fsync(written.fileno())

        if place.exists():
            os.replace(place, old)
        os.replace(fresh, place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    """What a new file of this process does not allow; there is no way to read it but to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
