"""What happens when something fails: the one policy of a run, whatever its units are.

=============================  ======================================================================================
what happens                   what follows
=============================  ======================================================================================
a unit raises                  it would again: it is split, and what cannot be split is given up
memory runs out                the unit is split; the worker is replaced after the second time in a row, and at once where
                               a library (cuBLAS, cuDNN) ran out, which leaves it unusable
a device error that sticks     the worker is replaced; the unit is tried on another, at the back of the queue. After
                               ``unit_attempts`` workers it is split
a worker dies                  the same
a worker is silent             past ``silence_factor`` times the forecast from the unit's cost, and at least ``silence_s``,
                               it is killed: the same
input or output fails          a fault that may pass: the unit goes to whoever is free, the worker rests, longer each
                               time. After ``io_attempts``, and where there are several machines after two of them have
                               tried, the run stops if the fault says so, else it counts as raised
a worker cannot start          it is tried again with pauses that double; others go on. The run stops when none runs and
                               each has failed ``start_attempts`` times in a row
a device fails again           after ``place_failures`` workers in a row at one place (machine and devices) without a
                               finished unit the last one is left there without work, so that nobody gets the device
a machine fails again          after ``place_failures`` workers in a row failed on it, with none finishing anything and
                               none left there, no worker is put there any more, if there is another machine
a trial, an example or an      it failed alone with ``suspect_alone`` others without ever finishing, or with
image fails again              ``suspect_failures`` in all: what waits of it is given up untried
a machine is awaited           for ``patience_s`` without any worker, with a line now and then; then the run stops
too much fails                 units of ``hopeless_homes`` homes with nothing finished, unless all hold one trial that others
                               do without, or more than ``causes`` things given up: the run stops
=============================  ======================================================================================

A worker holds one unit; all others wait at the driver, where whoever is idle takes them.
"""

from __future__ import annotations

import enum
import errno
import re
import traceback
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The numbers of the table above; times in seconds."""

    unit_attempts: int = 3
    io_attempts: int = 3
    start_attempts: int = 3
    place_failures: int = 3
    memory_in_a_row: int = 2
    suspect_alone: int = 3
    suspect_failures: int = 10
    causes: int = 100
    hopeless_homes: int = 3
    hopeless_failures: int = 30
    silence_factor: float = 20.0
    silence_s: float = 900.0
    patience_s: float = 1800.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 300.0
    tell_every_s: float = 30.0
    look_every_s: float = 5.0

    def pause(self, failures: int) -> float:
        """Before what failed ``failures`` times in a row is tried again: nothing, then doubling."""
        if failures < 2:
            return 0.0
        return min(self.first_pause_s * 2 ** (failures - 2), self.longest_pause_s)

    def deadline(self, cost: float, seconds_a_cost: float | None) -> float:
        """How long a unit of ``cost`` may take, from what finished units took; nothing finished: ``silence_s``."""
        return max(self.silence_s, self.silence_factor * cost * (seconds_a_cost or 0.0))


@dataclass
class Allowance:
    """What a command may use in all its runs: GPUs (without any: workers) times hours, and how much that was so far."""

    gpu_hours: float
    used: float = 0.0

    @property
    def spent(self) -> bool:
        return self.used >= self.gpu_hours


class Fault(enum.Enum):
    """What an error says about its cause."""

    RAISED = "raised"  # of the unit
    MEMORY = "memory"  # less at once may do
    DEVICE = "device"  # of the worker, from now on
    PASSING = "passing"  # of input or output; later or elsewhere may do
    LEFT = "left"  # nothing failed: the run ended first


# Accelerators and libraries spell it each in their own way.
MEMORY = re.compile(
    r"out[ _]of[ _](\w+[ _])?memory|outofmemory|(can't|cannot|failed to|unable to) allocate|not enough memory|bad_alloc|"
    r"memory[ _]?allocation|resource_exhausted|(CUBLAS|CUDNN|HIPBLAS|ROCBLAS|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
# A handle that could not be made is nearly always memory; the library does not come back from it.
LIBRARY_MEMORY = re.compile(
    r"(CUBLAS|CUDNN|HIPBLAS|ROCBLAS|CUSOLVER|CUSPARSE)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)", re.IGNORECASE
)
DEVICE = re.compile(
    r"CUDA (kernel )?error|cudaError|CUDA driver|HIP error|hipError|XPU error|NPU error|MPS backend error|"
    r"(CUBLAS|CUDNN|HIPBLAS|ROCBLAS|CUSOLVER|CUSPARSE)_STATUS_|cuDNN error|NCCL error|device-side assert|"
    r"illegal memory access|misaligned address|unspecified launch failure|uncorrectable ECC|device[ _]lost|"
    r"no CUDA-capable device|driver shutting down|fallen off the bus",
    re.IGNORECASE,
)
PASSING = {
    *(errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ENOLCK, errno.EREMOTEIO),
    *(errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN),
}


def _chain(error: BaseException) -> list[BaseException]:
    """``error`` and what it came from."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return chain


def _fault(error: BaseException) -> Fault:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or MEMORY.search(text) or LIBRARY_MEMORY.search(text):
        return Fault.MEMORY
    if type(error).__name__ == "AcceleratorError" or DEVICE.search(text):
        return Fault.DEVICE
    passes = isinstance(error, OSError) and (
        error.errno in PASSING or isinstance(error, (ConnectionError, TimeoutError))
    )
    return Fault.PASSING if passes or getattr(error, "may_pass", False) else Fault.RAISED


def fault_of(error: BaseException) -> Fault:
    """By the error itself, else by what it came from."""
    return next((fault for each in _chain(error) if (fault := _fault(each)) != Fault.RAISED), Fault.RAISED)


def stops_the_run(error: BaseException) -> bool:
    """Whether ``error`` says that units will go on failing, whatever they are."""
    return getattr(error, "stops_the_run", False)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@dataclass(frozen=True)
class Failure:
    """Why a unit failed: ``reason`` in one line, ``detail`` with the trace, and what that says of its cause.

    ``spent``: the worker can do no more. ``stops``: other units would meet it too.
    """

    reason: str
    detail: str
    attempts: int = 1
    fault: Fault = Fault.RAISED
    spent: bool = False
    stops: bool = False

    @classmethod
    def of(cls, error: BaseException, detail: str | None = None) -> Failure:
        fault = fault_of(error)
        spent = fault == Fault.DEVICE or any(LIBRARY_MEMORY.search(str(each)) for each in _chain(error))
        trace = detail or "".join(traceback.format_exception(error))
        return cls(reason(error), trace, 1, fault, spent, stops_the_run(error))


@dataclass(frozen=True)
class Partial:
    """What ``run`` returns of a unit that raised in parts: ``result`` of what is done (null: nothing), and the rest."""

    result: Any | None
    rest: Any
    failure: Failure
