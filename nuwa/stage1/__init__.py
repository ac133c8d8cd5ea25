"""Stage-1 methods: which visual tokens leave the vision encoder, and what they carry.

A method is one file: a frozen dataclass of its hyper-parameters and a pure function
``select(signals, keep, config, seed) -> Selection`` under :func:`register`.
"""

from nuwa.stage1 import (  # noqa: F401  (each registers itself)
    divprune,
    learnpruner,
    nuwa,
    pooling,
    prumerge,
    random,
    uniform,
    unpruned,
    visionzip,
    vispruner,
)
from nuwa.stage1.registry import METHODS, Method, get_method, register

__all__ = ["METHODS", "Method", "get_method", "register"]
