"""VQAv2: open questions with ten human answers; punctuation and word normalisation, soft vote.

Prediction and answers are always normalised, also where the ten agree, and people are told apart by their place in the
list, never by ``answer_id``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.answers import (
    as_asked,
    check_votes,
    in_a_word,
    normalize_answer,
    normalize_punctuation,
    normalize_words,
    vote_scores,
)
from nuwa.benchmarks.definition import COCO, Benchmark, Example, Rules, Scores, TableSize, Truth, for_server
from nuwa.benchmarks.records import IMAGE, columns, image_bytes, text

VOTE = pa.struct([("answer", pa.string()), ("answer_confidence", pa.string()), ("answer_id", pa.int64())])
SCHEMA = columns(
    question_type=pa.string(),
    multiple_choice_answer=pa.string(),
    answers=pa.list_(VOTE),
    image_id=pa.int64(),
    answer_type=pa.string(),
    question_id=pa.int64(),
    question=pa.string(),
    image=IMAGE,
)


def normalize(answer: str) -> str:
    """The punctuation step, then the digit and article step."""
    return normalize_words(normalize_punctuation(" ".join(answer.split())))


def _read(row: dict[str, Any]) -> Iterator[Example]:
    votes = None if row["answers"] is None else [vote and vote["answer"] for vote in row["answers"]]
    yield Example(
        example_id=f"vqav2:{text(row, 'question_id')}",
        question=text(row, "question"),
        truth={"answers": check_votes(votes)},
        category=row["answer_type"] or "",
        image=image_bytes(row["image"], "image"),
    )


ASKED = columns(question_id=pa.int64(), question=pa.string(), image=IMAGE)


def _read_asked(row: dict[str, Any]) -> Iterator[Example]:
    """Of test-dev, whose answers are not published."""
    question_id = text(row, "question_id")
    yield Example(
        example_id=f"vqav2:{question_id}",
        question=text(row, "question"),
        truth={"question_id": int(question_id)},
        category="",
        image=image_bytes(row["image"], "image"),
    )


def _submission(truth: Truth, answer: str) -> dict[str, Any]:
    """As EvalAI takes it; normalised as LLaVA's script does before it hands in."""
    return {"question_id": truth["question_id"], "answer": normalize_answer(answer)}


def _score(prediction: str, truth: Truth) -> Scores:
    return vote_scores(normalize(prediction), [normalize(answer) for answer in truth["answers"]])


def _score_0_3(prediction: str, truth: Truth) -> Scores:
    """As in lmms-eval 0.3.4: the prediction by EvalAI's normalisation, the ten answers only where they disagree."""
    answers = [" ".join(answer.replace("\t", " ").split("\n")).strip() for answer in truth["answers"]]
    if len(set(answers)) > 1:
        answers = [normalize(answer) for answer in answers]
    return vote_scores(normalize_answer(prediction), answers)


_SCORED = (
    Benchmark(
        name="vqav2",
        title="VQAv2",
        paper="Making the V in VQA Matter: Elevating the Role of Image Understanding in Visual Question Answering",
        splits={"validation": TableSize(214_354, 40_504, COCO, 34)},
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=in_a_word,
        score=_score,
        rules={
            "lmms_eval": Rules("exact_match", 16),
            # the request for a single word never reached the model
            "lmms_eval_0_3": Rules("exact_match", 16, llava_v1=as_asked, score=_score_0_3),
            "llava": Rules("overall", 128),
        },
    ),
)
VARIANTS = (*_SCORED, for_server(_SCORED[0], ASKED, _read_asked, _submission))
