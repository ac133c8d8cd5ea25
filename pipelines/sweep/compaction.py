"""Small units of a store, put together: fewer files to list, to open and to read.

Units of the same trials and provenance whose questions differ become one, which says in its footer what it replaces. Until
it is whole nothing has changed; from then on the units it replaces count no more, but stay as files until the new one is
of an age: another driver that listed the store before may be reading them. They are removed by a later call, which reads
the new one first, page by page. Everything follows from what the store holds, so several calls at once make the same files.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import pyarrow as pa

from pipelines.files.lines import tell
from pipelines.files.storage import LEFTOVER_S
from pipelines.sweep.results import PARTS, DamagedUnit, ResultStore, StoredUnit, file_of, unit_name

MOST_ANSWERS = 2**16  # of a unit that is put together
MOST_EXAMPLES = 2**12  # likewise: its footer lists them


@dataclass(frozen=True)
class Compacted:
    """How many units were ``made`` of how many ``small`` ones, how many replaced ones were ``removed`` and ``wait`` to be."""

    made: int
    small: int
    removed: int
    wait: int


def compact(store: ResultStore, *, age_s: float = LEFTOVER_S) -> Compacted:
    """Put small units together, and remove those that were replaced at least ``age_s`` seconds ago.

    One that is damaged is moved aside and told, and the others of its group wait for the next call. Raises
    :class:`StorageFull` and :class:`StorageUnavailable`.
    """
    present = {unit.unit: unit for unit in store.present()}
    # A unit that was put together twice is replaced by both, and may replace others itself.
    removed = set[str]()
    for unit in present.values():
        if unit.unit not in removed:
            removed |= _remove_replaced(store, unit, present.keys() - removed, age_s)
    replaced = {name for unit in present.values() for name in unit.replaces}
    made = small = 0

    for group in _groups([unit for unit in present.values() if unit.unit not in replaced]):
        try:
            _put_together(store, group)
        except DamagedUnit as error:
            tell(str(error))
            continue
        made, small = made + 1, small + len(group)
    return Compacted(made, small, len(removed), len((replaced & present.keys()) - removed) + small)


def _remove_replaced(store: ResultStore, unit: StoredUnit, present: Set[str], age_s: float) -> set[str]:
    """Remove what ``unit`` replaces, if that was long ago and it can be read from end to end; returns what is removed."""
    there = {name for name in unit.replaces if name in present}
    if not there or not store.storage.is_old(file_of(unit.unit), age_s):
        return set()
    try:
        store.read(unit.unit)
    except DamagedUnit as error:
        tell(str(error))
        return set()
    for name in there:
        store.remove(name)
    return there


def _groups(units: Sequence[StoredUnit]) -> Iterator[list[StoredUnit]]:
    """Two units or more that make one, by name; those that are large already stay."""
    alike: dict[tuple[tuple[str, ...], str | None], list[StoredUnit]] = collections.defaultdict(list)
    for unit in sorted(units):
        alike[unit.trials, unit.provenance].append(unit)

    for (trials, _), members in alike.items():
        most = max(1, min(MOST_EXAMPLES, MOST_ANSWERS // len(trials)))
        group: list[StoredUnit] = []
        asked: set[str] = set()
        for unit in members:
            # A large one would be written again and again for a few more questions.
            if len(unit.examples) > most // 2 or not asked.isdisjoint(unit.examples):
                continue
            if len(asked) + len(unit.examples) > most:
                yield from [group] if len(group) > 1 else []
                group, asked = [], set()
            group.append(unit)
            asked.update(unit.examples)
        yield from [group] if len(group) > 1 else []


def _put_together(store: ResultStore, group: Sequence[StoredUnit]) -> None:
    """Write the unit that ``group`` makes."""
    tables = list(store.read_all(unit.unit for unit in group))
    trials, provenance = group[0].trials, group[0].provenance
    examples = tuple(example for unit in group for example in unit.examples)
    replaces = tuple(sorted({name for unit in group for name in (unit.unit, *unit.replaces)}))
    made = StoredUnit(unit_name(trials, examples), trials, examples, provenance, replaces)
    store.write(made, {part: pa.concat_tables([held[part] for held in tables]) for part in PARTS})
