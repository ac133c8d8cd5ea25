"""Average normalised Levenshtein similarity (ANLS) of free answers, as DocVQA and InfoVQA are scored, and what the two
have in common besides: an image, a question, its accepted answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.answers import in_a_word
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, TableSize, Truth
from nuwa.benchmarks.records import RecordError, image_bytes, text

LEAST = 0.5  # a similarity below it counts as 0


def levenshtein(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements of a character that make ``other`` of ``one``."""
    above = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        current = [row]
        for column, right in enumerate(other, start=1):
            current.append(min(above[column] + 1, current[-1] + 1, above[column - 1] + (left != right)))
        above = current
    return above[-1]


def plain(text: str) -> str:
    """Lower case, single blanks."""
    return " ".join(text.lower().split())


def similarity(prediction: str, answers: Sequence[str]) -> float:
    """The best of 1 − distance / longer length over ``answers``, 0 below :data:`LEAST`; lengths are of what is compared."""
    said = plain(prediction)
    best = 0.0
    for answer in map(plain, answers):
        longer = max(len(answer), len(said))
        if said and longer and abs(len(answer) - len(said)) <= longer * (1 - LEAST):  # else it cannot reach a half
            best = max(best, 1 - levenshtein(answer, said) / longer)
    return best if best >= LEAST else 0.0


def score(prediction: str, truth: Truth) -> Scores:
    return {"anls": similarity(prediction, truth["answers"]), "parse_failure": float(not prediction.strip())}


def check_answers(answers: Sequence[str | None] | None) -> list[str]:
    """The accepted answers of a row; at least one."""
    kept = [answer for answer in answers or () if answer is not None and answer.strip()]
    if not kept:
        raise RecordError("column 'answers' is empty")
    return kept


def _read(name: str, row: dict[str, Any]) -> Iterator[Example]:
    truth = {"answers": check_answers(row["answers"])}
    example_id = f"{name}:{text(row, 'questionId')}"
    yield Example(example_id, text(row, "question"), truth, "", image_bytes(row["image"], "image"))


def document_questions(name: str, title: str, paper: str, schema: pa.Schema, validation: TableSize) -> Benchmark:
    """A benchmark of documents under ANLS; ``schema`` has the columns questionId, question, image and answers."""
    rules = Rules("anls", 32)
    return Benchmark(
        name=name,
        title=title,
        paper=paper,
        splits={"validation": validation},
        family="vqa",
        schema=schema,
        max_new_tokens=32,
        headline="anls",
        right="anls",
        read=partial(_read, name),
        llava_v1=in_a_word,
        score=score,
        rules={"lmms_eval": rules, "lmms_eval_0_3": rules},
    )
