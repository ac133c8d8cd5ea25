"""DocVQA (validation): questions about scanned pages; ANLS over the accepted answers."""

from __future__ import annotations

import pyarrow as pa

from nuwa.benchmarks.definition import TableSize
from nuwa.benchmarks.edit_distance import document_questions
from nuwa.benchmarks.records import IMAGE, TEXTS, columns

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

VARIANTS = (
    document_questions(
        "docvqa",
        "DocVQA",
        "DocVQA: A Dataset for VQA on Document Images",
        SCHEMA,
        TableSize(5349, 1286, (1700, 2000), 50),
    ),
)
