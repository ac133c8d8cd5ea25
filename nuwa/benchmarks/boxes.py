"""Boxes in answers: one parser with an explicit coordinate space, and the measures of referring expressions.

A box is ``[left, top, right, bottom]``; everything but the parser's input is in shares of the image, 0..1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from nuwa.benchmarks.definition import Scores

Space = Literal["normalized", "pixels"]
Box = Sequence[float]

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
TOLERANCE = 1e-9  # an IoU of exactly a half can come out as 0.49999999999999994

BRACKETS = re.compile(r"\[([^\[\]]*)\]")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def unpad_box(box: Box, photo: tuple[float, float]) -> list[float]:
    """A box in shares of the square that LLaVA-1.5 pads an image to, in shares of the image itself.

    x' = (x · side − offset) / width with side the longer of the image's, and offset half of what is padded, rounded down.

    Args:
        photo: width and height of the image in pixels.
    """
    width, height = photo
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return [
        (box[0] * side - left) / width,
        (box[1] * side - top) / height,
        (box[2] * side - left) / width,
        (box[3] * side - top) / height,
    ]


WHOLE_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]", re.ASCII)


def whole_boxes(answer: str) -> list[list[float]]:
    """Every ``[a, b, c, d]`` of whole numbers in ``answer``."""
    # longer numbers lie outside every image, and their floats may be infinite
    return [[float(number[:16]) for number in match.groups()] for match in WHOLE_BOX.finditer(answer)]


def pixel_iou(one: Box, other: Box) -> float:
    """Intersection over union of boxes in pixels as VLM-R1's script has it, and Nüwa's and VScan's after it.

    The last row and column of a box belong to its overlap, which counts only where it is wider and higher than one
    pixel: ``min(right) − 1 > max(left)``. The areas of the boxes are plain.
    """
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[2] - 1, other[2] - 1), min(one[3] - 1, other[3] - 1)
    overlap = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0.0
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - overlap
    return overlap / union if union > 0 else 0.0


def parse_box(answer: str, space: Space, size: tuple[float, float] | None = None) -> list[float] | None:
    """The first ``[a, b, c, d]`` in ``answer`` as shares of the image, or ``None``; blanks may stand anywhere.

    Args:
        answer: any text; JSON such as ``{"bbox_2d": [1, 2, 3, 4]}`` is one.
        space: ``normalized`` answers are shares already, ``pixels`` are divided by ``size``.
        size: width and height of the image that the pixels belong to.

    Raises:
        ValueError: an unknown space, or pixels without a positive size.
    """
    if space not in ("normalized", "pixels"):
        raise ValueError(f"coordinate space {space!r} does not exist; choose normalized or pixels")
    if space == "pixels" and (size is None or min(size) <= 0):
        raise ValueError(f"boxes in pixels need a positive image size (width, height), got {size}")

    for match in BRACKETS.finditer(answer):
        parts = "".join(match[1].split()).split(",")
        if len(parts) == 4 and all(NUMBER.fullmatch(part) for part in parts):
            box = [float(part) for part in parts]
            if all(math.isfinite(value) for value in box):
                width, height = size if space == "pixels" and size is not None else (1, 1)
                return [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
    return None


def is_inverted(box: Box) -> bool:
    """Right of its right edge or below its bottom."""
    return box[2] < box[0] or box[3] < box[1]


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union; 0 for an inverted box and for a union without area. Nothing is clamped to the image."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    overlap = width * height if width > 0 and height > 0 else 0.0
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - overlap
    return overlap / union if union > 0 else 0.0


def score_box(box: Box | None, truth: Box) -> Scores:
    """Measures of one predicted box, ``None`` being an answer without one: IoU, IoU ≥ t, centre inside, parse failure.

    The centre counts when the middle of the prediction lies in the true box, its edges included.
    """
    iou = 0.0 if box is None else box_iou(box, truth)
    scores = {"iou": iou}
    for threshold in THRESHOLDS:
        scores[f"acc@{threshold}"] = float(iou >= threshold - TOLERANCE)
    scores["center"] = float(box is not None and not is_inverted(box) and _center_inside(box, truth))
    scores["parse_failure"] = float(box is None)
    return scores


def _center_inside(box: Box, truth: Box) -> bool:
    x, y = box[0] / 2 + box[2] / 2, box[1] / 2 + box[3] / 2
    return truth[0] - TOLERANCE <= x <= truth[2] + TOLERANCE and truth[1] - TOLERANCE <= y <= truth[3] + TOLERANCE
