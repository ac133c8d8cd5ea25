"""A stage that is told to end, by Slurm, a machine that is taken away or a terminal that closes, ends in order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from pipelines.tracking.open_runs import end_open_runs

TOLD_BY = (signal.SIGTERM, signal.SIGHUP)


class ToldToEnd(KeyboardInterrupt):
    """``number``: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _raise(number: int, _frame: FrameType | None) -> None:
    raise ToldToEnd(number)


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """Inside, the signals raise :class:`ToldToEnd`; it leaves when runs of MLflow are closed. What the caller's
    environment ignores, as ``nohup`` does, stays ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        taken = (number for number in TOLD_BY if signal.getsignal(number) is signal.SIG_DFL)
        before = {number: signal.signal(number, _raise) for number in taken}
    try:
        yield
    except KeyboardInterrupt:
        for number in before:  # what ends now is not interrupted again
            signal.signal(number, signal.SIG_IGN)
        end_open_runs()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
