"""Files that are either whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; on success it becomes ``target`` in one rename, else it is removed.

    The data is flushed to disk before the rename and the folder after it, so a power cut leaves no half file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    fresh = Path(name)
    try:
        yield fresh
        with open(fresh, "rb") as written:
            os.fsync(written.fileno())
        fresh.chmod(0o644)
        os.replace(fresh, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        fresh.unlink(missing_ok=True)
