"""Progress of a sweep: a bar in terminals, a line now and then elsewhere, a heartbeat file, a log line a unit, and metrics of the parent run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.files.atomic import atomic_path
from pipelines.files.lines import append_line, read_lines, tell
from pipelines.settings import ClusterSettings
from pipelines.sweep.answers import UnitReport, device_name
from pipelines.sweep.costs import usual_speed
from pipelines.sweep.units import WorkUnit

REPORT_EVERY_S = 5.0
LINE_EVERY_S = 30.0  # where there is no terminal for a bar


class SweepProgress:
    """Context manager; ``start`` and ``done`` are the sweep's callbacks. ``log`` gets an index and the figures.

    ``clock``: seconds from any start.
    """

    def __init__(
        self,
        heartbeat: Path,
        units_log: Path,
        log: Callable[[int, Mapping[str, float]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.heartbeat, self.units_log, self.log, self.clock = heartbeat, units_log, log, clock
        console = Console(stderr=True)
        self.live = console.is_interactive
        self.bar = Progress(
            TextColumn("sweep"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("answers · {task.fields[rate]:.0f}/s · model {task.fields[share]:.0%} ·"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )

        self.lacking: dict[str, int] = {}  # answers each trial lacks
        self.trials = 0
        self.cached = self.total = self.finished = 0  # answers
        self.units = self.feature_hits = 0
        self.flops = self.left_flops = self.seconds = self.model_seconds = 0.0
        self.told_unwritten = False
        self.told_units = -1  # how many were done when the last line was written
        self.began = self.reported = self.told = self.clock()

    def __enter__(self) -> SweepProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self._report()
        if not self.live and self.total and self.told_units != self.units:
            self._tell()

    def start(self, units: Mapping[str, WorkUnit], cached: int) -> None:
        self.cached = cached
        for unit in units.values():
            for trial in unit.trials:
                self.lacking[trial.trial_id] = self.lacking.get(trial.trial_id, 0) + len(unit.examples)
            self.left_flops += unit.flops
        self.trials = len(self.lacking)
        self.total = cached + sum(self.lacking.values())
        self.task = self.bar.add_task("sweep", total=self.total, completed=cached, rate=0.0, share=0.0)
        self.began = self.told = self.clock()

    def done(self, unit_id: str, result: UnitReport) -> None:
        self.units += 1
        self.finished += result.answers
        self.feature_hits += result.feature_hit
        self.flops += result.flops
        self.seconds += result.seconds
        self.model_seconds += result.model_seconds
        for trial_id in result.trial_ids:
            self.lacking[trial_id] -= result.examples
            if not self.lacking[trial_id]:
                del self.lacking[trial_id]
        self._write_line(unit_id, result)
        self.bar.update(self.task, advance=result.answers, rate=self._rate, share=self._share)
        if self.clock() - self.reported > REPORT_EVERY_S:
            self._report()
        if not self.live and self.clock() - self.told >= LINE_EVERY_S:
            self._tell()

    @property
    def _rate(self) -> float:
        return self.finished / self._elapsed

    @property
    def _elapsed(self) -> float:
        return max(self.clock() - self.began, 1e-9)

    @property
    def _seconds_left(self) -> float:
        """By the FLOPs to come; one second where nothing tells the speed."""
        left = max(self.left_flops - self.flops, 0.0)
        missing = self.total > self.cached + self.finished
        return left * self._elapsed / self.flops if self.flops else float(missing)

    @property
    def _share(self) -> float:
        return self.model_seconds / self.seconds if self.seconds else 0.0

    def _write_line(self, unit_id: str, result: UnitReport) -> None:
        row = asdict(result) | {"trial_ids": len(result.trial_ids)}
        row["trials"] = row.pop("trial_ids")
        try:
            append_line(self.units_log, {"time": datetime.now(UTC).isoformat(), "unit": unit_id, **row})
        except OSError as error:
            self._go_on_without(self.units_log, error)

    def _go_on_without(self, path: Path, error: OSError) -> None:
        """Say once that a note could not be written; what was answered lies in the store."""
        if not self.told_unwritten:
            self.told_unwritten = True
            tell(
                f"{path}: cannot be written ({error.strerror or error}); the sweep goes on without, all answers are kept"
            )

    def _report(self) -> None:
        self.reported = self.clock()
        figures = {
            "progress/trials_done": float(self.trials - len(self.lacking)),
            "progress/trials_total": float(self.trials),
            "progress/answers_done": float(self.cached + self.finished),
            "progress/answers_total": float(self.total),
            "progress/answers_cached": float(self.cached),
            "progress/answers_per_second": self._rate,
            "progress/model_share": self._share,
            "progress/feature_hit_share": self.feature_hits / self.units if self.units else 0.0,
            "progress/seconds_left": self._seconds_left,
        }
        self.log(int(self._elapsed * 1000), figures)
        try:
            with atomic_path(self.heartbeat) as path:
                path.write_text(json.dumps(figures))
        except OSError as error:
            self._go_on_without(self.heartbeat, error)

    def _tell(self) -> None:
        """One line for logs."""
        self.told, self.told_units = self.clock(), self.units
        done = self.cached + self.finished
        left = f"{duration(self._seconds_left)} left" if done < self.total else f"took {duration(self._elapsed)}"
        tell(
            f"sweep: {done:,}/{self.total:,} answers, {self.cached:,} of them cached, {self._rate:.1f}/s, "
            f"model {self._share:.0%}, {left}"
        )


def worker_speed(units_log: Path, cluster: ClusterSettings, last: int = 200) -> float:
    """FLOP/s of one worker: as its last units had it, or as its kind usually has before the first."""
    device = device_name(cluster.device, cluster.cpus)
    of_device = [row for row in read_lines(units_log, last) if row.get("device") == device]
    seconds = sum(row.get("seconds", 0.0) for row in of_device)
    flops = sum(row.get("flops", 0.0) for row in of_device)
    return flops / seconds if seconds else usual_speed(cluster.device, cluster.cpus)


def duration(seconds: float) -> str:
    """In words, in the largest unit of which there are two."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
