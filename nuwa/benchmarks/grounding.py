"""Referring expression comprehension: RefCOCO, RefCOCO+ and RefCOCOg differ in nothing but their tables' rows.

Every expression of a row's ``answer`` is a question of its own. Variants: ``normalized`` asks for shares of the image
(LLaVA, the testbed); ``pixels`` asks for JSON in absolute pixels of ``truth["size"]`` (Qwen2.5-VL): the size at which
the model sees the image, which the caller of :meth:`Benchmark.examples` puts in the place of the image's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.boxes import Space, parse_box, score_box
from nuwa.benchmarks.protocol import Benchmark, Example, Scores, Truth
from nuwa.benchmarks.records import IMAGE, TEXTS, RecordError, columns, image_bytes, image_size, text, texts

SCHEMA = columns(
    question_id=pa.string(),
    image=IMAGE,
    question=pa.string(),
    answer=TEXTS,
    segmentation=pa.list_(pa.float32()),
    bbox=pa.list_(pa.float32()),
    iscrowd=pa.int8(),
    file_name=pa.string(),
)
INSTRUCTION = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. "
    "Please provide the bounding box coordinate of the region this sentence describes: "
)
IN_PIXELS = (
    'Find the region this sentence describes and give its box in pixels as JSON {{"bbox_2d": [x1, y1, x2, y2]}}: {}'
)


def referring_expressions(name: str) -> tuple[Benchmark, ...]:
    """The variants of one of the three benchmarks, ``normalized`` first."""
    return tuple(_benchmark(name, space) for space in ("normalized", "pixels"))


def _benchmark(name: str, space: Space) -> Benchmark:
    def read(row: dict[str, Any]) -> Iterator[Example]:
        return _examples(name, space, row)

    def score(prediction: str, truth: Truth) -> Scores:
        size = tuple(truth["size"]) if space == "pixels" else None
        return score_box(parse_box(prediction, space, size), truth["box"])

    return Benchmark(
        name=name,
        variant=space,
        family="grounding",
        schema=SCHEMA,
        max_new_tokens=64,
        headline="acc@0.5",
        read=read,
        llava_v1=lambda example: (
            INSTRUCTION + example.question if space == "normalized" else IN_PIXELS.format(example.question)
        ),
        score=score,
    )


def _examples(name: str, space: Space, row: dict[str, Any]) -> Iterator[Example]:
    question_id, image = text(row, "question_id"), image_bytes(row["image"], "image")
    size = image_size(image)
    truth: Truth = {"box": _shares(row["bbox"], size)}
    if space == "pixels":
        truth["size"] = list(size)
    for k, expression in enumerate(texts(row, "answer")):
        yield Example(f"{name}:{question_id}:{k}", expression, truth, "", image)


def _shares(bbox: list[float] | None, size: tuple[int, int]) -> list[float]:
    """``[x, y, w, h]`` in pixels → ``[left, top, right, bottom]`` in shares of the image."""
    if bbox is None or len(bbox) != 4 or not all(value is not None and math.isfinite(value) for value in bbox):
        raise RecordError(f"column 'bbox' should be four finite numbers x, y, w, h in pixels, found {bbox}")
    x, y, w, h = bbox
    if w <= 0 or h <= 0:
        raise RecordError(f"column 'bbox' has no area: width {w:g}, height {h:g}")
    width, height = size
    return [x / width, y / height, (x + w) / width, (y + h) / height]
