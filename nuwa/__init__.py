"""Visual token pruning for vision-language models: methods, schedules, models, benchmarks."""

from importlib import import_module
from typing import Any

from nuwa.versions import check_transformers

check_transformers()  # before anything of it is imported

UNPRUNED = "unpruned"  # the method every retention is measured against


# What is imported when it is first used, so that ``import nuwa`` stays light: name → its module.
_ON_DEMAND = {
    "Failure": "nuwa.library",
    "Generation": "nuwa.generation",
    "Options": "nuwa.library",
    "generate": "nuwa.library",
    "stream": "nuwa.library",
}
__all__ = ["UNPRUNED", "Failure", "Generation", "Options", "generate", "methods", "stream"]


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(import_module(_ON_DEMAND[name]), name)
    if name == "methods":
        return import_module("nuwa.methods")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
