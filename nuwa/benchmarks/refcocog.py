"""RefCOCOg. Long expressions. The test split is the comparable one, ``val`` mixes two split systems."""

from __future__ import annotations

from nuwa.benchmarks.definition import COCO, TableSize
from nuwa.benchmarks.grounding import LONG, referring_expressions

GOOGLE = round(5000 * 95_010 / 49_822)  # expressions of 5,000 objects, as of RefCOCOg on average

VARIANTS = referring_expressions(
    "refcocog",
    "RefCOCOg",
    "Generation and Comprehension of Unambiguous Object Descriptions",
    {
        "val": TableSize(4896 + GOOGLE, 1300 + 4650, COCO, LONG),  # images: at most, the two splits may share some
        "test": TableSize(9602, 2600, COCO, LONG),
    },
)
