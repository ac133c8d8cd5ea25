"""Multiple choice: options under letters, and the ways in which answers name them."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterable, Mapping, Sequence

from nuwa.benchmarks.definition import Scores

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


LETTER_FORMS = (  # from sure to less so; one letter in any case
    re.compile(r"[\s(\[{*\"']*([A-Za-z])[\s)\]}*\"'.,:;!]*"),  # the whole answer
    re.compile(r"[\s*\"']*\(([A-Za-z])\)"),  # it begins with (b)
    re.compile(r"[\s*\"']*([A-Za-z])[.):]"),  # … or with b. b) b:
)
STATED = re.compile(
    r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*(?:option\s+)?[(\[*\"']*([A-Za-z])(?![A-Za-z])", re.IGNORECASE
)


def stated_letter(answer: str, letters: Collection[str]) -> str | None:
    """The option that ``answer`` states by its letter, in either case: ``b``, ``(B)``, ``B. dog``, ``B: dog``,
    ``the answer is b``; else the only one of ``letters`` that stands as a capital by itself.

    A lone capital ``A`` before a small letter is the article; letters of words are none: ``Bicycle`` states nothing.
    """
    whole, *openings = LETTER_FORMS
    forms = [whole.fullmatch(answer), *(form.match(answer) for form in openings), STATED.search(answer)]
    for match in forms:
        if match and match[1].upper() in letters:
            return match[1].upper()
    alone = set(re.findall(r"(?<![\w'])(?!A [a-z])([A-Z])(?![\w'])", answer)) & set(letters)
    return alone.pop() if len(alone) == 1 else None


# what lmms-eval 0.7.2 takes for a statement of the letter that follows; it looks for the first place of each
SUBJECTS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
PHRASES = (
    *(f"{opening}{subject} is" for subject in SUBJECTS for opening in ("", "the ")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def harness_letter(answer: str, letters: Sequence[str]) -> str | None:
    """The letter that lmms-eval 0.7.2 finds: capitals alone, of words too, so that ``Bicycle`` is B and ``A cat`` is A.

    Every way of naming a letter has a rank; the highest counts, and of equals the one furthest back, then the first of
    ``letters``.
    """
    inner = answer.strip()
    for mark in ",.!?;:'\"":
        inner = inner.strip(mark)
    if not answer.strip():
        return None
    padded, bare = f" {inner} ", f" {inner} ".strip()
    named: list[tuple[int, int, int, str]] = []

    def note(rank: int, place: int, letter: str) -> None:
        if place >= 0:
            named.append((rank, place, -letters.index(letter), letter))

    lower = padded.lower()
    behind = [at + len(phrase) for phrase in PHRASES if (at := lower.find(phrase)) >= 0]
    for letter in letters:
        for rank, form in (
            (6, f"({letter})"),
            (5, f"{letter}."),
            (4, f"{letter}:"),
            (3, f"{letter})"),
            (2, f"{letter} "),
        ):
            note(rank, padded.rfind(form), letter)
        for start in behind:
            note(7, padded.find(letter, start), letter)
        if bare.startswith(letter) and not bare[1:2].isalpha():
            note(10, 0, letter)
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            note(9, len(padded) - 1, letter)
    if not named:
        for letter in letters:
            note(0, padded.rfind(letter), letter)
    return max(named)[3] if named else None
