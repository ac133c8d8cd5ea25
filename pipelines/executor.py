"""Runs work units on workers that each hold a model: in this process, or as Ray actors on a machine or a cluster.

A worker specification is a small picklable object whose ``build()`` makes the worker; a worker's ``run(unit)`` does
one unit. Units may run more than once (a worker died before its answer arrived), so they must be idempotent.
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

MAX_ATTEMPTS = 3  # a unit that killed this many workers is set aside
IN_FLIGHT = 2  # units an actor holds: one running, one waiting
HOPELESS = 3  # the first units all failing this often with no success stops the run
OBJECT_STORE_BYTES = 200 * 1024**2  # results travel as files, so the store stays small

log = logging.getLogger(__name__)


class Worker(Protocol):
    def run(self, unit: Any) -> Any: ...


class WorkerSpec(Protocol):
    def build(self) -> Worker: ...


@dataclass(frozen=True)
class Failure:
    """A unit that was given up: the last line says what happened, ``detail`` holds the trace."""

    reason: str
    detail: str
    attempts: int


class UnitsFailed(RuntimeError):
    """Some units did not finish; everything that did is kept, and a rerun does the rest."""


class ClusterUnavailable(RuntimeError):
    """Ray did not start, or the cluster could not be joined."""


OnDone = Callable[[str, Any], None]


def run_units(
    spec: WorkerSpec, units: Mapping[str, Any], cluster: ClusterSettings, on_done: OnDone, *, in_process: bool = False
) -> dict[str, Failure]:
    """Run all ``units`` (id → unit); call ``on_done(id, result)`` in this process as each finishes.

    Returns the units that failed. ``in_process`` needs no Ray and gives the same results.
    """
    if not units:
        return {}
    if in_process:
        return _run_here(spec, units, on_done)
    return _run_on_ray(spec, units, cluster, on_done)


def _run_here(spec: WorkerSpec, units: Mapping[str, Any], on_done: OnDone) -> dict[str, Failure]:
    worker, failures, finished = spec.build(), {}, 0
    for unit_id, unit in units.items():
        try:
            result = worker.run(unit)
        except Exception as error:
            failures[unit_id] = Failure(_reason(error), traceback.format_exc(), 1)
            _stop_if_hopeless(failures, finished)
            continue
        finished += 1
        on_done(unit_id, result)
    return failures


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _stop_if_hopeless(failures: Mapping[str, Failure], finished: int) -> None:
    if not finished and len(failures) >= HOPELESS:
        first = next(iter(failures.values()))
        raise UnitsFailed(
            f"the first {len(failures)} units all failed, so the run stops: {first.reason}\n{first.detail}"
        )


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
            f"Ray did not start or join {where}: {_reason(error)}; see cluster.address and RAY_ADDRESS"
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

    def run(self, unit: Any) -> Any:
        return self.worker.run(unit)


def _run_on_ray(
    spec: WorkerSpec, units: Mapping[str, Any], cluster: ClusterSettings, on_done: OnDone
) -> dict[str, Failure]:
    ours = start_ray(cluster)
    import ray

    _check_resources(cluster, ray.nodes())

    host = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus)(_Host)
    actors = [host.remote(spec) for _ in range(min(cluster.workers, len(units)))]
    try:
        return _Dispatch(host, spec, actors, units, on_done).run()
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


class _Dispatch:
    """The loop that keeps every actor busy, replaces dead ones and retries what they held."""

    def __init__(
        self, host: Any, spec: WorkerSpec, actors: list[Any], units: Mapping[str, Any], on_done: OnDone
    ) -> None:
        self.host, self.spec, self.actors, self.units, self.on_done = host, spec, actors, units, on_done
        self.queue = collections.deque(units)
        self.attempts: collections.Counter[str] = collections.Counter()
        self.held: dict[Any, tuple[str, int]] = {}  # result reference → unit, actor number; oldest first
        self.death: Exception | None = None
        self.failures: dict[str, Failure] = {}
        self.finished = 0

    def run(self) -> dict[str, Failure]:
        import ray

        for _ in range(IN_FLIGHT):
            for number in range(len(self.actors)):
                self._feed(number)
        while self.held:
            (ready, *_), _ = ray.wait(list(self.held), num_returns=1)
            number = self.held[ready][1]
            if not self._settle(ready):
                self._worker_died(number)
            self._feed(number)
        return self.failures

    def _feed(self, number: int) -> None:
        if self.queue:
            unit_id = self.queue.popleft()
            self.held[self.actors[number].run.remote(self.units[unit_id])] = (unit_id, number)

    def _settle(self, reference: Any) -> bool:
        """Take a ready result in; False, leaving it held, when its worker died instead."""
        import ray

        unit_id, _ = self.held[reference]
        try:
            result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            del self.held[reference]
            self._fail(unit_id, error.cause if error.cause is not None else error, str(error))
        except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
            self.death = error
            return False
        else:
            del self.held[reference]
            self.finished += 1
            self.on_done(unit_id, result)
        return True

    def _fail(self, unit_id: str, error: BaseException, detail: str) -> None:
        """An exception in the unit itself would come again: it is recorded, not retried."""
        self.failures[unit_id] = Failure(_reason(error), detail, self.attempts[unit_id] + 1)
        _stop_if_hopeless(self.failures, self.finished)

    def _worker_died(self, number: int) -> None:
        """Replace the actor; requeue at the back what it held. Only the unit that ran, the oldest, counts an attempt."""
        import ray

        references = [reference for reference, held in self.held.items() if held[1] == number]
        # Results that arrived before the death are whole.
        lost = [reference for reference in references if not self._settle(reference)]
        ran, *waiting = [self.held.pop(reference)[0] for reference in lost]
        self.queue.extend(waiting)
        self.attempts[ran] += 1
        if self.attempts[ran] >= MAX_ATTEMPTS:
            reason = f"killed {MAX_ATTEMPTS} workers: {_reason(self.death)}"
            self.failures[ran] = Failure(reason, str(self.death), MAX_ATTEMPTS)
            _stop_if_hopeless(self.failures, self.finished)
        else:
            log.warning("a worker died; unit %s is tried again (%d of %d)", ran, self.attempts[ran] + 1, MAX_ATTEMPTS)
            self.queue.append(ran)
        ray.kill(self.actors[number])
        self.actors[number] = self.host.remote(self.spec)
        for _ in range(len(references) - 1):
            self._feed(number)
