"""GQA: compositional questions with one short answer; equality after lower-casing and dropping punctuation.

Published as two tables, ``testdev_balanced_instructions`` (id, imageId, question, answer) and
``testdev_balanced_images`` (id, image). ``examples`` takes the one that :func:`join_images` makes of them, or any file
with its columns: id, imageId, question, answer, image.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nuwa.benchmarks.answers import SINGLE_WORD
from nuwa.benchmarks.protocol import Benchmark, Example, Scores, Truth
from nuwa.benchmarks.records import IMAGE, RecordError, check_columns, columns, image_bytes, text

INSTRUCTIONS = columns(id=pa.string(), imageId=pa.string(), question=pa.string(), answer=pa.string())
IMAGES = columns(id=pa.string(), image=IMAGE)

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def join_images(instructions: pa.Table, images: pa.Table) -> pa.Table:
    """``instructions`` with the ``image`` of their ``imageId``, in their order.

    About 32 questions share an image: the column refers to each image once (dictionary encoding) instead of copying it.

    Raises:
        SchemaError: one of the tables lacks a published column.
        RecordError: an ``imageId`` without an image, or an image id that occurs twice.
    """
    check_columns(instructions.schema, INSTRUCTIONS, "gqa", "gqa instructions")
    check_columns(images.schema, IMAGES, "gqa", "gqa images")
    ids = images["id"].combine_chunks().cast(pa.string())
    if len(ids.unique()) != len(ids):
        repeated = next(entry["values"].as_py() for entry in ids.value_counts() if entry["counts"].as_py() > 1)
        raise RecordError(f"gqa images: id {repeated!r} occurs more than once; keep one row an image")
    wanted = instructions["imageId"].combine_chunks().cast(pa.string())
    positions = pc.index_in(wanted, value_set=ids)
    if positions.null_count:
        lost = wanted.filter(pc.is_null(positions))
        raise RecordError(
            f"gqa instructions: {len(lost)} of {len(wanted)} have no image, first imageId {lost[0].as_py()!r}; "
            f"give all images files of the same split"
        )
    joined = pa.DictionaryArray.from_arrays(positions, images["image"].combine_chunks())
    return instructions.select(INSTRUCTIONS.names).append_column("image", joined)


def normalize(answer: str) -> str:
    """Lower case without punctuation, outer and double blanks."""
    return " ".join(answer.lower().translate(NO_PUNCTUATION).split())


def _read(row: dict[str, Any]) -> Iterator[Example]:
    truth = {"answer": text(row, "answer")}
    yield Example(f"gqa:{text(row, 'id')}", text(row, "question"), truth, "", image_bytes(row["image"], "image"))


def _score(prediction: str, truth: Truth) -> Scores:
    answer = normalize(prediction)
    return {
        "accuracy": float(answer != "" and answer == normalize(truth["answer"])),
        "parse_failure": float(not answer),
    }


VARIANTS = (
    Benchmark(
        name="gqa",
        family="vqa",
        schema=INSTRUCTIONS.append(pa.field("image", IMAGE)),
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=lambda example: example.question + SINGLE_WORD,
        score=_score,
    ),
)
