"""Multiple choice: options under letters, and the ways in which answers name them."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping

from nuwa.benchmarks.protocol import Scores

OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."

Options = Mapping[str, str]


def lettered(texts: Iterable[str]) -> dict[str, str]:
    """``{"A": first, "B": second, …}``."""
    return dict(zip(string.ascii_uppercase, texts, strict=False))


def option_lines(options: Options) -> str:
    """``A. first`` and so on, one a line."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def choice_scores(chosen: str | None, answer: str) -> Scores:
    """``chosen`` is a letter, or ``None`` where the answer names no option: wrong, and a parse failure."""
    return {"accuracy": float(chosen == answer), "parse_failure": float(chosen is None)}


def find_words(words: str, text: str) -> list[re.Match[str]]:
    """Where ``words`` stand in ``text`` as whole words, in any case; nowhere if there are none."""
    return list(re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE)) if words.strip() else []
