"""Runs work units on workers that each hold a model: in this process, or as Ray actors on a machine or a cluster.

A worker specification is a small picklable object whose ``build()`` makes the worker; a worker's ``run(unit,
upcoming)`` does one unit and is told which it will probably be given next. Units may run more than once (a worker died
before its answer arrived), so they must be idempotent.

A unit may have a ``home``: units of one home are given to one worker as long as there are any, because they read the
same data. It may also have ``split()``, smaller units that come to the same: a unit that raises, runs out of memory or
kills its workers is split, until what cannot be split further is given up by itself.
"""

from __future__ import annotations

import collections
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.settings import ClusterSettings

MAX_ATTEMPTS = 3  # a unit that killed this many workers is split, or given up
MAX_GIVEN_UP = 100  # so many units given up are no accident: the run stops
IN_FLIGHT = 2  # units an actor holds: one running, one waiting
HOPELESS = 3  # so many units failing and none finished stops the run
OBJECT_STORE_BYTES = 200 * 1024**2  # results travel as files, so the store stays small

log = logging.getLogger(__name__)


class Worker(Protocol):
    def run(self, unit: Any, upcoming: Any | None) -> Any: ...


class WorkerSpec(Protocol):
    def build(self) -> Worker: ...


@dataclass(frozen=True)
class Failure:
    """Why a unit failed: ``reason`` in one line, ``detail`` with the trace. Smaller units may have memory enough."""

    reason: str
    detail: str
    attempts: int
    of_memory: bool = False

    @classmethod
    def of(cls, error: BaseException, detail: str | None = None) -> Failure:
        of_memory = (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"  # torch's and Ray's
            or "can't allocate memory" in str(error)  # torch on a CPU
        )
        return cls(reason(error), detail or "".join(traceback.format_exception(error)), 1, of_memory)


@dataclass(frozen=True)
class Partial:
    """What ``run`` returns of a unit that raised in parts: ``result`` of what is done (null: nothing), and the rest."""

    result: Any | None
    rest: Any
    failure: Failure


GivenUp = dict[str, tuple[Any, Failure]]  # unit id → the unit, and why it was given up


class UnitsFailed(RuntimeError):
    """Some units did not finish; everything that did is kept, and a rerun does the rest."""


class ClusterUnavailable(RuntimeError):
    """Ray did not start, or the cluster could not be joined."""


OnDone = Callable[[str, Any], None]


def run_units(
    spec: WorkerSpec, units: Mapping[str, Any], cluster: ClusterSettings, on_done: OnDone, *, in_process: bool = False
) -> GivenUp:
    """Run all ``units`` (id → unit); call ``on_done(id, result)`` in this process as each finishes.

    Returns the units that were given up. ``in_process`` needs no Ray and gives the same results. Raises
    :class:`UnitsFailed` where everything or too much fails, and lets a full disk through.
    """
    if not units:
        return {}
    ledger = _Ledger(units, on_done)
    if in_process:
        _run_here(spec, ledger)
    else:
        _run_on_ray(spec, cluster, ledger)
    return ledger.given_up


