"""What a sweep says while it runs, where there is a terminal and where there is none."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

from bench import ROOT

# Four units of ten answers each, of two trials; the first two are done before the log's first half minute is over.
SWEEP = """
import sys
from pathlib import Path
from types import SimpleNamespace
from pipelines.sweep.units import WorkUnit
from pipelines.sweep.progress import SweepProgress
from pipelines.sweep.answers import UnitReport

now, folder = 100.0, Path(sys.argv[1])
trials = tuple(SimpleNamespace(trial_id=name) for name in "ab")
units = {f"u{n}": WorkUnit(trials, tuple(range(5)), 1e9) for n in range(4)}
with SweepProgress(folder / "progress.json", folder / "units.jsonl", lambda *_: None, lambda: now) as progress:
    progress.start(units, 1200)
    for unit_id, second in zip(units, sys.argv[2].split(",")):
        now = 100 + float(second)
        progress.done(unit_id, UnitReport(("a", "b"), 5, 1, 10.0, 9.0, True, 1e9, "cpu x1"))
        if sys.argv[3] == unit_id:
            raise SystemExit(3)
"""


def said(tmp_path, seconds: str, stop: str = "never") -> list[str]:
    command = [sys.executable, "-c", SWEEP, str(tmp_path), seconds, stop]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if stop == "never" else 3), done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(tmp_path):
    assert said(tmp_path, "10,40,50,400") == [
        "sweep: 1,220/1,240 answers, 1,200 of them cached, 0.5/s, model 90%, 40 seconds left",
        "sweep: 1,240/1,240 answers, 1,200 of them cached, 0.1/s, model 90%, took 6.7 minutes",
    ]


def test_a_sweep_of_seconds_says_one_line(tmp_path):
    assert said(tmp_path, "1,2,3,4") == [
        "sweep: 1,240/1,240 answers, 1,200 of them cached, 10.0/s, model 90%, took 4 seconds"
    ]


def test_an_interrupted_sweep_says_how_far_it_came(tmp_path):
    assert said(tmp_path, "30,90", stop="u1") == [
        "sweep: 1,210/1,240 answers, 1,200 of them cached, 0.3/s, model 90%, 90 seconds left",
        "sweep: 1,220/1,240 answers, 1,200 of them cached, 0.2/s, model 90%, 90 seconds left",
    ]
    assert json.loads((tmp_path / "progress.json").read_text())["progress/answers_done"] == 1220


def test_a_terminal_gets_a_bar_and_no_lines(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SWEEP, str(tmp_path), "10,40,50,400", "never"]
    shown = b""
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"}, stderr=theirs):
        os.close(theirs)
        while block := _read(ours):
            shown += block
    os.close(ours)
    assert "1240/1240" in shown.decode() and "of them cached" not in shown.decode()


def _read(terminal: int) -> bytes:
    """What the other side wrote; nothing once it is gone, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""
