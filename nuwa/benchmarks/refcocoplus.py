"""RefCOCO+. Expressions by appearance; place words were forbidden to the writers."""

from __future__ import annotations

from nuwa.benchmarks.definition import COCO, TableSize
from nuwa.benchmarks.grounding import SHORT, referring_expressions

VARIANTS = referring_expressions(
    "refcocoplus",
    "RefCOCO+",
    "Modeling Context in Referring Expressions",
    {
        "val": TableSize(10_758, 1500, COCO, SHORT),
        "testA": TableSize(5726, 750, COCO, SHORT),
        "testB": TableSize(4889, 750, COCO, SHORT),
    },
)
