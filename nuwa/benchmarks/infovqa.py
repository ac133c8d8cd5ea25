"""InfoVQA (validation): questions about infographics; ANLS over the accepted answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.answers import SINGLE_WORD
from nuwa.benchmarks.definition import Benchmark, Example, Rules, TableSize
from nuwa.benchmarks.edit_distance import check_answers, score
from nuwa.benchmarks.records import IMAGE, TEXTS, columns, image_bytes, text

SCHEMA = columns(
    **{
        "questionId": pa.string(),
        "question": pa.string(),
        "answers": TEXTS,
        "answer_type": TEXTS,
        "image": IMAGE,
        "image_url": pa.string(),
        "operation/reasoning": TEXTS,
        "ocr": pa.string(),
        "data_split": pa.string(),
    }
)


def _read(row: dict[str, Any]) -> Iterator[Example]:
    truth = {"answers": check_answers(row["answers"])}
    example_id = f"infovqa:{text(row, 'questionId')}"
    yield Example(example_id, text(row, "question"), truth, "", image_bytes(row["image"], "image"))


VARIANTS = (
    Benchmark(
        name="infovqa",
        title="InfoVQA",
        paper="InfographicVQA",
        splits={"validation": TableSize(2801, 500, (1200, 2000), 65)},
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=32,
        headline="anls",
        right="anls",
        read=_read,
        llava_v1=lambda example: example.question + SINGLE_WORD,
        score=score,
        rules={"lmms_eval": Rules("anls", 32), "lmms_eval_0_3": Rules("anls", 32)},
    ),
)
