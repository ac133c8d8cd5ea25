"""RefCOCO. Short expressions; place words are allowed. testA shows people, testB other things.

``val`` and ``test`` join Google's split to UNC's: 5,000 objects of Google's have as many expressions as RefCOCO on
average.
"""

from __future__ import annotations

from nuwa.benchmarks.definition import COCO, TableSize
from nuwa.benchmarks.grounding import SHORT, referring_expressions

GOOGLE = round(5000 * 142_209 / 50_000)  # expressions of 5,000 objects

VARIANTS = referring_expressions(
    "refcoco",
    "RefCOCO",
    "Modeling Context in Referring Expressions",
    {
        "val": TableSize(10_834 + GOOGLE, 1500 + 4559, COCO, SHORT),  # images: at most, the two splits may share some
        "test": TableSize(GOOGLE, 4527, COCO, SHORT),
        "testA": TableSize(5657, 750, COCO, SHORT),
        "testB": TableSize(5095, 750, COCO, SHORT),
    },
)
