"""What several processes of a test run need and takes seconds to make: the first that asks makes it, the others read it."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def once_a_run(folders: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """What ``make`` returned in the process that was first to ask for ``name``, in a folder that lasts as long as the run.

    It is pickled, and for all to read; who asks meanwhile waits. A process that fails leaves it to the next.
    """
    top = folders.getbasetemp()
    if top.name == f"popen-{os.environ.get('PYTEST_XDIST_WORKER')}":
        top = top.parent  # of all processes; a run within a test has a folder of its own
    place = top / "once" / name
    place.mkdir(parents=True, exist_ok=True)
    made = place / "made.pickle"
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            fresh = place / "fresh.pickle"
            fresh.write_bytes(pickle.dumps(make(place)))
            fresh.replace(made)
        return pickle.loads(made.read_bytes())
