"""Visual token pruning for vision-language models: methods, schedules, models, benchmarks."""

from importlib import import_module
from typing import Any

from nuwa.versions import check_transformers

check_transformers()  # before anything of it is imported

UNPRUNED = "unpruned"  # the method every retention is measured against


def __getattr__(name: str) -> Any:
    """``nuwa.generate`` and ``nuwa.methods`` are imported when first used, so that ``import nuwa`` stays light."""
    if name == "generate":
        return import_module("nuwa.generation").generate
    if name == "methods":
        return import_module("nuwa.methods")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
