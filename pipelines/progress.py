"""Progress of a sweep: a bar in terminals, a heartbeat file, and metrics of the parent run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.atomic import atomic_path
from pipelines.sweep import WorkUnit

REPORT_EVERY_S = 5.0


class SweepProgress:
    """Context manager; ``start`` and ``done`` are the sweep's callbacks."""

    def __init__(self, heartbeat: Path, log: Callable[[int, Mapping[str, float]], None]) -> None:
        self.heartbeat, self.log = heartbeat, log
        self.bar = Progress(
            TextColumn("sweep"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("trial shards · {task.fields[rate]:.0f} answers/s ·"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.units: Mapping[str, WorkUnit] = {}
        self.finished, self.answers, self.cached, self.total = 0, 0, 0, 0
        self.began = self.reported = time.monotonic()

    def __enter__(self) -> SweepProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self._report()

    def start(self, units: Mapping[str, WorkUnit], cached: int) -> None:
        self.units, self.cached = units, cached
        self.total = cached + sum(len(unit.cells) for unit in units.values())
        self.task = self.bar.add_task("sweep", total=self.total, completed=cached, rate=0.0)
        self.began = time.monotonic()

    def done(self, _unit: str, result: tuple[int, int]) -> None:
        trials, answers = result
        self.finished += trials
        self.answers += answers
        rate = self.answers / max(time.monotonic() - self.began, 1e-9)
        self.bar.update(self.task, advance=trials, rate=rate)
        if time.monotonic() - self.reported > REPORT_EVERY_S:
            self._report()

    def _report(self) -> None:
        self.reported = time.monotonic()
        elapsed = max(self.reported - self.began, 1e-9)
        rest = self.total - self.cached - self.finished
        figures = {
            "progress/trial_shards_done": float(self.cached + self.finished),
            "progress/trial_shards_total": float(self.total),
            "progress/trial_shards_cached": float(self.cached),
            "progress/answers_per_second": self.answers / elapsed,
            "progress/seconds_left": rest * elapsed / self.finished if self.finished else float(rest > 0),
        }
        self.log(int(elapsed * 1000), figures)
        with atomic_path(self.heartbeat) as path:
            path.write_text(json.dumps(figures))
