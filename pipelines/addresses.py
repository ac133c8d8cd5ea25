"""How settings name benchmarks and the places of their tables.

A benchmark is named ``<benchmark>[/<split>][:<variant>][@<protocol>]``: ``pope``, ``refcoco/testA``,
``textvqa/validation:ocr``, ``gqa/testdev@lmms_eval``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from nuwa.benchmarks import TESTBED, Benchmark, get_benchmark

HUB = "hub:"


@dataclass(frozen=True)
class BenchmarkName:
    """``table``: name without variant and protocol, which starts every example's id."""

    name: str
    split: str | None
    variant: str | None
    protocol: str = TESTBED

    @classmethod
    def parse(cls, text: str) -> BenchmarkName:
        rest, _, protocol = text.partition("@")
        table, _, variant = rest.partition(":")
        name, _, split = table.partition("/")
        return cls(name, split or None, variant or None, protocol or TESTBED)

    def __str__(self) -> str:
        variant = f":{self.variant}" if self.variant else ""
        return f"{self.table}{variant}" + (f"@{self.protocol}" if self.protocol != TESTBED else "")

    @property
    def table(self) -> str:
        return f"{self.name}/{self.split}" if self.split else self.name

    def benchmark(self) -> Benchmark:
        """Raises ``ValueError`` that lists what exists."""
        return get_benchmark(self.name, self.variant, self.protocol)


def under_protocol(text: str, protocol: str) -> str:
    """The benchmark's name with ``protocol``, unless it names one of its own; the testbed's is never spelt out."""
    name = BenchmarkName.parse(text)
    return str(name if "@" in text else replace(name, protocol=protocol))


class HubAddress(NamedTuple):
    """``folder``: where in the dataset to look, ``""`` for all of it."""

    dataset: str
    folder: str
    commit: str


def hub_address(location: str) -> HubAddress | None:
    """The parts of ``hub:organisation/dataset/folder@commit``, the folder optional; None for a folder of this machine.

    Raises ``ValueError`` where the commit is missing: a dataset that moves is no record of a run.
    """
    if not location.startswith(HUB):
        return None
    name = r"\w[\w.-]*"
    match = re.fullmatch(rf"({name}/{name})((?:/\w[^/@]*)*)@({name})", location.removeprefix(HUB))
    if match is None:
        raise ValueError(
            f"{location!r} should read hub:organisation/dataset@commit, or hub:organisation/dataset/folder@commit where "
            "the dataset holds several configurations"
        )
    dataset, folder, commit = match.groups()
    return HubAddress(dataset, folder.removeprefix("/"), commit)
