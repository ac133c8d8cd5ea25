"""InfoVQA (validation): questions about infographics; ANLS over the accepted answers."""

from __future__ import annotations

import pyarrow as pa

from nuwa.benchmarks.definition import TableSize
from nuwa.benchmarks.edit_distance import document_questions
from nuwa.benchmarks.records import IMAGE, TEXTS, columns

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

VARIANTS = (document_questions("infovqa", "InfoVQA", "InfographicVQA", SCHEMA, TableSize(2801, 500, (1200, 2000), 65)),)
