"""What goes through a module of torch's while a test listens; the hook is gone afterwards, whatever was raised."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def heard(module: nn.Module) -> Iterator[list[Any]]:
    """Copies of what ``module`` puts out, call by call."""
    outputs: list[Any] = []

    def keep(_module: nn.Module, _given: tuple, out: Any) -> None:
        outputs.append(out.clone() if isinstance(out, torch.Tensor) else out)

    listener = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        listener.remove()


@contextlib.contextmanager
def told_before(module: nn.Module, note: Callable[[tuple, dict], None]) -> Iterator[None]:
    """``note`` gets the arguments of every call of ``module`` before it runs, and may raise in its place."""
    listener = module.register_forward_pre_hook(lambda _module, given, named: note(given, named), with_kwargs=True)
    try:
        yield
    finally:
        listener.remove()
