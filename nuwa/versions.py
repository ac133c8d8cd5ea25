"""The library versions that answers are right with; others are refused before anything is imported."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from nuwa.errors import UserError

# Older ones read a LLaVA's vision tower under other names and fill what they do not find at random.
TRANSFORMERS = ((5, 15), (6, 0))  # from, and below


class UnsupportedVersion(UserError, ImportError):
    """An installed library is outside the supported range."""


def check_transformers(installed: str | None = None) -> None:
    """Refuse a version of transformers outside ``TRANSFORMERS``; ``installed``: null for the one that is installed.

    Raises:
        UnsupportedVersion: names it, the range and the command that mends it.
    """
    try:
        installed = version("transformers") if installed is None else installed
    except PackageNotFoundError:
        return  # the import that follows says so
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    lowest, above = TRANSFORMERS
    if not lowest <= numbers < above:
        allowed = f">={_dotted(lowest)},<{above[0]}"
        raise UnsupportedVersion(
            f"transformers {installed} is installed, {allowed} is needed: others fill weights at random or answer "
            f"otherwise; pip install 'transformers{allowed}'"
        )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
