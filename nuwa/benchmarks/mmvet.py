"""MM-Vet: open questions that a judge model grades. Without a judge only parse failures are counted.

``get_benchmark("mmvet")`` has no judge, so its aggregate lacks the headline; :func:`with_judge` gives one that has it,
and so does the variant ``judged``, whose grades come from a file (:mod:`pipelines.scores.grades`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.definition import COCO, Benchmark, Example, Rules, Scores, TableSize, Truth
from nuwa.benchmarks.records import IMAGE, columns, image_bytes, text

# (question, true answer, prediction) → grade from 0 to 1
Judge = Callable[[str, str, str], float]

SCHEMA = columns(
    question_id=pa.string(),
    image=IMAGE,
    question=pa.string(),
    answer=pa.string(),
    image_source=pa.string(),
    capability=pa.string(),
)
INSTRUCTION = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)


def _read(row: dict[str, Any]) -> Iterator[Example]:
    question = text(row, "question")
    yield Example(
        example_id=f"mmvet:{text(row, 'question_id')}",
        question=question,
        truth={"question": question, "answer": text(row, "answer")},
        category=row["capability"] or "",
        image=image_bytes(row["image"], "image"),
    )


def _score(prediction: str, truth: Truth) -> Scores:
    return {"parse_failure": float(not prediction.strip())}


def with_judge(judge: Judge) -> Benchmark:
    """MM-Vet with grades; an empty answer is 0 without asking.

    The score raises ``ValueError`` for a grade outside 0..1, and whatever the judge raises.
    """

    def score(prediction: str, truth: Truth) -> Scores:
        scores = _score(prediction, truth)
        grade = 0.0 if scores["parse_failure"] else judge(truth["question"], truth["answer"], prediction)
        if not 0 <= grade <= 1:
            raise ValueError(f"the judge of mmvet gave {grade}; grades go from 0 to 1")
        return {"judge_score": float(grade), **scores}

    return replace(VARIANTS[0], score=score, variant="judged")


def _is_said(prediction: str, truth: Truth) -> bool:
    """An empty answer is 0 without asking."""
    return bool(prediction.strip())


def _score_graded(prediction: str, truth: Truth) -> Scores:
    grade = float(truth["grade"]) if _is_said(prediction, truth) else 0.0
    return {"judge_score": grade, **_score(prediction, truth)}


_PLAIN = (
    Benchmark(
        name="mmvet",
        title="MM-Vet",
        paper="MM-Vet: Evaluating Large Multimodal Models for Integrated Capabilities",
        splits={"test": TableSize(218, 200, COCO, 70)},
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=1024,
        headline="judge_score",
        read=_read,
        llava_v1=lambda example: INSTRUCTION + example.question,
        score=_score,
        rules={
            "lmms_eval": Rules("gpt_eval_score", 1024),  # greedy here; the harness samples at temperature 0.2
            "lmms_eval_0_3": Rules("gpt_eval_score", 1024),
        },
    ),
)
VARIANTS = (*_PLAIN, replace(_PLAIN[0], variant="judged", score=_score_graded, graded=_is_said, right="judge_score"))
