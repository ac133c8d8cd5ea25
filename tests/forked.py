"""Processes of their own without an import of their own: for what a process does with its files, signals and limits."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

HANGS_S = 1800  # what takes longer hangs; a busy machine takes minutes


class Ended(NamedTuple):
    """How a process ended (a signal's number below zero) and what it said."""

    code: int
    out: str
    err: str


def forked(action: Callable[[], object], stderr: int | None = None) -> Ended:
    """Run ``action`` in a copy of this process; it may say as much as a pipe holds. ``stderr``: where else its goes."""
    pipes = [os.pipe(), os.pipe()]
    process = os.fork()
    if process == 0:
        os.dup2(pipes[0][1], 1)
        os.dup2(pipes[1][1] if stderr is None else stderr, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115  (open to its end)
        _run_and_leave(action)
    said = []
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    for ours, theirs in pipes:
        os.close(theirs)
        with open(ours) as pipe:
            said.append(pipe.read())
    return Ended(code, *said)


def begin(action: Callable[[], object]) -> int:
    """The id of a copy of this process that runs ``action``, for a caller who ends it."""
    process = os.fork()
    if process == 0:
        _run_and_leave(action)
    return process


def kill_when(ready: Callable[[], bool], action: Callable[[], object]) -> None:
    """Run ``action`` in a copy of this process and kill it (SIGKILL) once ``ready()``; fails where it ends before that."""
    process = begin(action)
    until = time.monotonic() + HANGS_S
    try:
        while not ready():
            assert os.waitpid(process, os.WNOHANG)[0] == 0, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it ended by itself
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _run_and_leave(action: Callable[[], object]) -> None:
    code = 1
    try:
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