class _Ledger:
    """Which units wait, and what became of the others."""

    def __init__(self, units: Mapping[str, Any], on_done: OnDone) -> None:
        self.units, self.on_done = dict(units), on_done
        self.homes: dict[Any, collections.deque[str]] = {}  # waiting units; first come first served within a home
        self.given_up: GivenUp = {}
        self.finished = 0
        self.failed_homes: set[Any] = set()  # a unit without a home counts as one
        self.deaths: collections.Counter[str] = collections.Counter()
        for unit_id in units:
            self.wait(unit_id)

    def wait(self, unit_id: str) -> None:
        self.homes.setdefault(getattr(self.units[unit_id], "home", None), collections.deque()).append(unit_id)

    def home_for(self, home: Any) -> Any | None:
        """Where a worker that has the data of ``home`` takes its next unit: there, else where most waits."""
        if home in self.homes:
            return home
        return max(self.homes, key=lambda other: len(self.homes[other]), default=None)

    def take(self, home: Any, *, idle: bool = True) -> tuple[str, Any] | None:
        """The next unit for a worker at ``home``, and the unit that would follow it.

        A unit whose worker died goes to ``idle`` workers only: who runs it alone, and dies, died of it.
        """
        home = self.home_for(home)
        if home not in self.homes or (self.deaths[self.homes[home][0]] and not idle):
            return None
        queue = self.homes[home]
        unit_id = queue.popleft()
        if not queue:
            del self.homes[home]
        following = self.home_for(home)
        return unit_id, self.units[self.homes[following][0]] if following in self.homes else None

    def settle(self, unit_id: str, result: Any) -> None:
        """Take in what a unit returned."""
        if isinstance(result, Partial):
            if result.result is not None:
                self.finished += 1
                self.on_done(unit_id, result.result)
            self.units[unit_id] = result.rest
            self.fail(unit_id, result.failure)
            return
        self.finished += 1
        self.on_done(unit_id, result)
        del self.units[unit_id]

    def fail(self, unit_id: str, failure: Failure) -> None:
        """A unit raised, which it would do again: split it, or give it up."""
        if not failure.of_memory:
            self.failed_homes.add(getattr(self.units[unit_id], "home", unit_id))
        # One bad image fails every unit of its home; only several homes speak of something that fails everywhere.
        if not self.finished and max(len(self.failed_homes), len(self.given_up)) >= HOPELESS:
            raise UnitsFailed(
                f"the first {HOPELESS} units all failed, so the run stops: {failure.reason}\n{failure.detail}"
            )
        self._divide(unit_id, failure)

    def died(self, unit_id: str, failure: Failure) -> None:
        """A unit's worker died: try it again at the back of the queue, and split one that keeps killing."""
        self.deaths[unit_id] += 1
        if self.deaths[unit_id] < MAX_ATTEMPTS and not failure.of_memory:
            log.warning(
                "a worker died; unit %s is tried again (%d of %d)", unit_id, self.deaths[unit_id] + 1, MAX_ATTEMPTS
            )
            self.wait(unit_id)
            return
        self._divide(unit_id, failure)

    def _divide(self, unit_id: str, failure: Failure) -> None:
        unit = self.units.pop(unit_id)
        parts = unit.split() if hasattr(unit, "split") else {}
        if parts:
            log.warning("unit %s is split and tried again: %s", unit_id, failure.reason)
        else:
            self.given_up[unit_id] = (unit, failure)
            if len(self.given_up) > MAX_GIVEN_UP:
                raise UnitsFailed(
                    f"more than {MAX_GIVEN_UP} units were given up, so the run stops; finished work is kept. The last: "
                    f"{failure.reason}\n{failure.detail}"
                )
        for part_id, part in parts.items():
            self.units[part_id] = part
            # A part of what killed three workers gets one more try before it is split in turn.
            self.deaths[part_id] = MAX_ATTEMPTS - 1 if self.deaths[unit_id] else 0
            self.wait(part_id)


def _run_here(spec: WorkerSpec, ledger: _Ledger) -> None:
    worker, home = spec.build(), None
    while (taken := ledger.take(home)) is not None:
        unit_id, upcoming = taken
        unit = ledger.units[unit_id]
        try:
            result = worker.run(unit, upcoming)
        except Exception as error:
            if _is_final(error):
                raise
            ledger.fail(unit_id, Failure.of(error))
            home = None
        else:
            ledger.settle(unit_id, result)
            home = None if isinstance(result, Partial) else getattr(unit, "home", None)


def _is_final(error: BaseException) -> bool:
    """Whether ``error`` says that units will go on failing, whatever they are, so that the run must stop."""
    return getattr(error, "stops_the_run", False)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def start_ray(cluster: ClusterSettings) -> bool:
    """Connect to ``cluster`` unless this process is connected; True when the caller should shut Ray down."""
    address = cluster.resolved_address
    # Ray 2.59 and newer ask for a token; a private instance on this machine needs none. Set before the import.
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.WARNING, "log_to_driver": False}
    if address is None:
        options |= {
            "address": "local",
            "num_cpus": max(cluster.workers * cluster.cpus, 1),
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        if cluster.gpus == 0:
            options["num_gpus"] = 0
    else:
        options |= {"address": address, "runtime_env": {"working_dir": "."}}
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises bare Exceptions here
        where = address or "on this machine"
        raise ClusterUnavailable(
            f"Ray did not start or join {where}: {reason(error)}; see cluster.address and RAY_ADDRESS"
        ) from error
    return True


def _check_resources(cluster: ClusterSettings, nodes: list[dict[str, Any]]) -> None:
    """Refuse workers that no node can ever hold; Ray would wait for such a node without a word."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    for key, name, wanted in (("CPU", "cpus", cluster.cpus), ("GPU", "gpus", cluster.gpus)):
        most = max((node.get(key, 0) for node in alive), default=0)
        if wanted > most:
            raise ClusterUnavailable(f"cluster.{name} = {wanted:g}: no node has more than {most:g}")


class _Host:
    """The actor: builds its worker from a small specification, so that a restart loads weights where it runs."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.worker = spec.build()

    def ready(self) -> None:
        """Answers once the worker is built."""

    def run(self, unit: Any, upcoming: Any | None) -> Any:
        return self.worker.run(unit, upcoming)


def _run_on_ray(spec: WorkerSpec, cluster: ClusterSettings, ledger: _Ledger) -> None:
    ours = start_ray(cluster)
    import ray

    _check_resources(cluster, ray.nodes())

    host = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus)(_Host)
    dispatch = _Dispatch(host, spec, min(cluster.workers, len(ledger.units)), ledger)
    try:
        dispatch.run()
    finally:
        for actor in dispatch.actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


