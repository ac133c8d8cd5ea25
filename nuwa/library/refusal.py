"""How the library call says no."""

from __future__ import annotations

from typing import Any

from nuwa.errors import UserError

MOST = 60  # characters of a value in a message


class CallError(UserError, ValueError):
    """A call that cannot be meant: the line names the argument, its value and what is allowed."""


def shown(value: Any) -> str:
    """``value`` as a part of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST else f"{text[:MOST]}…"


def kind_of(value: Any) -> str:
    """What a value is, where to print it would say too little or too much."""
    return type(value).__name__


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
