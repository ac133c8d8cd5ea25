"""ScienceQA-IMG: school questions with an image; the answer is a letter in either case, or begins with a capital: ``X.``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.choices import OPTION_LETTER, choice_scores, lettered, option_lines
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, TableSize, Truth
from nuwa.benchmarks.records import (
    IMAGE,
    TEXTS,
    RecordError,
    columns,
    content_id,
    image_bytes,
    optional_text,
    text,
    texts,
)

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
        example_id=f"scienceqa:{content_id(image, question, *choices)}",
        question=question,
        truth={"answer": list(options)[position], "options": options},
        category=row["subject"] or "",
        image=image,
        context={"hint": optional_text(row, "hint"), "published_hint": row["hint"] or ""},
    )


def _prompt(example: Example, hint: str = "hint") -> str:
    """``hint``: the entry of the context that is shown."""
    shown = f"Context: {example.context[hint]}\n" if example.context[hint] else ""
    return f"{shown}{example.question}\n{option_lines(example.truth['options'])}{OPTION_LETTER}"


# lmms-eval shows whatever stands in the column, a missing hint's "nan" too.
_harness_prompt = partial(_prompt, hint="published_hint")


def chosen_letter(answer: str) -> str | None:
    """The whole answer where it is one letter, as a capital, or a capital that begins it before a period."""
    stripped = answer.strip()
    leading = LEADING_LETTER.match(stripped)
    if leading:
        return leading[1]
    return stripped.upper() if re.fullmatch("[A-Za-z]", stripped) else None


def _score(prediction: str, truth: Truth) -> Scores:
    letter = chosen_letter(prediction)
    return choice_scores(letter if letter in truth["options"] else None, truth["answer"])


def bare_letter(answer: str) -> str | None:
    """The whole answer where it is one letter: all that lmms-eval 0.3.4 takes, which lowers an answer before it looks
    for a capital before a period."""
    stripped = answer.strip()
    return stripped.upper() if re.fullmatch("[A-Za-z]", stripped) else None


def _score_bare(prediction: str, truth: Truth) -> Scores:
    letter = bare_letter(prediction)
    return choice_scores(letter if letter in truth["options"] else None, truth["answer"])


VARIANTS = (
    Benchmark(
        name="scienceqa",
        title="ScienceQA",
        paper="Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering",
        splits={"test": TableSize(2017, 2017, (500, 350), 150)},  # images: at most; hints are not counted
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=_prompt,
        score=_score,
        rules={
            "lmms_eval": Rules("exact_match", 16, llava_v1=_harness_prompt),
            "lmms_eval_0_3": Rules("exact_match", 16, llava_v1=_harness_prompt, score=_score_bare),
        },
    ),
)
