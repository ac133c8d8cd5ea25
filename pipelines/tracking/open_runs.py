"""MLflow runs that this process has begun, so that one that is told to end closes them wherever it stands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

_endings: list[Callable[[], None]] = []


def begun(end: Callable[[], None]) -> None:
    """A run may be open from here on; ``end`` closes it as killed, and does nothing where there is none."""
    _endings.append(end)


def ended(end: Callable[[], None]) -> None:
    with contextlib.suppress(ValueError):
        _endings.remove(end)


def end_open_runs() -> None:
    while _endings:
        _endings.pop()()
