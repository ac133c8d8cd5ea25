"""Results as they come: one JSON object a line, whole or absent, and a table of them at the end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

# Correctness holds or fails, speed reaches an aim or misses it, anything else is measured; what was not is skipped.
Status = Literal["held", "failed", "measured", "reached", "missed", "skipped", "error"]
WRONG = ("failed", "error")
HELD, FAILED_CHECK, UNCHECKED = 0, 1, 3  # exit codes; 2 is a wrong command line
SHOWN = 6  # figures a line of the table
ATOMIC = 4096  # bytes: PIPE_BUF of Linux


@dataclass(frozen=True)
class Result:
    """One line.

    ``part``: a letter, or ``run`` for what is said of the whole run. ``name``: unique within a part. ``checks``: whether
    correctness rests on it. ``figures``: JSON values by name, whose unit ends the name (``_ms``, ``_bytes``, ``_share``).
    """

    part: str
    name: str
    status: Status
    figures: Mapping[str, Any] = field(default_factory=dict)
    checks: bool = False

    def line(self) -> str:
        """One line of JSON, without its end, that a pipe takes whole.

        NaN and infinity, which JSON has not, are null. Of figures that are too many the last are left out and named.
        """
        facts = {"part": self.part, "name": self.name, "status": self.status, "checks": self.checks, **self.figures}
        facts, left_out = _finite(facts), []
        while len((text := json.dumps(facts, ensure_ascii=False, allow_nan=False)).encode()) >= ATOMIC:
            left_out.append(next(name for name in reversed(facts) if name != "left_out"))
            del facts[left_out[-1]]
            facts["left_out"] = left_out
        return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value


class Record:
    """Every result on ``stream`` and, where there is one, at the end of ``path``, before the next is begun.

    A process may be killed in the middle of a write, and then the system leaves a part of it. So the file is written
    anew beside itself and renamed: it is always whole, whatever happens. A line on ``stream`` is one write that a pipe
    takes whole or not at all. What another program left of a last line is cut off.
    """

    def __init__(self, path: Path | None = None, stream: TextIO | None = None) -> None:
        self.results: list[Result] = []
        self.stream, self.path, self.content = stream or sys.stdout, path, b""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            earlier = path.read_bytes() if path.exists() else b""
            self.content = earlier[: earlier.rfind(b"\n") + 1]

    def add(self, result: Result) -> None:
        """Write ``result`` and keep it."""
        self.results.append(result)
        line = result.line() + "\n"
        if self.path is not None:
            self.content += line.encode()
            fresh = self.path.with_name(self.path.name + ".tmp")
            fresh.write_bytes(self.content)
            os.replace(fresh, self.path)
        self.stream.write(line)
        self.stream.flush()

    @property
    def exit_code(self) -> int:
        """0 where every check held, 1 where one failed or anything raised, 3 where a check was not done."""
        if any(result.status in WRONG for result in self.results):
            return FAILED_CHECK
        if any(result.checks and result.status != "held" for result in self.results):
            return UNCHECKED
        return HELD


def table(results: Sequence[Result]) -> str:
    """What a person reads: part, name, status and the first figures of each result, in columns."""
    rows = [(result.part, result.name, result.status, _figures(result)) for result in results]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def _figures(result: Result) -> str:
    """``error`` and ``why`` in full; of the rest numbers and words, some of them."""
    for name in ("error", "why"):
        if name in result.figures:
            return str(result.figures[name])
    simple = {name: value for name, value in result.figures.items() if isinstance(value, (bool, int, float, str))}
    return ", ".join(f"{name} {_short(value)}" for name, value in list(simple.items())[:SHOWN])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
