"""Methods, scorers and benchmarks of one's own, in a package beside this one (docs/adding_a_plugin.md).

A plugin is any module that registers something when it is imported. A program imports it; the pipeline imports those that
``params.yaml`` names under ``plugins`` and those that installed packages offer as entry points of the group ``nuwa.plugins``.
"""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from nuwa.errors import UserError, in_one_line
from nuwa.source import PACKAGE, closure, digest_of

GROUP = "nuwa.plugins"


class PluginError(UserError, ImportError):
    """A plugin that is not there, or that raises when it is imported."""


def plugin_modules(names: Iterable[str] = ()) -> tuple[str, ...]:
    """The modules of ``names`` and of entry points behind them, each once."""
    offered = [entry.value.partition(":")[0] for entry in entry_points(group=GROUP)]
    return tuple(dict.fromkeys([*names, *sorted(offered)]))


def load_plugins(names: Iterable[str] = ()) -> tuple[str, ...]:
    """Import plugins, those of entry points after those that are named, each once; returns the modules' names.

    The working folder is looked into as well, behind all other places. Raises :class:`PluginError` naming the plugin and
    what is wrong with it.
    """
    modules = plugin_modules(names)
    here = str(Path.cwd())
    if modules and here not in sys.path:
        sys.path.append(here)
    for name in modules:
        try:
            importlib.import_module(name)
        except UserError as error:  # a name that is taken, and the like
            raise PluginError(f"plugins: {name}: {error}") from None
        except Exception as error:
            raise PluginError(f"plugins: {name}: {_reason(name, error)}") from error
    return modules


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return "no such module; install it, or put it into the project folder"
    at = traceback.extract_tb(error.__traceback__)[-1]
    said = in_one_line(error)
    return f"{type(error).__name__}: {said} ({Path(at.filename).name}, line {at.lineno}); mend it or take it out"


def plugin_code(*functions: Callable[..., Any]) -> str:
    """Digest of what plugins' code means that these functions run; empty where all of it is this package's own.

    The modules of a plugin are those of its top-level package that are loaded. What it takes from this package is no part
    of it.
    """
    outside = tuple(function for function in functions if _package(function.__module__) != PACKAGE)
    return _code_of(outside) if outside else ""


@functools.cache
def _code_of(functions: tuple[Callable[..., Any], ...]) -> str:
    packages = {_package(function.__module__) for function in functions}
    modules = [name for name in sys.modules if _package(name) in packages]
    pieces = closure(functions, modules=modules)
    own = {name: digest for name, digest in pieces.items() if _package(name.partition(":")[0]) in packages}
    return digest_of(own)[:16]


def _package(module: str) -> str:
    return module.partition(".")[0]
