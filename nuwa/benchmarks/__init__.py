"""Benchmarks as data: one file a benchmark, each with its published schema, prompt, parser and score."""

from __future__ import annotations

import difflib

from nuwa.benchmarks import (
    gqa,
    mmbench,
    mmbench_cn,
    mme,
    mmmu,
    mmvet,
    pope,
    refcoco,
    refcocog,
    refcocoplus,
    scienceqa,
    seedbench,
    textvqa,
    vqav2,
)
from nuwa.benchmarks.protocol import STYLES, Benchmark, Example, Sums, check_schema
from nuwa.benchmarks.records import RecordError, SchemaError, image_size

__all__ = [
    "BENCHMARKS",
    "STYLES",
    "Benchmark",
    "Example",
    "RecordError",
    "SchemaError",
    "Sums",
    "check_schema",
    "get_benchmark",
    "image_size",
]

# name → its variants, the default first
BENCHMARKS: dict[str, tuple[Benchmark, ...]] = {
    module.VARIANTS[0].name: module.VARIANTS
    for module in (
        *(refcoco, refcocoplus, refcocog),
        *(gqa, pope, textvqa, vqav2, scienceqa),
        *(mme, mmbench, mmbench_cn, seedbench, mmmu, mmvet),
    )
}


def get_benchmark(name: str, variant: str | None = None) -> Benchmark:
    """The benchmark called ``name``; its first variant unless another is named.

    Raises:
        ValueError: no such benchmark or variant; lists what exists and suggests the nearest.
    """
    if name not in BENCHMARKS:
        raise ValueError(_unknown("benchmark", name, list(BENCHMARKS)))
    variants = {benchmark.variant: benchmark for benchmark in BENCHMARKS[name]}
    if variant is None:
        return BENCHMARKS[name][0]
    if variant not in variants:
        raise ValueError(_unknown(f"variant of {name}", variant, [known for known in variants if known]))
    return variants[variant]


def _unknown(what: str, name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"no {what} is called {name!r}; {hint}there are: {', '.join(known) or 'none'}"
