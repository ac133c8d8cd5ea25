"""Names for things of one kind: methods, scorers, adapters, benchmarks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from nuwa.errors import UserError

Entry = TypeVar("Entry")


class UnknownName(UserError, ValueError):
    """A name that nothing is registered under; the line lists what exists and suggests the nearest."""


class NameTaken(UserError, ValueError):
    """A name that something else is registered under already."""


class Registry(Mapping[str, Entry], Generic[Entry]):
    """A read-only mapping of names to entries of one ``kind``, filled by :meth:`add`, in the order of filling."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self._followers: list[Callable[[str], object]] = []

    def add(self, name: str, entry: Entry) -> Entry:
        """Make ``entry`` known as ``name``; raises :class:`NameTaken` where the name is another's."""
        if name in self._entries and self._entries[name] is not entry:
            raise NameTaken(f"{self.kind} {name!r} is registered twice; choose another name for the second")
        self._entries[name] = entry
        for tell in self._followers:
            tell(name)
        return entry

    def follow(self, tell: Callable[[str], object]) -> None:
        """Call ``tell`` with the name of every entry, of those that are there and of those to come."""
        self._followers.append(tell)
        for name in list(self._entries):
            tell(name)

    def look_up(self, name: str) -> Entry:
        """The entry called ``name``; raises :class:`UnknownName`."""
        if name not in self._entries:
            raise UnknownName(unknown(self.kind, name, self._entries))
        return self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The line about a name that does not exist."""
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{kind} {name!r} is unknown; allowed: {', '.join(names) or 'none'}{hint}"
