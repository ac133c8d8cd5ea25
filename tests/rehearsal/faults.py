"""What goes wrong in workers of a rehearsal, by their own code: a plugin of the project that is rehearsed.

``NUWA_REHEARSAL`` names a folder; without it, as in a quiet run, nothing happens. A file ``<number>.<fault>.<units>`` there
befalls the first worker that begins a unit after so many have begun: ``preempt`` takes its machine away, ``sick`` makes
every unit of this process fail as a device does after a sticky error, ``hang`` makes it stand still. ``units.log`` has a
line a unit that begins or ends.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

CONTROL = os.environ.get("NUWA_REHEARSAL")
STICKY = "CUDA error: an illegal memory access was encountered"
ill = []


def note(what: str, unit: Any) -> None:
    with open(Path(str(CONTROL)) / "units.log", "a") as lines:
        lines.write(f"{what} {unit.unit_id} {os.getpid()} {len(unit.trials) * len(unit.examples)}\n")


def due() -> str | None:
    """The fault that this worker gets now; each is had once."""
    begun = (Path(str(CONTROL)) / "units.log").read_text().count("begin ")
    for path in sorted(Path(str(CONTROL)).glob("*.*.*")):
        _, fault, units = path.name.split(".")
        if begun >= int(units):
            try:
                path.rename(path.with_name(f"{fault} {os.getpid()}"))
            except FileNotFoundError:  # another worker has it
                continue
            return fault
    return None


def take_machine_away() -> None:
    """Kill the raylet, whatever it started, who started it, and this process last."""
    import psutil

    own, raylet = psutil.Process(), psutil.Process(int(os.environ["RAY_RAYLET_PID"]))
    top = next(process for process in raylet.parents() if {"start", "--block"} <= set(process.cmdline()))
    for process in [top, *top.children(recursive=True)]:
        if process != own:
            process.kill()
    os.kill(own.pid, signal.SIGKILL)


def befall(worker: type) -> None:
    """Have a class of workers suffer what is due."""
    answer = worker.run  # type: ignore[attr-defined]  (of whatever class of workers it is given)

    def run(self: Any, unit: Any, upcoming: Any = None) -> Any:
        note("begin", unit)
        fault = due()
        if fault == "preempt":
            take_machine_away()
        if fault == "hang":
            time.sleep(24 * 3600)
        if fault == "sick":
            ill.append(True)
        if ill:
            raise RuntimeError(STICKY)
        result = answer(self, unit, upcoming)
        note("end", unit)
        return result

    worker.run = run  # type: ignore[attr-defined]  (as above)


if CONTROL:
    from pipelines.sweep.answers import SweepWorker

    befall(SweepWorker)
