"""DocVQA (validation): questions about scanned pages; ANLS over the accepted answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.answers import SINGLE_WORD
from nuwa.benchmarks.definition import Benchmark, Example, Rules, TableSize
from nuwa.benchmarks.edit_distance import check_answers, score
from nuwa.benchmarks.records import IMAGE, TEXTS, columns, image_bytes, text

SCHEMA = columns(
    questionId=pa.string(),
    question=pa.string(),
    question_types=TEXTS,
    image=IMAGE,
    docId=pa.int64(),
    ucsf_document_id=pa.string(),
    ucsf_document_page_no=pa.string(),
    answers=TEXTS,
    data_split=pa.string(),
)


def _read(row: dict[str, Any]) -> Iterator[Example]:
    truth = {"answers": check_answers(row["answers"])}
    example_id = f"docvqa:{text(row, 'questionId')}"
    yield Example(example_id, text(row, "question"), truth, "", image_bytes(row["image"], "image"))


VARIANTS = (
    Benchmark(
        name="docvqa",
        title="DocVQA",
        paper="DocVQA: A Dataset for VQA on Document Images",
        splits={"validation": TableSize(5349, 1286, (1700, 2000), 50)},
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
