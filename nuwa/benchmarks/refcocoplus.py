"""RefCOCO+. Expressions by appearance; place words were forbidden to the writers."""

from __future__ import annotations

from nuwa.benchmarks.grounding import referring_expressions

VARIANTS = referring_expressions("refcocoplus")
