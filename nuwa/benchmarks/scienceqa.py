"""ScienceQA-IMG: school questions with an image; the answer is a whole letter or begins with ``X.``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.choices import OPTION_LETTER, choice_scores, lettered, option_lines
from nuwa.benchmarks.protocol import Benchmark, Example, Scores, Truth
from nuwa.benchmarks.records import IMAGE, TEXTS, RecordError, columns, image_bytes, optional_text, text, texts

SCHEMA = columns(
    image=IMAGE,
    question=pa.string(),
    choices=TEXTS,
    answer=pa.int8(),
    hint=pa.string(),
    task=pa.string(),
    grade=pa.string(),
    subject=pa.string(),
    topic=pa.string(),
    category=pa.string(),
    skill=pa.string(),
    lecture=pa.string(),
    solution=pa.string(),
)
LEADING_LETTER = re.compile(r"([A-Z])\.")


def _read(row: dict[str, Any]) -> Iterator[Example]:
    image, question, choices = image_bytes(row["image"], "image"), text(row, "question"), texts(row, "choices")
    options = lettered(choices)
    position = row["answer"]
    if position is None or not 0 <= position < len(options):
        raise RecordError(f"column 'answer' is {position}, allowed are 0 to {len(options) - 1}")
    yield Example(
        example_id=f"scienceqa:{_content_id(image, question, *choices)}",
        question=question,
        truth={"answer": list(options)[position], "options": options},
        category=row["subject"] or "",
        image=image,
        context={"hint": optional_text(row, "hint")},
    )


def _content_id(image: bytes, *words: str) -> str:
    """The table has no question ids: sixteen hex digits of what is asked."""
    digest = hashlib.sha256(image)
    for word in words:
        digest.update(b"\0" + word.encode())
    return digest.hexdigest()[:16]


def _prompt(example: Example) -> str:
    hint = f"Context: {example.context['hint']}\n" if example.context["hint"] else ""
    return f"{hint}{example.question}\n{option_lines(example.truth['options'])}{OPTION_LETTER}"


def chosen_letter(answer: str) -> str | None:
    """The whole answer where it is one capital, or a capital that begins it before a period."""
    stripped = answer.strip()
    leading = LEADING_LETTER.match(stripped)
    if leading:
        return leading[1]
    return stripped if re.fullmatch("[A-Z]", stripped) else None


def _score(prediction: str, truth: Truth) -> Scores:
    letter = chosen_letter(prediction)
    return choice_scores(letter if letter in truth["options"] else None, truth["answer"])


VARIANTS = (
    Benchmark(
        name="scienceqa",
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=_prompt,
        score=_score,
    ),
)
