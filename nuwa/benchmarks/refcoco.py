"""RefCOCO. Short expressions; place words are allowed. testA shows people, testB other things."""

from __future__ import annotations

from nuwa.benchmarks.grounding import referring_expressions

VARIANTS = referring_expressions("refcoco")
