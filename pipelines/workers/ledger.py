"""Which units wait, what became of the others, and when what failed is too much; see :mod:`pipelines.workers.policy`.

Beside ``run``'s arguments a unit may offer, each optional:

* ``home``: units of one home are given to one worker as long as there are any, because they read the same data;
* ``split()``: smaller units that come to the same, by id; none where nothing can be split;
* ``flops``: what it costs, for the forecast of its time;
* ``suspects``: where a unit cannot be split, what it consists of (``trial``, its id) → what it was tried with;
* ``members``: everything that a unit which finished has cleared, in the words of ``suspects``;
* ``without(suspects)``: the unit without these, or null, and the units that were taken out of it, which have ``unit_id``
  and ``members``.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from nuwa.errors import UserError
from pipelines.workers.policy import Failure, Fault, Partial, Policy

GivenUp = dict[str, tuple[Any, Failure]]  # unit id → the unit, and why it was given up
OnDone = Callable[[str, Any], None]
Suspect = tuple[str, str]  # kind, name

log = logging.getLogger(__name__)


class UnitsFailed(UserError, RuntimeError):
    """Some units did not finish; everything that did is kept, and a rerun does the rest."""


class Ledger:
    """The units of one run."""

    def __init__(self, units: Mapping[str, Any], on_done: OnDone, policy: Policy) -> None:
        self.units, self.on_done, self.policy = dict(units), on_done, policy
        self.homes: dict[Hashable, collections.deque[str]] = {}  # waiting units, first come first served within a home
        self.deferred: collections.deque[str] = collections.deque()  # for when nothing else waits
        self.given_up: GivenUp = {}
        self.causes = 0  # things given up, each counted once
        self.finished = 0
        self.failed_homes: set[Hashable] = set()  # a unit without a home counts as one
        self.deaths: collections.Counter[str] = collections.Counter()
        self.passing: dict[str, list[str]] = {}  # unit → machines on which input or output failed
        self.cleared: set[Suspect] = set()
        self.alone: dict[Suspect, set[str]] = {}  # failed alone, with what
        self.machines = 1  # that have workers
        self.failures = 0
        self.common: set[Suspect] | None = None  # trials of every unit that failed
        self.condemned: dict[Suspect, Failure] = {}
        for unit_id in units:
            self.wait(unit_id)

    @property
    def waiting(self) -> bool:
        return bool(self.homes or self.deferred)

    def wait(self, unit_id: str, *, first: bool = False) -> None:
        queue = self.homes.setdefault(getattr(self.units[unit_id], "home", None), collections.deque())
        (queue.appendleft if first else queue.append)(unit_id)

    def home_for(self, home: Hashable) -> Hashable | None:
        """Where a worker that has the data of ``home`` takes its next unit: there, else where most waits."""
        if home in self.homes:
            return home
        return max(self.homes, key=lambda other: len(self.homes[other]), default=None)

    def take(self, home: Hashable) -> tuple[str, Any] | None:
        """The next unit for a worker at ``home``, and the unit that would follow it."""
        while not self.homes and self.deferred:
            self.wait(self.deferred.popleft())
        home = self.home_for(home)
        if home not in self.homes:
            return None
        unit_id = self.homes[home].popleft()
        if not self.homes[home]:
            del self.homes[home]
        following = self.home_for(home)
        return unit_id, self.units[self.homes[following][0]] if following in self.homes else None

    def settle(self, unit_id: str, result: Any, machine: str = "") -> Failure | None:
        """Take in what a unit returned; the failure of what it could not do."""
        if isinstance(result, Partial):
            if result.result is not None:
                self._finish(unit_id, result.result, result.rest)
            self.units[unit_id] = result.rest
            self.fail(unit_id, result.failure, machine)
            return result.failure
        self._finish(unit_id, result)
        del self.units[unit_id]
        return None

    def _finish(self, unit_id: str, result: Any, rest: Any = None) -> None:
        """Count what is done of a unit: all but the trials of ``rest``, which had all of its examples."""
        self.finished += 1
        failed = {member for member in getattr(rest, "members", ()) if member[0] == "trial"}
        self.cleared.update(member for member in getattr(self.units[unit_id], "members", ()) if member not in failed)
        self.on_done(unit_id, result)

    def fail(self, unit_id: str, failure: Failure, machine: str = "") -> None:
        """A unit raised: what follows from the kind of fault."""
        if failure.fault == Fault.DEVICE:
            self.died(unit_id, failure)
            return
        if failure.fault == Fault.PASSING:
            tried = self.passing.setdefault(unit_id, [])
            tried.append(machine)
            if not self._lasts(tried):
                log.warning("unit %s meets a fault that may pass and is tried again: %s", unit_id, failure.reason)
                self.wait(unit_id)
                return
            if failure.stops:
                raise UnitsFailed(f"{failure.reason}; {len(tried)} attempts, the last on {machine or 'this machine'}")
        if failure.fault != Fault.MEMORY:
            self._refuse_if_hopeless(unit_id, failure)
        self._divide(unit_id, failure)

    def _lasts(self, tried: list[str]) -> bool:
        """Whether a fault that may pass was tried often enough, and on another machine where there is one."""
        attempts = self.policy.io_attempts
        elsewhere = self.machines < 2 or len(set(tried)) > 1
        return len(tried) >= attempts and (elsewhere or len(tried) >= 3 * attempts)

    def _refuse_if_hopeless(self, unit_id: str, failure: Failure) -> None:
        """Stop where nothing is finished and several homes failed.

        One bad image fails every unit of its home; only several homes speak of something that fails everywhere. Where
        all that failed holds the same trials, units without these are to be seen first.
        """
        unit = self.units[unit_id]
        self.failures += 1
        self.failed_homes.add(getattr(unit, "home", unit_id))
        trials = {member for member in getattr(unit, "members", ()) if member[0] == "trial"}
        self.common = trials if self.common is None else self.common & trials
        least = self.policy.hopeless_homes
        often = self.failures >= self.policy.hopeless_failures and len(self.failed_homes) > 1

        if self.finished or not (often or max(len(self.failed_homes), len(self.condemned)) >= least):
            return
        explained = len(self.condemned) < least and any(
            self.common and self.common.isdisjoint(getattr(self.units[other], "members", ()))
            for queue in self.homes.values()
            for other in queue
        )
        if often or not explained:
            raise UnitsFailed(
                f"the first {least} units all failed, so the run stops: {failure.reason}\n{failure.detail}"
            )

    def died(self, unit_id: str, failure: Failure) -> None:
        """A unit's worker is gone: try it again at the back of the queue, and split one that keeps killing."""
        self.deaths[unit_id] += 1
        attempts = self.policy.unit_attempts
        if self.deaths[unit_id] < attempts and failure.fault != Fault.MEMORY:
            log.warning(
                "unit %s is tried again (%d of %d): %s", unit_id, self.deaths[unit_id] + 1, attempts, failure.reason
            )
            self.wait(unit_id)
            return
        killed = failure.fault != Fault.MEMORY
        why = f"killed {attempts} workers: {failure.reason}" if killed else failure.reason
        self._divide(unit_id, Failure(why, failure.detail, self.deaths[unit_id], failure.fault))

    def _divide(self, unit_id: str, failure: Failure) -> None:
        unit = self._without_condemned(unit_id)
        if unit is None:
            return
        parts = self._apart(unit) or (unit.split() if hasattr(unit, "split") else {})
        if parts:
            log.warning("unit %s is split and tried again: %s", unit_id, failure.reason)
        else:
            self._give_up(unit_id, unit, failure)
        # The halves come first: what fails alone is known soon, and with it what need not be tried.
        for part_id, part in reversed(parts.items()):
            self.units[part_id] = part
            # A part of what killed three workers gets one more try before it is split in turn.
            self.deaths[part_id] = self.policy.unit_attempts - 1 if self.deaths[unit_id] else 0
            self.wait(part_id, first=not self.deaths[unit_id])

    def _apart(self, unit: Any) -> dict[str, Any]:
        """``unit`` cut between what failed alone before, and never finished, and the rest; nothing where there is no such.

        Halves would find the same culprit again at each home, and leave the rest in small pieces.
        """
        suspected = self.alone.keys() & set(getattr(unit, "members", ())) - self.cleared
        if not suspected or not hasattr(unit, "without"):
            return {}
        rest, taken = unit.without(suspected)
        return {part.unit_id: part for part in (rest, *taken)} if taken and rest is not None else {}

    def _without_condemned(self, unit_id: str) -> Any | None:
        """Take a unit off the list, less what was given up meanwhile; null where nothing is left."""
        unit = self.units.pop(unit_id)
        return self._strip(unit, self.condemned) if self.condemned else unit

    def _strip(self, unit: Any, condemned: Mapping[Suspect, Failure]) -> Any | None:
        """``unit`` without what is condemned, which is given up with the reason that condemned it; whole where it cannot
        be taken apart."""
        if not hasattr(unit, "without"):
            return unit
        rest, taken = unit.without(condemned.keys())
        for part in taken:
            why = next(condemned[member] for member in part.members if member in condemned)
            self.given_up[part.unit_id] = (part, why)
        return rest

    def _give_up(self, unit_id: str, unit: Any, failure: Failure) -> None:
        self.given_up[unit_id] = (unit, failure)
        self.causes += 1
        for suspect, witness in getattr(unit, "suspects", {}).items():
            failed = self.alone.setdefault(suspect, set())
            failed.add(witness)
            never = suspect not in self.cleared and len(failed) >= self.policy.suspect_alone
            if suspect not in self.condemned and (never or len(failed) >= self.policy.suspect_failures):
                self._condemn(suspect, failure)
                break
        for suspect in getattr(unit, "suspects", {}):
            if suspect[0] == "trial" and not (suspect in self.cleared or suspect in self.condemned):
                self._defer(unit, suspect)
        if self.causes > self.policy.causes:
            raise UnitsFailed(
                f"more than {self.policy.causes} things were given up, so the run stops; finished work is kept. "
                f"The last: {_named(getattr(unit, 'suspects', {}), unit_id)}: {failure.reason}\n{failure.detail}"
            )

    def _defer(self, unit: Any, suspect: Suspect) -> None:
        """Let a trial that failed alone wait at this home: what it does at others tells whether the rest is worth a try."""
        home = getattr(unit, "home", None)
        kept: collections.deque[str] = collections.deque()
        for unit_id in self.homes.pop(home, ()):
            (self.deferred if suspect in getattr(self.units[unit_id], "members", ()) else kept).append(unit_id)
        if kept:
            self.homes[home] = kept

    def _condemn(self, suspect: Suspect, failure: Failure) -> None:
        """Give up what waits of a trial, an example or an image; it counts as one thing from here on."""
        kind, name = suspect
        count = len(self.alone[suspect])
        log.warning("%s %s is given up after it failed alone %d times: %s", kind, name, count, failure.reason)
        why = Failure(failure.reason, f"{kind} {name} was given up, untried here\n{failure.detail}", 0, failure.fault)
        self.condemned[suspect] = why
        self.causes -= count - 1
        self.failed_homes.clear()
        self.common = None
        self.deferred = self._stripped(self.deferred, {suspect: why})
        for home in list(self.homes):
            self.homes[home] = self._stripped(self.homes[home], {suspect: why})
            if not self.homes[home]:
                del self.homes[home]

    def _stripped(self, queue: Iterable[str], condemned: Mapping[Suspect, Failure]) -> collections.deque[str]:
        """The units of ``queue`` less what is condemned; those of which nothing is left are taken off the list."""
        kept: collections.deque[str] = collections.deque()
        for unit_id in queue:
            rest = self._strip(self.units.pop(unit_id), condemned)
            if rest is not None:
                self.units[unit_id] = rest
                kept.append(unit_id)
        return kept

    def leave(self, why: str) -> None:
        """Give up all that waits, untried: the run ends here."""
        for queue in (*self.homes.values(), self.deferred):
            for unit_id in queue:
                self.given_up[unit_id] = (self.units.pop(unit_id), Failure(why, why, 0, Fault.LEFT))
        self.homes.clear()
        self.deferred.clear()


def _named(suspects: Iterable[Suspect], unit_id: str) -> str:
    return ", ".join(f"{kind} {name}" for kind, name in suspects) or f"unit {unit_id}"
