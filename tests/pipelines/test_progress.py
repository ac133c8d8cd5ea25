"""What a sweep says while it runs, where there is a terminal and where there is none."""

from __future__ import annotations

import json
import os
import pty
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import forked

from pipelines.files.lines import append_line, read_lines
from pipelines.settings import ClusterSettings
from pipelines.sweep.answers import UnitReport
from pipelines.sweep.progress import SweepProgress, worker_speed
from pipelines.sweep.units import WorkUnit

TRIALS = tuple(SimpleNamespace(trial_id=name) for name in "ab")


def sweep(folder: Path, seconds: str, stop: str = "never", most_bytes: int | None = None) -> None:
    """Four units of ten answers each, of two trials, done at ``seconds``; no file gets longer than ``most_bytes``."""
    now = 100.0
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    units = {f"u{n}": WorkUnit(TRIALS, tuple(range(5)), 1e9) for n in range(4)}
    with SweepProgress(folder / "progress.json", folder / "units.jsonl", lambda *_: None, lambda: now) as progress:
        progress.start(units, 1200)
        for unit_id, second in zip(units, seconds.split(","), strict=True):
            now = 100 + float(second)
            progress.done(unit_id, UnitReport(("a", "b"), 5, 1, 10.0, 9.0, True, 1e9, "cpu x1"))
            if stop == unit_id:
                raise SystemExit(3)


def said(folder: Path, seconds: str, stop: str = "never", most_bytes: int | None = None, stderr: int | None = None):
    done = forked(lambda: sweep(folder, seconds, stop, most_bytes), stderr)
    assert (done.code, done.out) == (0 if stop == "never" else 3, ""), done.err
    return done.err.splitlines()


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
    assert said(tmp_path, "30,90,91,92", stop="u1") == [
        "sweep: 1,210/1,240 answers, 1,200 of them cached, 0.3/s, model 90%, 90 seconds left",
        "sweep: 1,220/1,240 answers, 1,200 of them cached, 0.2/s, model 90%, 90 seconds left",
    ]
    assert json.loads((tmp_path / "progress.json").read_text())["progress/answers_done"] == 1220


def test_a_log_that_takes_no_more_costs_one_line_and_what_comes_later_reads_past_it(tmp_path, caplog):
    """No file may be longer than 500 bytes: the log's third line is cut off. The next sweep begins on a line of its own."""
    log, cluster = tmp_path / "units.jsonl", ClusterSettings(address=None, workers=1, cpus=1, gpus=0)
    assert said(tmp_path, "1,2,3,4", most_bytes=500) == [
        f"{log}: cannot be written (File too large); the sweep goes on without, all answers are kept",
        "sweep: 1,240/1,240 answers, 1,200 of them cached, 10.0/s, model 90%, took 4 seconds",
    ]
    assert log.stat().st_size == 500 and not log.read_bytes().endswith(b"\n")
    assert worker_speed(log, cluster) == 1e8
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{log}: 1 of its last 3 lines are cut off and left out; nothing else is lost"
    assert len(said(tmp_path, "1,2,3,4")) == 1
    assert [row["unit"] for row in read_lines(log, 99)] == ["u0", "u1", "u0", "u1", "u2", "u3"]


@pytest.mark.parametrize("last", [b'{"unit": "u', b"\xff\xfe", b"\0" * 9, b"17", b'{"unit": "u"}'])
def test_whatever_a_log_ends_with_the_next_line_stands_alone(tmp_path, last):
    log = tmp_path / "units.jsonl"
    log.write_bytes(b'{"unit": "a"}\n' + last)
    append_line(log, {"unit": "b"})
    append_line(log, {"unit": "c"})
    whole = [] if last != b'{"unit": "u"}' else ["u"]
    assert [row["unit"] for row in read_lines(log, 99)] == ["a", *whole, "b", "c"]


def test_where_nothing_takes_what_a_driver_says_it_goes_on(tmp_path):
    with open("/dev/full", "w") as full:
        said(tmp_path, "10,40,50,400", stderr=full.fileno())
    assert json.loads((tmp_path / "progress.json").read_text())["progress/answers_done"] == 1240


def test_a_terminal_gets_a_bar_and_no_lines(tmp_path, monkeypatch):
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with ThreadPoolExecutor(1) as reader:  # a terminal that nobody reads stops who writes to it
        shown = reader.submit(lambda: b"".join(iter(lambda: _read(ours), b"")))
        forked(lambda: sweep(tmp_path, "10,40,50,400"), stderr=theirs)
        os.close(theirs)
    os.close(ours)
    assert "1240/1240" in (said := shown.result().decode()) and "of them cached" not in said


def _read(terminal: int) -> bytes:
    """What the other side wrote; nothing once it is gone, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""