class _Dispatch:
    """The loop that keeps every actor busy, replaces dead ones and retries what they held.

    An actor is given units once it is ready: one that waits for a node that has died must not sit on any.
    """

    def __init__(self, host: Any, spec: WorkerSpec, workers: int, ledger: _Ledger) -> None:
        self.host, self.spec, self.ledger = host, spec, ledger
        self.actors: list[Any] = [None] * workers
        self.at: list[Any] = [None] * workers  # each actor's home
        self.ready = [False] * workers
        self.held: dict[Any, tuple[str | None, int]] = {}  # reference → unit (null: being built), actor; oldest first
        self.unborn = 0  # actors in a row that died while being built
        self.death: Exception | None = None
        for number in range(workers):
            self._start(number)

    def _start(self, number: int) -> None:
        self.actors[number], self.at[number], self.ready[number] = self.host.remote(self.spec), None, False
        self.held[self.actors[number].ready.remote()] = (None, number)

    def run(self) -> None:
        import ray

        while self.ledger.homes or any(unit_id is not None for unit_id, _ in self.held.values()):
            (finished, *_), _ = ray.wait(list(self.held), num_returns=1)
            number = self.held[finished][1]
            if not self._settle(finished):
                self._worker_died(number)
            for _ in range(IN_FLIGHT):
                for each in range(len(self.actors)):  # a split can leave more to do than one actor asked for
                    self._feed(each)

    def _feed(self, number: int) -> None:
        holds = [unit_id for unit_id, holder in self.held.values() if holder == number]
        if not self.ready[number] or len(holds) >= IN_FLIGHT or any(self.ledger.deaths[held] for held in holds):
            return
        if (taken := self.ledger.take(self.at[number], idle=not holds)) is None:
            return
        unit_id, upcoming = taken
        unit = self.ledger.units[unit_id]
        self.at[number] = getattr(unit, "home", None)
        self.held[self.actors[number].run.remote(unit, upcoming)] = (unit_id, number)

    def _settle(self, reference: Any) -> bool:
        """Take a ready result in; False, leaving it held, when its worker died instead."""
        import ray

        unit_id, number = self.held[reference]
        try:
            result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            del self.held[reference]
            cause = error.cause if error.cause is not None else error
            if _is_final(cause):
                raise cause from None
            self.at[number] = None
            self.ledger.fail(unit_id, Failure.of(cause, str(error)))
        except ray.exceptions.RayError as error:
            self.death = error
            return False
        else:
            del self.held[reference]
            if unit_id is None:
                self.ready[number], self.unborn = True, 0
                return True
            if isinstance(result, Partial):
                self.at[number] = None
            self.ledger.settle(unit_id, result)
        return True

    def _worker_died(self, number: int) -> None:
        """Replace the actor; requeue at the back what it held. Only the unit that ran, the oldest, counts an attempt."""
        import ray

        references = [reference for reference, held in self.held.items() if held[1] == number]
        # Results that arrived before the death are whole.
        lost = [reference for reference in references if not self._settle(reference)]
        units = [self.held.pop(reference)[0] for reference in lost]
        if not self.ready[number]:
            self.unborn += 1
            if self.unborn >= MAX_ATTEMPTS * len(self.actors):
                raise UnitsFailed(f"workers die before they are ready: {reason(self.death)}")
            units = []
        for unit_id in units[1:]:
            self.ledger.wait(unit_id)
        for unit_id in units[:1]:
            of_memory = isinstance(self.death, ray.exceptions.OutOfMemoryError)
            why = f"killed {MAX_ATTEMPTS} workers: {reason(self.death)}"
            self.ledger.died(unit_id, Failure(why, str(self.death), MAX_ATTEMPTS, of_memory))
        ray.kill(self.actors[number])
        self._start(number)
