"""Short free answers: EvalAI normalisation and the soft vote of ten people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from nuwa.benchmarks.definition import Example, Scores
from nuwa.benchmarks.records import RecordError

SINGLE_WORD = "\nAnswer the question using a single word or phrase."


def as_asked(example: Example) -> str:
    """The published question and nothing else."""
    return example.question


def in_a_word(example: Example) -> str:
    """The published question and LLaVA-1.5's request for a short answer."""
    return example.question + SINGLE_WORD


VOTES = 10
VOTES_NEEDED = 3

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
THOUSANDS = re.compile(r"(?<=\d),+(?=\d)")
ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}

# Spelt right; an answer that lacks one of the apostrophes means the same word.
APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't "
    "he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've "
    "mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't "
    "we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll "
    "who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in APOSTROPHES.split() for at, letter in enumerate(word) if letter == "'"
}


def normalize_punctuation(answer: str) -> str:
    """Punctuation goes where it stands next to a blank (or the text holds digits-comma-digits), else becomes a blank;
    periods go unless a digit follows."""
    result = answer
    thousands = THOUSANDS.search(answer) is not None
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in answer or f" {mark}" in answer
        result = result.replace(mark, "" if beside_blank or thousands else " ")
    return PERIOD.sub("", result)


def normalize_words(answer: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe, single blanks.

    An answer that is nothing but articles stays: else it would equal no answer at all.
    """
    words = [NUMBERS.get(word, word) for word in answer.lower().split()]
    kept = [word for word in words if word not in ARTICLES] or words
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def normalize_answer(answer: str) -> str:
    """EvalAI's normalisation: ``The Dog.`` → ``dog``, ``two`` → ``2``, ``1,000`` → ``1000``, ``U.S.A.`` → ``usa``."""
    spaced = " ".join(answer.lower().split())
    spaced = spaced.replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_words(normalize_punctuation(spaced))


def soft_vote(prediction: str, answers: Sequence[str]) -> float:
    """Mean over people i of min(1, #{j ≠ i : answer_j = prediction} / 3). All texts normalised; ``""`` matches none."""
    if not prediction or not answers:
        return 0.0
    matches = Counter(answers)[prediction]
    left_out = [matches - (answer == prediction) for answer in answers]
    return sum(min(VOTES_NEEDED, votes) for votes in left_out) / (VOTES_NEEDED * len(answers))


def vote_scores(prediction: str, answers: Sequence[str]) -> Scores:
    """Soft vote of normalised texts; an answer with nothing left is a parse failure."""
    return {"accuracy": soft_vote(prediction, answers), "parse_failure": float(not prediction)}


def check_votes(answers: Sequence[Any] | None) -> list[str]:
    """The ten answers of a row, as published; single blank ones occur and match nothing."""
    if answers is None or len(answers) != VOTES:
        count = 0 if answers is None else len(answers)
        raise RecordError(f"column 'answers' should hold {VOTES} answers, found {count}")
    if any(answer is None for answer in answers):
        raise RecordError(f"column 'answers' has a null at position {list(answers).index(None)}")
    if not any(answer.strip() for answer in answers):
        raise RecordError("column 'answers' holds blank answers only")
    return list(answers)
