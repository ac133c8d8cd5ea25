"""How many files an addition touches: CONTRIBUTING.md says what the guides show, and their examples are built by tests."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = {"a method or a scorer": 1, "a benchmark": 2, "a model family": 2, "an axis of the sweep": 4}
BUILT_BY = {
    "a method or a scorer": "nuwa/test_adding_a_method.py",
    "a benchmark": "nuwa/benchmarks/test_adding_a_benchmark.py",
    "a model family": "nuwa/test_adding_a_model_family.py",
    "an axis of the sweep": "pipelines/test_axes.py",
}


def test_every_guide_touches_as_many_files_as_contributing_says():
    table = re.findall(
        r"^\| (an? .*?) \| \[.*?\]\((docs/\S+)\) \| (\d) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert {what: int(count) for what, _, count in table}.keys() == MOST.keys() == BUILT_BY.keys()
    for what, guide, count in table:
        shown = re.findall(r"^```(?:python|diff)\n# (\S+)$", (ROOT / guide).read_text(), re.MULTILINE)
        touched = {name for name in shown if not name.startswith("tests/")}
        assert len(touched) == int(count) <= MOST[what], f"{guide} shows {sorted(touched)}"
        assert Path(guide).name in (ROOT / "tests" / BUILT_BY[what]).read_text(), f"{what}: no test builds {guide}"
