"""TextVQA: questions about text in the image; EvalAI normalisation and the soft vote of ten people.

Variants: ``no_ocr`` shows the question alone; ``ocr`` shows the detected words too, as in LLaVA-1.5's published 58.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.answers import SINGLE_WORD, check_votes, normalize_answer, vote_scores
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, TableSize, Truth
from nuwa.benchmarks.records import IMAGE, TEXTS, columns, image_bytes, text

SCHEMA = columns(
    image_id=pa.string(),
    question_id=pa.int32(),
    question=pa.string(),
    question_tokens=TEXTS,
    image=IMAGE,
    image_width=pa.int32(),
    image_height=pa.int32(),
    flickr_original_url=pa.string(),
    flickr_300k_url=pa.string(),
    answers=TEXTS,
    image_classes=TEXTS,
    set_name=pa.string(),
    ocr_tokens=TEXTS,
)


def _read(row: dict[str, Any]) -> Iterator[Example]:
    yield Example(
        example_id=f"textvqa:{text(row, 'question_id')}",
        question=text(row, "question"),
        truth={"answers": check_votes(row["answers"])},
        category="",
        image=image_bytes(row["image"], "image"),
        context={"ocr_tokens": [token for token in row["ocr_tokens"] or () if token]},
    )


def _score(prediction: str, truth: Truth) -> Scores:
    return vote_scores(normalize_answer(prediction), [normalize_answer(answer) for answer in truth["answers"]])


def _question(example: Example) -> str:
    return example.question.capitalize() + SINGLE_WORD


def _question_with_ocr(example: Example) -> str:
    words = ", ".join(example.context["ocr_tokens"])
    return f"{example.question.capitalize()}\nReference OCR token: {words}{SINGLE_WORD}"


def _llava_question(example: Example) -> str:
    words = ", ".join(example.context["ocr_tokens"])
    return f"{example.question}\nReference OCR token: {words}{SINGLE_WORD}"


HARNESS = {"lmms_eval": Rules("exact_match"), "lmms_eval_0_3": Rules("exact_match")}
LLAVA = {"llava": Rules("accuracy", 128, llava_v1=_llava_question)}  # as published, no capital

VARIANTS = tuple(
    Benchmark(
        name="textvqa",
        variant=variant,
        title="TextVQA",
        paper="Towards VQA Models That Can Read",
        splits={"validation": TableSize(5000, 3166, (1024, 768), 40)},  # OCR words are not counted
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=prompt,
        score=_score,
        rules=rules,
    )
    for variant, prompt, rules in (("no_ocr", _question, HARNESS), ("ocr", _question_with_ocr, HARNESS | LLAVA))
)
