"""What is said of answers by dtype is what `make agreement` measured, and in float32 what it measures here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import agreement

ROOT = Path(__file__).parents[1]
DTYPES = ("float32", "bfloat16", "float16")
LINES = {  # of docs/architecture.md → what is compared
    "unpruned, against stock `generate` one by one": "stock",
    "pruned, one image at a time against eight": "batch",
    "features from a float32 store against fresh ones": "cache32",
    "features from a float16 store against fresh ones": "cache16",
}


def differing(compared: str, dtype: str) -> int:
    """Answers that differed, of all models."""
    rows = [row for row in json.loads(agreement.FIGURES.read_text()) if row["dtype"] == dtype]
    assert [row["model"] for row in rows] == ["testbed", "tiny llava", "tiny llava_next", "tiny qwen2_5_vl"]
    assert sum(row["answers"] for row in rows) == 100
    return sum(round(row[compared] * row["answers"]) for row in rows)


@pytest.mark.parametrize("line", LINES)
def test_figures_of_the_architecture_are_those_that_were_measured(line):
    page = (ROOT / "docs" / "architecture.md").read_text()
    (cells,) = re.findall(rf"^\| {re.escape(line)} \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert list(map(int, cells)) == [differing(LINES[line], dtype) for dtype in DTYPES]


def test_the_readme_promises_equality_in_float32_alone():
    page = " ".join((ROOT / "README.md").read_text().split())
    assert "in float32 unpruned answers are those of `generate`." in page
    words = {0: "none"}
    some, others = (differing("stock", dtype) for dtype in DTYPES[1:])
    said = f"Of 100 answers {words.get(some, some)} differed in bfloat16 and {words.get(others, others)} in float16"
    assert said in page and differing("stock", "float32") == 0


@torch.inference_mode()
def test_in_float32_none_differs_and_in_bfloat16_few_do():
    exact = agreement.measured(agreement.tiny("llava", 6, torch.float32))
    del exact["cache16"]  # rounds what is kept
    assert exact == dict.fromkeys(("stock", "batch", "cache32"), 0.0)
    half = agreement.tiny("llava", 6, torch.bfloat16)
    answers = half.unpruned()
    assert answers == half.unpruned(), "the same batches on the same device"
    assert agreement._differing(answers, half.stock()) <= 1 / 2


def test_what_differs_is_counted():
    some = [(1, 2), (3,), (4, 5)]
    assert agreement._differing(some, [(1, 2), (3, 3), (4,)]) == pytest.approx(2 / 3)
    assert agreement._until_the_end([7, 8, 2, 0, 0], ends=[2]) == (7, 8)
