"""Benchmarks as data: one file a benchmark, each with its published schema, prompt, parser, score and facts.

Every file of this folder is imported; one that has ``VARIANTS`` is a benchmark (docs/adding_a_benchmark.md).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from nuwa.benchmarks.definition import STYLES, Benchmark, Example, Rules, Sums, TableSize, check_schema
from nuwa.benchmarks.protocols import PROTOCOLS, TESTBED, Protocol, ProtocolError
from nuwa.benchmarks.records import RecordError, SchemaError, image_size
from nuwa.registry import Registry, UnknownName, unknown

__all__ = [
    "BENCHMARKS",
    "PROTOCOLS",
    "STYLES",
    "TESTBED",
    "Benchmark",
    "Example",
    "Protocol",
    "ProtocolError",
    "RecordError",
    "Rules",
    "SchemaError",
    "Sums",
    "TableSize",
    "check_schema",
    "get_benchmark",
    "image_size",
    "register_benchmark",
]


def read_folders(folders: Iterable[str]) -> Registry[tuple[Benchmark, ...]]:
    """The benchmarks whose files lie in ``folders``, in alphabetical order of the files: name → its variants, the
    default first. Raises :class:`nuwa.registry.NameTaken`."""
    registry: Registry[tuple[Benchmark, ...]] = Registry("benchmark")
    for file in pkgutil.iter_modules(list(folders)):
        variants = getattr(importlib.import_module(f"{__name__}.{file.name}"), "VARIANTS", ())
        if variants:
            registry.add(variants[0].name, variants)
    return registry


BENCHMARKS = read_folders(__path__)


def register_benchmark(*variants: Benchmark) -> None:
    """Make a benchmark of a plugin known, the default variant first; raises :class:`nuwa.registry.NameTaken`."""
    BENCHMARKS.add(variants[0].name, variants)


def get_benchmark(name: str, variant: str | None = None, protocol: str = TESTBED) -> Benchmark:
    """The benchmark called ``name`` as ``protocol`` asks and scores it; its first variant that the protocol knows
    unless another is named.

    Raises:
        UnknownName: no such benchmark, variant or protocol, or the protocol does not ask this benchmark; lists what
            exists and suggests the nearest.
    """
    variants = {benchmark.variant: benchmark for benchmark in BENCHMARKS.look_up(name)}
    PROTOCOLS.look_up(protocol)
    if variant is not None:
        if variant not in variants:
            raise UnknownName(unknown(f"variant of {name}", variant, [known for known in variants if known]))
        return variants[variant].under(protocol)
    known = [benchmark for benchmark in variants.values() if protocol in (TESTBED, *benchmark.rules)]
    if not known:
        protocols = {protocol for benchmark in variants.values() for protocol in benchmark.rules}
        raise UnknownName(unknown(f"protocol of {name}", protocol, (TESTBED, *protocols)))
    return known[0].under(protocol)
