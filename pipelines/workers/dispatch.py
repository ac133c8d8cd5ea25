"""The loop that keeps every worker busy, replaces those that fail and gives what they held to others."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipelines.files.lines import tell
from pipelines.workers.host import Host, Place, WorkerSpec
from pipelines.workers.joining import Capacity, ClusterUnavailable, start_ray
from pipelines.workers.ledger import GivenUp, Ledger, OnDone, UnitsFailed
from pipelines.workers.policy import Allowance, Failure, Fault, Partial, Policy, reason, stops_the_run

if TYPE_CHECKING:
    from pipelines.settings import ClusterSettings


def run_units(
    spec: WorkerSpec,
    units: Mapping[str, Any],
    cluster: ClusterSettings,
    on_done: OnDone,
    *,
    in_process: bool = False,
    allowance: Allowance | None = None,
    policy: Policy | None = None,
) -> GivenUp:
    """Run all ``units`` (id → unit); call ``on_done(id, result)`` in this process as each finishes.

    Returns the units that were given up. ``in_process`` needs no Ray and gives the same results. ``allowance``:
    what workers may take together, and took; when it is spent, no unit is begun any more. Raises
    :class:`UnitsFailed` where everything or too much fails, :class:`ClusterUnavailable` where there is no place for
    workers, and lets a full disk through.
    """
    if not units:
        return {}
    policy = policy or Policy(patience_s=cluster.patience, silence_s=cluster.silence)
    ledger = Ledger(units, on_done, policy)
    if in_process:
        _run_here(spec, ledger)
        return ledger.given_up
    ours = start_ray(cluster)
    import ray

    dispatch = None
    try:
        dispatch = Dispatch(spec, cluster, ledger, allowance)
        dispatch.run()
    finally:
        if dispatch is not None:
            dispatch.end()
        if ours:
            ray.shutdown()
    return ledger.given_up


def _run_here(spec: WorkerSpec, ledger: Ledger) -> None:
    worker, home = spec.build(), None
    while (taken := ledger.take(home)) is not None:
        unit_id, upcoming = taken
        unit = ledger.units[unit_id]
        try:
            result = worker.run(unit, upcoming)
        except Exception as error:
            failure = Failure.of(error)
            if stops_the_run(error):
                raise
            ledger.fail(unit_id, failure)
            home = None
        else:
            ledger.settle(unit_id, result)
            home = None if isinstance(result, Partial) else getattr(unit, "home", None)


@dataclass(kw_only=True)
class Slot:
    """A place for one worker among those of the run. Times on the dispatcher's clock."""

    actor: Any = None
    place: Place | None = None
    ready: bool = False
    parked: bool = False  # left where it is, without work, so that nobody gets its device
    unit: str | None = None
    home: Any = None
    reference: Any = None  # of what it is at
    since: float = 0.0  # it is at that, or waits
    rests_until: float = 0.0
    failures: int = 0  # in a row, without a finished unit
    starts_failed: int = 0  # in a row
    passing: int = 0  # faults of input or output in a row
    memory: int = 0  # units in a row for which memory ran out
    last: Failure | None = None


@dataclass
class PlaceRecord:
    """Workers in a row that failed at one place, or died on one machine, without finishing a unit."""

    failures: int = 0
    last: Failure | None = field(default=None)


