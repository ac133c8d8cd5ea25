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

from nuwa.benchmarks.answers import in_a_word
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, TableSize, Truth
from nuwa.benchmarks.records import IMAGE, RecordError, check_columns, columns, image_bytes, text
from nuwa.benchmarks.rows import ParquetFiles, large

INSTRUCTIONS = columns(id=pa.string(), imageId=pa.string(), question=pa.string(), answer=pa.string())
IMAGES = columns(id=pa.string(), image=IMAGE)

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def join_images(instructions: pa.Table | ParquetFiles, images: pa.Table | ParquetFiles) -> pa.Table:
    """``instructions`` with the ``image`` of their ``imageId``, in their order.

    About 32 questions share an image: the column refers to each image once (dictionary encoding) instead of copying it.

    Raises:
        SchemaError: one of the tables lacks a published column.
        RecordError: an ``imageId`` without an image, or an image id that occurs twice.
    """
    instructions = _checked(instructions, INSTRUCTIONS, "gqa instructions")
    images = _checked(images, IMAGES, "gqa images")

    ids = _texts(images["id"])
    if len(ids.unique()) != len(ids):
        repeated = next(entry["values"].as_py() for entry in ids.value_counts() if entry["counts"].as_py() > 1)
        raise RecordError(f"gqa images: id {repeated!r} occurs more than once; keep one row an image")

    wanted = _texts(instructions["imageId"])
    positions = pc.index_in(wanted, value_set=ids)
    if positions.null_count:
        lost = wanted.filter(pc.is_null(positions))
        raise RecordError(
            f"gqa instructions: {len(lost)} of {len(wanted)} have no image, first imageId {lost[0].as_py()!r}; "
            f"give all images files of the same split"
        )

    pictures = images["image"].cast(large(IMAGE)).combine_chunks()  # of large types: more than 2 GB are one array too
    joined = pa.DictionaryArray.from_arrays(positions, pictures)
    return instructions.select(INSTRUCTIONS.names).append_column("image", joined)


def _checked(table: pa.Table | ParquetFiles, published: pa.Schema, name: str) -> pa.Table:
    if isinstance(table, pa.Table):
        check_columns(table.schema, published, "gqa", name)
        return table
    for number, path in enumerate(table.files):
        check_columns(table.schema_of(number), published, "gqa", str(path))
    return table.whole(published)


def _texts(column: pa.ChunkedArray) -> pa.Array:
    """Of any layout or encoding as plain strings."""
    return pa.array(column.to_pylist(), pa.string())


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
        title="GQA",
        paper="GQA: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering",
        splits={"testdev": TableSize(12_578, 398, (500, 375), 40)},
        parts=("instructions", "images"),
        join=join_images,
        family="vqa",
        schema=INSTRUCTIONS.append(pa.field("image", IMAGE)),
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=in_a_word,
        score=_score,
        rules={
            "lmms_eval": Rules("exact_match", 16),
            "lmms_eval_0_3": Rules("exact_match", 16),
            "llava": Rules("accuracy", 128),
        },
    ),
)
