"""SEED-Bench, its image questions: four options; the answer's first character, in either case. Video rows are no examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.choices import OPTION_LETTER, choice_scores, lettered, option_lines
from nuwa.benchmarks.definition import COCO, Benchmark, Example, Rules, Scores, TableSize, Truth
from nuwa.benchmarks.records import IMAGE, RecordError, columns, image_bytes, one_of, text

CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
SCHEMA = columns(
    answer=pa.string(),
    choice_a=pa.string(),
    choice_b=pa.string(),
    choice_c=pa.string(),
    choice_d=pa.string(),
    data_type=pa.string(),
    question=pa.string(),
    question_id=pa.string(),
    image=pa.list_(IMAGE),
)


def _read(row: dict[str, Any]) -> Iterator[Example]:
    kind = one_of(row, "data_type", ("image", "video"), lower=True)
    if kind == "video":
        return
    images = row["image"] or []
    if len(images) != 1:
        raise RecordError(f"column 'image' should hold 1 image, found {len(images)}")
    options = lettered(_choice(row, column) for column in CHOICES)
    yield Example(
        example_id=f"seedbench:{text(row, 'question_id')}",
        question=text(row, "question"),
        truth={"answer": one_of(row, "answer", tuple(options)), "options": options},
        category=kind,
        image=image_bytes(images[0], "image"),
    )


def _choice(row: dict[str, Any], column: str) -> str:
    """An empty one has its line all the same."""
    if row[column] is None:
        raise RecordError(f"column {column!r} is null")
    return str(row[column])


def _prompt(example: Example) -> str:
    return f"{example.question}\n{option_lines(example.truth['options'])}{OPTION_LETTER}"


def _score(prediction: str, truth: Truth) -> Scores:
    first = prediction.strip()[:1].upper()
    return choice_scores(first if first in truth["options"] else None, truth["answer"])


VARIANTS = (
    Benchmark(
        name="seedbench",
        title="SEED-Bench",
        paper="SEED-Bench: Benchmarking Multimodal LLMs with Generative Comprehension",
        splits={"test": TableSize(14_233, 14_233, COCO, 140)},  # images: at most; videos are no questions
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=_prompt,
        score=_score,
        rules={"lmms_eval": Rules("seed_image"), "lmms_eval_0_3": Rules("seed_image"), "llava": Rules("accuracy", 128)},
    ),
)