class Dispatch:
    """Workers of one run. ``clock``: seconds from any start."""

    def __init__(
        self,
        spec: WorkerSpec,
        cluster: ClusterSettings,
        ledger: Ledger,
        allowance: Allowance | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        import ray

        self.ray, self.spec, self.cluster, self.ledger = ray, spec, cluster, ledger
        self.policy, self.clock, self.allowance = ledger.policy, clock, allowance
        self.capacity = Capacity(cluster)
        self.capacity.refuse_impossible()
        self.host = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus)(Host)
        self.slots: list[Slot] = []
        self.devices: dict[Place, PlaceRecord] = {}
        self.nodes: dict[str, PlaceRecord] = {}
        self.seconds = self.costs = 0.0  # of finished units
        self.looked = self.told = self.without_workers = self.counted = clock()
        self._size(first=True)

    # --- how many workers -------------------------------------------------------------------------------------------

    def _wanted(self) -> int:
        work = len(self.ledger.units)
        if self.cluster.workers != "auto":
            return min(self.cluster.workers, work)
        return max(1, min(self.capacity.now() + self.capacity.to_come(), work))

    def _size(self, *, first: bool = False) -> None:
        """Have as many slots as are wanted; only workers that are not placed yet are taken away."""
        wanted, active = self._wanted(), [slot for slot in self.slots if not slot.parked]
        for _ in range(wanted - len(active)):
            slot = Slot()
            self.slots.append(slot)
            self._start(slot)
        if self.cluster.workers == "auto":
            spare = [slot for slot in active if slot.place is None and slot.unit is None][
                : max(0, len(active) - wanted)
            ]
            for slot in spare:
                self._kill(slot)
                self.slots.remove(slot)
        if first:
            self._say_size(wanted)

    def _say_size(self, wanted: int) -> None:
        """What a user would otherwise wonder about: idle machines, or workers that wait."""
        room = self.capacity.now()
        if self.cluster.workers != "auto" and wanted == self.cluster.workers and 0 < room != wanted:
            what = (
                f"{room - wanted} more would fit; cluster.workers: auto takes them all"
                if room > wanted
                else f"the others start when there is room: {self.capacity.says()}"
            )
            tell(f"workers: {wanted} asked for, the cluster holds {room} now; {what}")

    # --- a worker's life --------------------------------------------------------------------------------------------

    def _start(self, slot: Slot) -> None:
        options = {}
        if self.capacity.retired:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self.capacity.retired))})"}
        slot.actor = self.host.options(**options).remote(self.spec, os.getcwd())
        slot.place, slot.ready, slot.unit, slot.home = None, False, None, None
        slot.passing = slot.memory = 0
        slot.reference, slot.since = slot.actor.place.remote(), self.clock()

    def _kill(self, slot: Slot) -> None:
        if slot.actor is not None:
            with contextlib.suppress(Exception):  # it may be gone
                self.ray.kill(slot.actor)
        slot.actor = slot.reference = slot.place = None
        slot.ready = False

    def end(self) -> None:
        for slot in self.slots:
            self._kill(slot)

    def _replace(self, slot: Slot, failure: Failure) -> None:
        """Have another worker in the slot's stead, after a pause if this is not the first to go."""
        slot.failures += 1
        slot.last = failure
        if self._leave_in_place(slot, failure):
            return
        self._kill(slot)
        slot.rests_until = self.clock() + self.policy.pause(slot.failures)

    def _leave_in_place(self, slot: Slot, failure: Failure) -> bool:
        """Whether the worker stays where it is, without work: its device failed those before it too."""
        if slot.place is None:
            return False
        record = self.devices.setdefault(slot.place, PlaceRecord())
        node = self.nodes.setdefault(slot.place.node, PlaceRecord())
        for each in (record, node):
            each.failures, each.last = each.failures + 1, failure

        most = self.policy.place_failures
        if failure.fault == Fault.DEVICE and slot.place.devices and record.failures >= most:
            tell(
                f"{slot.place.machine}, {', '.join(slot.place.devices)}: {most} workers in a row failed there, last: "
                f"{failure.reason}; it gets no more work in this run"
            )
            slot.parked, slot.ready, slot.reference, slot.unit = True, False, None, None
            return True

        # A machine whose other workers run has no fault of its own.
        others = any(each.place and each.place.node == slot.place.node for each in self.slots if each is not slot)
        if node.failures >= most and not others and slot.place.node not in self.capacity.retired:
            self._retire(slot.place, failure)
        return False

    def _retire(self, place: Place, failure: Failure) -> None:
        """Put no worker on this machine any more, unless there is none beside it."""
        if self.capacity.machines() < 2 and not self.capacity.autoscales():
            return
        self.capacity.retired.add(place.node)
        tell(
            f"{place.machine}: {self.policy.place_failures} workers in a row failed there, last: {failure.reason}; no "
            "worker is put there any more in this run"
        )

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while self.ledger.waiting or any(slot.unit is not None for slot in self.slots):
            self._look()
            references = [slot.reference for slot in self.slots if slot.reference is not None]
            done = []
            if references:
                done, _ = self.ray.wait(references, num_returns=1, timeout=self._until_something())
            else:
                time.sleep(min(self._until_something(), 1.0))
            if done:
                slot = next(slot for slot in self.slots if slot.reference == done[0])
                self._settle(slot)
            for slot in self.slots:
                if slot.reference is not None and self._is_silent(slot):
                    self._give_way(slot)
            for slot in self.slots:
                self._feed(slot)

    def _look(self) -> None:
        """Start what is due, count what was used, and see whether there is any worker at all."""
        now = self.clock()
        working = [slot for slot in self.slots if slot.ready and not slot.parked]
        used, self.counted = (now - self.counted) * len(working) * (self.cluster.gpus or 1) / 3600, now
        self.ledger.machines = len({slot.place.node for slot in working if slot.place})
        if self.allowance is not None:
            self.allowance.used += used
            if self.allowance.spent and self.ledger.waiting:
                self.ledger.leave(f"sweep.gpu_hours = {self.allowance.gpu_hours:g} are used")

        for slot in self.slots:
            if slot.actor is None and slot.rests_until <= now and self.ledger.waiting:
                self._start(slot)
        if working:
            self.without_workers = now
        else:
            self._refuse_if_none_starts(now)

        if now - self.looked >= self.policy.look_every_s:
            self.looked = now
            self._size()

    def _refuse_if_none_starts(self, now: float) -> None:
        active = [slot for slot in self.slots if not slot.parked]
        if all(slot.starts_failed >= self.policy.start_attempts for slot in active):
            last = next((slot.last for slot in active if slot.last), None)
            if last is None:
                raise UnitsFailed("no device is left that works; the lines above name them")
            raise UnitsFailed(
                f"no worker can be started, {self.policy.start_attempts} attempts each: {last.reason}\n{last.detail}"
            )
        waited = now - self.without_workers

        if any(slot.place is not None for slot in active):
            return  # a model is being loaded
        if waited >= self.policy.patience_s:
            raise ClusterUnavailable(
                f"no worker came up in {waited:.0f} s (cluster.patience = {self.policy.patience_s:g}): "
                f"{self.capacity.says()}; finished work is kept"
            )
        if now - max(self.told, self.without_workers) >= self.policy.tell_every_s:
            self.told = now
            tell(
                f"waiting for {len(active)} workers, {waited:.0f} of {self.policy.patience_s:g} s: {self.capacity.says()}"
            )

    def _until_something(self) -> float:
        """Seconds until something is due that no worker tells."""
        now = self.clock()
        due = [self.policy.look_every_s]
        due += [slot.rests_until - now for slot in self.slots if slot.rests_until > now]
        due += [self._deadline(slot) - now for slot in self.slots if slot.unit is not None]
        return max(0.01, min(due))

    def _deadline(self, slot: Slot) -> float:
        each = self.seconds / self.costs if self.costs else None
        unit = self.ledger.units.get(slot.unit) if slot.unit is not None else None
        cost = getattr(unit, "flops", 0.0)
        return slot.since + self.policy.deadline(cost, each)

    def _is_silent(self, slot: Slot) -> bool:
        """Past the deadline of its unit; for loading a model, past twice the least one."""
        if slot.unit is not None:
            return self.clock() > self._deadline(slot)
        return slot.place is not None and self.clock() > slot.since + 2 * self.policy.silence_s

    def _give_way(self, slot: Slot) -> None:
        """Kill a silent worker; what it held is tried again."""
        took = self.clock() - slot.since
        where = slot.place.machine if slot.place else "a machine"
        failure = Failure(f"a worker on {where} was silent for {took:.0f} s", "", 1, Fault.RAISED, spent=True)
        tell(f"{failure.reason}; it is replaced")
        if slot.unit is not None:
            self.ledger.died(slot.unit, failure)
        else:
            slot.starts_failed += 1
        slot.unit = None
        self._replace(slot, failure)

    def _feed(self, slot: Slot) -> None:
        if not slot.ready or slot.parked or slot.unit is not None or slot.rests_until > self.clock():
            return
        if (taken := self.ledger.take(slot.home)) is None:
            return
        slot.unit, upcoming = taken
        unit = self.ledger.units[slot.unit]
        slot.home, slot.since = getattr(unit, "home", None), self.clock()
        slot.reference = slot.actor.run.remote(unit, upcoming)

    # --- what workers tell ------------------------------------------------------------------------------------------

    def _settle(self, slot: Slot) -> None:
        """Take in what a worker answered, or that it will not answer any more."""
        reference, slot.reference = slot.reference, None
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            failure = Failure.of(cause, str(error))
            if failure.stops and failure.fault != Fault.PASSING:
                raise cause from None
            self._failed(slot, failure)
        except self.ray.exceptions.RayError as error:
            self._died(slot, error)
        else:
            self._answered(slot, result)

    def _answered(self, slot: Slot, result: Any) -> None:
        if slot.place is None:
            slot.place, slot.since = result, self.clock()
            slot.reference = slot.actor.build.remote()
        elif not slot.ready:
            slot.ready, slot.starts_failed = True, 0
        else:
            unit_id, slot.unit = slot.unit, None
            assert unit_id is not None, "a worker that is ready answers a unit"
            cost, took = getattr(self.ledger.units[unit_id], "flops", 0.0), self.clock() - slot.since
            failure = self.ledger.settle(unit_id, result, slot.place.machine)
            if failure is None:
                self.seconds, self.costs = self.seconds + took, self.costs + cost
                slot.failures = slot.passing = slot.memory = 0
                self.devices.pop(slot.place, None)
                self.nodes.pop(slot.place.node, None)
            else:
                self._after(slot, failure)

    def _failed(self, slot: Slot, failure: Failure) -> None:
        """What a worker was at has raised."""
        if not slot.ready:
            slot.starts_failed += 1
            machine = slot.place.machine if slot.place else "a machine"
            failure = replace(failure, reason=f"a worker on {machine} cannot start: {failure.reason}")
            tell(failure.reason)
            self._replace(slot, failure)
            return
        unit_id, slot.unit = slot.unit, None
        assert unit_id is not None and slot.place is not None, "a worker that is ready stands somewhere and has a unit"
        self.ledger.fail(unit_id, failure, slot.place.machine)
        self._after(slot, failure)

    def _after(self, slot: Slot, failure: Failure) -> None:
        """What a failed unit means for its worker."""
        slot.home = None
        slot.memory = slot.memory + 1 if failure.fault == Fault.MEMORY else 0
        slot.passing = slot.passing + 1 if failure.fault == Fault.PASSING else 0
        if failure.spent or slot.memory >= self.policy.memory_in_a_row:
            self._replace(slot, failure)
        elif slot.passing:
            slot.rests_until = self.clock() + self.policy.pause(slot.passing + 1)

    def _died(self, slot: Slot, error: Exception) -> None:
        of_memory = isinstance(error, self.ray.exceptions.OutOfMemoryError)
        failure = Failure(reason(error), str(error), 1, Fault.MEMORY if of_memory else Fault.RAISED, spent=True)
        unit_id, slot.unit = slot.unit, None
        lost = isinstance(error, self.ray.exceptions.NodeDiedError) or not self._node_lives(slot)
        if unit_id is not None:
            self.ledger.died(unit_id, failure)
        elif slot.place is not None and not lost:
            slot.starts_failed += 1
        if lost:  # no fault of the worker: another starts as soon as there is room
            self._kill(slot)
            return
        self._replace(slot, failure)

    def _node_lives(self, slot: Slot) -> bool:
        if slot.place is None:
            return True
        return any(node["Alive"] and node["NodeID"] == slot.place.node for node in self.ray.nodes())
