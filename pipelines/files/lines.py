"""Logs of JSON lines, which outlive a kill or a full disk in the middle of a line, and lines for whoever watches."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add ``row`` to the log at ``path``, on a line of its own even where the last one is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as lines:
        if lines.seek(0, os.SEEK_END):
            lines.seek(-1, os.SEEK_END)
        cut = lines.read(1) not in (b"", b"\n")
        # One write a line: those of two drivers do not mix.
        lines.write(b"\n" * cut + json.dumps(dict(row)).encode() + b"\n")


def read_lines(path: Path, last: int) -> list[dict[str, Any]]:
    """The rows in the ``last`` lines of the log at ``path``, none where there is no log; lines that are cut off are left
    out, with one line of warning."""
    try:
        lines = path.read_bytes().splitlines()[-last:]
    except FileNotFoundError:
        return []
    rows = [row for line in lines if line and (row := _row(line)) is not None]
    if cut := sum(bool(line) for line in lines) - len(rows):
        log.warning("%s: %d of its last %d lines are cut off and left out; nothing else is lost", path, cut, len(lines))
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # bytes that are no text are one too
        return None
    return row if isinstance(row, dict) else None


def tell(line: str) -> None:
    """Write ``line`` to standard error; where nothing takes it, a full disk or a terminal that is gone, work goes on."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
