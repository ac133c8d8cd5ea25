"""Stage-1 methods: which visual tokens leave the vision encoder, and what they carry.

A method is one file of this folder: a frozen dataclass of its hyper-parameters and a pure function
``select(signals, keep, config, seed) -> Selection`` under :func:`register`. Every file is imported here.
"""

import importlib
import pkgutil

from nuwa.stage1.registry import METHODS, Method, get_method, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method", "get_method", "register"]
