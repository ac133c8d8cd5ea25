"""Referring expression comprehension: RefCOCO, RefCOCO+ and RefCOCOg differ in nothing but their tables' rows.

Every expression of a row's ``answer`` is a question of its own. Variants:

* ``as_published`` asks for shares of the image (LLaVA, the testbed) and compares them with the truth as they are told;
* ``unpadded`` asks the same, and takes the answer for shares of the square that an image is padded to: LLaVA-1.5 was
  trained with such boxes, so that under ``image_aspect_ratio: pad`` even a flawless model loses points as published
  (LLaVA's issues 606 and 1833). Square images agree. The two never stand in one table;
* ``pixels`` asks for JSON in absolute pixels of ``truth["size"]`` (Qwen2.5-VL): the size at which the model sees the
  image, which the caller of :meth:`Benchmark.examples` puts in the place of the image's own;
* ``thousandths`` asks for JSON on a frame of 1000 x 1000 whatever the image's size, as Qwen3-VL and InternVL3 were taught
  (github.com/QwenLM/Qwen3-VL, ``cookbooks/2d_grounding.ipynb``; internvl.readthedocs.io, grounding data);
* ``ref_tags`` asks as the InternVL series' own evaluation does, the expression between ``<ref>`` and ``</ref>``, for a box on
  the same frame (github.com/OpenGVLab/InternVL, ``internvl_chat/eval/refcoco/evaluate_grounding.py``). Deviation: that
  script takes a box whose four numbers come to less than 4 for shares of the image.

Under the protocol ``vscan`` any box of whole numbers counts, by :func:`nuwa.benchmarks.boxes.pixel_iou` above a half.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.boxes import THRESHOLDS, parse_box, pixel_iou, score_box, unpad_box, whole_boxes
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, TableSize, Truth
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
LOCATE = "Locate {} in this image and output the bbox coordinates in JSON format."
LEADING_ARTICLE = re.compile(r"(?:an?|the)\s+", re.IGNORECASE)
IN_PIXELS = (
    'Find the region this sentence describes and give its box in pixels as JSON {{"bbox_2d": [x1, y1, x2, y2]}}: {}'
)

IN_THOUSANDTHS = (
    "Find the region this sentence describes and give its box in relative coordinates from 0 to 1000 as JSON "
    '{{"bbox_2d": [x1, y1, x2, y2]}}: {}'
)
IN_TAGS = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
FRAME = (1000, 1000)
ON_FRAME = ("thousandths", "ref_tags")  # variants whose boxes are told on it

SHORT, LONG = 19, 46  # characters of 3.5 and of 8.4 words


def referring_expressions(name: str, title: str, paper: str, splits: Mapping[str, TableSize]) -> tuple[Benchmark, ...]:
    """The variants of one of the three benchmarks, ``as_published`` first."""
    harness = Rules("refcoco_ACC@0.5")  # the harness has this name for all three
    published = Benchmark(
        name=name,
        title=title,
        paper=paper,
        splits=splits,
        family="grounding",
        schema=SCHEMA,
        max_new_tokens=64,
        headline="acc@0.5",
        right="acc@0.5",
        read=partial(_examples, name, ()),
        llava_v1=lambda example: INSTRUCTION + example.question,
        score=_score_shares,
        variant="as_published",
        rules={"lmms_eval": harness, "lmms_eval_0_3": harness},
    )

    # The same answers, held against boxes on the square that LLaVA pads an image to.
    unpadded = replace(
        published, variant="unpadded", read=partial(_examples, name, ("padded",)), score=_score_padded_shares
    )

    # Models that were taught pixels are asked for them; VScan has its own question and counts any box of an answer.
    in_pixels = replace(
        published,
        variant="pixels",
        pixels=True,
        read=partial(_examples, name, ("size",)),
        llava_v1=lambda example: IN_PIXELS.format(example.question),
        score=_score_pixels,
        rules={
            "vscan": Rules(
                "IoU > 0.5 of any box",
                read=partial(_examples, name, ("size", "photo")),
                llava_v1=_locate,
                score=_score_any,
            )
        },
    )

    in_thousandths = replace(
        published,
        variant="thousandths",
        llava_v1=lambda example: IN_THOUSANDTHS.format(example.question),
        score=_score_thousandths,
        rules={},
    )
    # An answer repeats the expression, and digits are a token each.
    in_tags = replace(
        in_thousandths,
        variant="ref_tags",
        max_new_tokens=100,
        llava_v1=lambda example: IN_TAGS.format(example.question),
    )
    return published, unpadded, in_pixels, in_thousandths, in_tags


def _locate(example: Example) -> str:
    """One expression without its leading article."""
    return LOCATE.format(LEADING_ARTICLE.sub("", example.question.strip(), count=1))


def _score_shares(prediction: str, truth: Truth) -> Scores:
    return score_box(parse_box(prediction, "normalized"), truth["box"])


def _score_padded_shares(prediction: str, truth: Truth) -> Scores:
    box = parse_box(prediction, "normalized")
    return score_box(box and unpad_box(box, tuple(truth["padded"])), truth["box"])


def _score_pixels(prediction: str, truth: Truth) -> Scores:
    return score_box(parse_box(prediction, "pixels", tuple(truth["size"])), truth["box"])


def _score_thousandths(prediction: str, truth: Truth) -> Scores:
    return score_box(parse_box(prediction, "pixels", FRAME), truth["box"])


def _score_any(prediction: str, truth: Truth) -> Scores:
    """The best of all boxes by :func:`pixel_iou`, told on the image as the model sees it, in pixels of the photo.

    A share of exactly a threshold is not enough. The centre is that of the best box.
    """
    (seen_width, seen_height), (width, height) = truth["size"], truth["photo"]
    across, down = width / seen_width, height / seen_height
    boxes = [[x * across, y * down, right * across, bottom * down] for x, y, right, bottom in whole_boxes(prediction)]
    true = [truth["box"][0] * width, truth["box"][1] * height, truth["box"][2] * width, truth["box"][3] * height]

    best = max(boxes, key=lambda box: pixel_iou(box, true), default=None)
    iou = 0.0 if best is None else pixel_iou(best, true)
    shares = best and [best[0] / width, best[1] / height, best[2] / width, best[3] / height]
    above = {f"acc@{threshold}": float(iou > threshold) for threshold in THRESHOLDS}
    return score_box(shares, truth["box"]) | {"iou": iou} | above


def _examples(name: str, sizes: Collection[str], row: dict[str, Any]) -> Iterator[Example]:
    """``sizes``: the keys of the truth that hold width and height of the photo in pixels."""
    question_id, image = text(row, "question_id"), image_bytes(row["image"], "image")
    size = image_size(image, "image")
    truth: Truth = {"box": _shares(row["bbox"], size)} | {key: list(size) for key in sizes}
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
