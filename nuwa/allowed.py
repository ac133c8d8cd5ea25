"""What a value may be, and the one line that says so where it is something else."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, get_args

Interval = Literal["[0, 1]", "(0, 1]", "[0, 1)"]


def check_share(named: str, share: float, interval: Interval = "[0, 1]", because: str = "") -> None:
    """Refuse a number outside ``interval``; raises ``ValueError``.

    ``named``: key and value, with which the message begins; ``because``: why it has to lie there, at its end.
    """
    above = share > 0 if interval.startswith("(") else share >= 0
    below = share < 1 if interval.endswith(")") else share <= 1
    if not (above and below):
        raise ValueError(f"{named} must lie in {interval}{because}")


def check_word(key: str, word: str, allowed: Collection[str]) -> None:
    """Refuse a word that is none of ``allowed``; raises ``ValueError`` naming ``key``."""
    if word not in allowed:
        raise ValueError(f"{key} {word!r} is unknown; allowed: {', '.join(allowed)}")


def check_words(owner: str, config: Any, **kinds: Any) -> None:
    """Refuse a configuration of ``owner`` whose field of a name in ``kinds`` is no word of that ``Literal``."""
    for name, kind in kinds.items():
        check_word(f"{owner}.{name}", getattr(config, name), get_args(kind))
