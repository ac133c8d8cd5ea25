"""What every part is given, and how its pieces are run: one after the other, within the time, whatever one of them does."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.results import Record, Result
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.workload import Models, release
from nuwa.clock import Clock
from nuwa.schedule import UnreachableBudget

TRACE_LINES = 3  # of an error, in its result


@dataclass(frozen=True)
class Session:
    """The device, how large everything is, the clock, and the random models."""

    device: torch.device
    scale: Scale
    clock: Clock
    models: Models

    @classmethod
    def on(cls, device: torch.device, scale: Scale) -> Session:
        return cls(device, scale, Clock(device), Models(scale, device))


@dataclass(frozen=True)
class Piece:
    """Something to measure or to check that makes sense alone.

    ``seconds``: what it takes on an H100, at most; it is not begun with less time left, except in a dry run.
    ``checks``: whether correctness rests on it.
    """

    name: str
    seconds: float
    run: Callable[[], Iterable[Result]]
    checks: bool = False


Part = Callable[[Session], Iterator[Piece]]


def run_part(letter: str, part: Part, session: Session, budget: Budget, record: Record) -> None:
    """Run a part's pieces; each leaves results, or one that says why it has none."""
    budget.begin(letter)
    for piece in part(session):
        left, needs = budget.left, 0.0 if session.scale.tiny else piece.seconds
        if left < needs or left <= 0:
            why = f"{max(left, 0):.0f} s left of this part's time, {needs:.0f} s needed; give more --minutes"
            record.add(Result(letter, piece.name, "skipped", {"why": why}, piece.checks))
            continue

        began = time.monotonic()
        try:
            for result in piece.run():
                figures = {**result.figures, "took_s": time.monotonic() - began}
                record.add(replace(result, figures=figures))
        except (torch.OutOfMemoryError, UnreachableBudget) as error:
            why = "does not fit into memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            record.add(Result(letter, piece.name, "skipped", {"why": why}, piece.checks))
        except Exception as error:  # the other pieces have their own say
            record.add(Result(letter, piece.name, "error", _facts(error), piece.checks))
        else:
            continue
        release()  # what the frames of a failure held


def _facts(error: Exception) -> dict[str, object]:
    frames = traceback.extract_tb(error.__traceback__)[-TRACE_LINES:]
    message = " ".join(str(error).split())[:300]
    return {
        "error": f"{type(error).__name__}: {message}",
        "where": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
