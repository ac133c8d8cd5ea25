"""Visual token pruning for vision-language models: methods, schedules, models, benchmarks."""

from importlib import import_module
from typing import Any

UNPRUNED = "unpruned"  # the method every retention is measured against


def __getattr__(name: str) -> Any:
    """``nuwa.generate`` is imported when it is first used, so that ``import nuwa`` stays light."""
    if name == "generate":
        return import_module("nuwa.generation").generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
