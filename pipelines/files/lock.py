"""One driver at a time on a work directory."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nuwa.errors import UserError


class WorkDirectoryBusy(UserError, RuntimeError):
    """Another driver works on the same directory."""


@contextmanager
def exclusive(work: Path) -> Iterator[None]:
    """One driver at a time on a work directory: a child can outlive the ``dvc`` that started it."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WorkDirectoryBusy(f"{work} is in use by another sweep; wait for it or stop it") from None
        yield
