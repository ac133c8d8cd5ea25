"""What the profiler saw of a run on the device: kernels, the time between them, copies, and waits of the host."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Categories and names of CUPTI's activities, as torch writes them into a trace in Chrome's format.
KERNEL, COPY, SET, RUNTIME = "kernel", "gpu_memcpy", "gpu_memset", ("cuda_runtime", "cuda_driver")
OPERATOR = "cpu_op"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Trace:
    """Figures of one run; ``busy_ms`` and ``idle_ms`` are null where no device was seen.

    ``busy_ms``: time in which at least one kernel, copy or fill ran. ``idle_ms``: the rest between the first and the
    last. ``waits``, ``wait_ms``: calls in which the host waited for the device, and their time. ``copies``: by direction,
    such as ``DtoH``. ``operators``: outermost calls of torch's operators, seen on a CPU only.
    """

    kernels: int = 0
    busy_ms: float | None = None
    idle_ms: float | None = None
    waits: int = 0
    wait_ms: float = 0.0
    copies: Mapping[str, int] = field(default_factory=dict)
    operators: int = 0


def traced(run: Callable[[], Any], device: torch.device) -> Trace:
    """Run ``run`` once under the profiler; on a GPU the host's operators are not recorded, which would slow it."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as record:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text())["traceEvents"])


def read_trace(events: Iterable[Mapping[str, Any]]) -> Trace:
    """The figures of a trace's complete events (phase ``X``), whose times are microseconds."""
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    on_device = [event for event in complete if event.get("cat") in (KERNEL, COPY, SET)]
    waits = [event for event in complete if event.get("cat") in RUNTIME and event["name"] in WAITS]
    busy = idle = None
    if on_device:
        busy, idle = busy_and_idle([(event["ts"], event["ts"] + event["dur"]) for event in on_device])
    return Trace(
        kernels=sum(event["cat"] == KERNEL for event in on_device),
        busy_ms=busy,
        idle_ms=idle,
        waits=len(waits),
        wait_ms=sum(event["dur"] for event in waits) / 1000,
        copies=Counter(_direction(event["name"]) for event in on_device if event["cat"] == COPY),
        operators=_outermost([event for event in complete if event.get("cat") == OPERATOR]),
    )


def busy_and_idle(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Milliseconds inside and between ``spans`` of microseconds (begin, end); spans of several streams may overlap."""
    spans = sorted(spans)
    busy, end = 0.0, spans[0][0]
    for begin, stop in spans:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return busy / 1000, (end - spans[0][0] - busy) / 1000


def _direction(name: str) -> str:
    """``DtoH`` of ``Memcpy DtoH (Device -> Pageable)``."""
    words = name.split()
    return words[1] if len(words) > 1 and words[0] == "Memcpy" else name


def _outermost(events: list[Mapping[str, Any]]) -> int:
    """How many operators were not called by another of the same thread."""
    count, ends = 0, dict[tuple[Any, Any], float]()
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        thread = (event.get("pid"), event.get("tid"))
        if event["ts"] >= ends.get(thread, float("-inf")):
            count += 1
            ends[thread] = event["ts"] + event["dur"]
    return count
