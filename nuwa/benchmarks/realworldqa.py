"""RealWorldQA: photos from cars and elsewhere; a letter, or a short answer. The question brings its own request."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.answers import NUMBERS, as_asked
from nuwa.benchmarks.choices import choice_scores, harness_letter, stated_letter
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, TableSize, Truth
from nuwa.benchmarks.records import IMAGE, columns, content_id, image_bytes, text

SCHEMA = columns(image=IMAGE, question=pa.string(), answer=pa.string())
LETTERS = ("A", "B", "C", "D")
OPTION = re.compile(r"\b([A-Z])\.\s+([^\n]*)")
NO_PUNCTUATION = re.compile(r"[^\w\s]")  # keeps the underscore
NO_MARKS = str.maketrans("", "", string.punctuation)


def _read(row: dict[str, Any]) -> Iterator[Example]:
    question, image = text(row, "question").strip(), image_bytes(row["image"], "image")
    truth = {"answer": text(row, "answer").strip(), "options": [words.strip() for _, words in OPTION.findall(question)]}
    yield Example(f"realworldqa:{content_id(image, question)}", question, truth, "", image)


def _plain(words: str) -> str:
    return words.lower().strip().rstrip(".")


def _with_digits(words: str) -> str:
    """Number words as digits; no punctuation at the ends."""
    said = words.lower().strip().strip(string.punctuation)
    return NUMBERS.get(said, said)


def _score(letter: Callable[[str], str | None], plain: Callable[[str], str], prediction: str, truth: Truth) -> Scores:
    """A letter where the truth is one of A to D, else equality of what ``plain`` makes of both."""
    answer = truth["answer"]
    if answer.upper() in LETTERS:
        return choice_scores(letter(prediction), answer.upper())
    said = plain(prediction)
    return {"accuracy": float(said != "" and said == plain(answer)), "parse_failure": float(not said)}


def _score_0_3(prediction: str, truth: Truth) -> Scores:
    """lmms-eval 0.3.4: a number word as its digit, else an option's text as its letter or the answer without
    punctuation; then equality without case."""
    said = NUMBERS.get(prediction.lower(), prediction) if prediction.lower() != "none" else prediction
    said = NO_PUNCTUATION.sub("", said).strip()
    places = sorted((at, number) for number, words in enumerate(truth["options"]) if (at := said.find(words)) >= 0)
    if places:
        words = truth["options"][places[0][1]]
        said = string.ascii_uppercase[max(n for n, option in enumerate(truth["options"]) if option == words)]
    said, right = (words.lower().translate(NO_MARKS) for words in (said, truth["answer"]))
    return {"accuracy": float(said == right), "parse_failure": float(not said)}


VARIANTS = (
    Benchmark(
        name="realworldqa",
        title="RealWorldQA",
        paper="Grok-1.5 Vision Preview",
        splits={"test": TableSize(765, 765, (1500, 1000), 190)},  # images: at most
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=as_asked,
        score=partial(_score, partial(stated_letter, letters=LETTERS), _with_digits),
        rules={
            "lmms_eval": Rules(
                "exact_match", 16, score=partial(_score, partial(harness_letter, letters=LETTERS), _plain)
            ),
            "lmms_eval_0_3": Rules("exact_match", 16, score=_score_0_3),
        },
    ),
)
