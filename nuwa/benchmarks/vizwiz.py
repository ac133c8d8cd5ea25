"""VizWiz: questions that blind people asked about their own photos; scored like TextVQA, ``unanswerable`` as any answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.answers import SINGLE_WORD, check_votes, normalize_answer, vote_scores
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, TableSize, Truth, for_server
from nuwa.benchmarks.records import IMAGE, TEXTS, columns, image_bytes, text

SCHEMA = columns(question_id=pa.string(), image=IMAGE, question=pa.string(), answers=TEXTS, category=pa.string())
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def _read(row: dict[str, Any]) -> Iterator[Example]:
    yield Example(
        example_id=f"vizwiz:{text(row, 'question_id')}",
        question=text(row, "question"),
        truth={"answers": check_votes(row["answers"])},
        category=row["category"] or "",
        image=image_bytes(row["image"], "image"),
    )


ASKED = columns(question_id=pa.string(), image=IMAGE, question=pa.string())


def _read_asked(row: dict[str, Any]) -> Iterator[Example]:
    """Of the test split, whose answers are not published; its ids are names of pictures."""
    name = text(row, "question_id")
    yield Example(
        example_id=f"vizwiz:{name}",
        question=text(row, "question"),
        truth={"image": name if name.endswith(".jpg") else f"{name}.jpg"},
        category="",
        image=image_bytes(row["image"], "image"),
    )


def _submission(truth: Truth, answer: str) -> dict[str, Any]:
    """As EvalAI takes it, normalised as LLaVA's script and lmms-eval do before they hand in."""
    return {"image": truth["image"], "answer": normalize_answer(answer)}


def _score(prediction: str, truth: Truth) -> Scores:
    return vote_scores(normalize_answer(prediction), [normalize_answer(answer) for answer in truth["answers"]])


_SCORED = (
    Benchmark(
        name="vizwiz",
        title="VizWiz",
        paper="VizWiz Grand Challenge: Answering Visual Questions from Blind People",
        splits={"val": TableSize(4319, 4319, (1200, 1600), 33)},
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=lambda example: example.question.capitalize() + UNANSWERABLE + SINGLE_WORD,
        score=_score,
        rules={"lmms_eval": Rules("exact_match"), "lmms_eval_0_3": Rules("exact_match")},
    ),
)
VARIANTS = (*_SCORED, for_server(_SCORED[0], ASKED, _read_asked, _submission))
