"""How long a call takes on a device, whose work goes on when the call has returned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Milliseconds of a call on ``device``, by CUDA events where it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, work: Callable[[], Any]) -> float:
        if not self.cuda:
            began = time.perf_counter()
            work()
            return 1000 * (time.perf_counter() - began)
        torch.cuda.synchronize()  # what the call before left in the queue is not this one's
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)

    def median(self, work: Callable[[], Any], repeats: int) -> float:
        """Median milliseconds of ``repeats`` calls after one to warm up."""
        work()
        return statistics.median(self(work) for _ in range(repeats))
