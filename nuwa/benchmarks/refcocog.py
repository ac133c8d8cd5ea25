"""RefCOCOg. Long expressions. The test split is the comparable one, ``val`` mixes two split systems."""

from __future__ import annotations

from nuwa.benchmarks.grounding import referring_expressions

VARIANTS = referring_expressions("refcocog")
