"""Time: what is left of the run's, and what a piece of work takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class Budget:
    """Seconds left of a run, dealt out to its parts by weight; what a part leaves over goes to the later ones."""

    def __init__(self, seconds: float, weights: dict[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.weights = now, dict(weights)
        self.end = self.part_end = now() + seconds

    def begin(self, part: str) -> None:
        """Give ``part`` its share of the time that is left."""
        share = self.weights[part] / sum(self.weights.values())
        del self.weights[part]
        self.part_end = self.now() + share * (self.end - self.now())

    @property
    def left(self) -> float:
        """Seconds left to the part that has begun; below zero where it ran over."""
        return self.part_end - self.now()


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


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """Largest tensor memory held during ``work`` beyond what was held before it; null on a CPU, which has no such count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - held
