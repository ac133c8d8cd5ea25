"""The guide's example is a benchmark: found without a list, read, asked, scored, priced."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

import nuwa.benchmarks
from nuwa.benchmarks import BENCHMARKS, Benchmark, read_folders
from nuwa.registry import NameTaken

GUIDE = (Path(__file__).parents[3] / "docs" / "adding_a_benchmark.md").read_text(encoding="utf-8")
FILES = {
    Path(match[1]).stem: match[0]
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    if (match := re.match(r"# (nuwa/benchmarks/\w+\.py)\n.*", block, re.DOTALL))
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder that belongs to the package, with the guide's file in it."""
    for name, content in FILES.items():
        (tmp_path / f"{name}.py").write_text(content, encoding="utf-8")
    monkeypatch.setattr(nuwa.benchmarks, "__path__", [*nuwa.benchmarks.__path__, str(tmp_path)])
    yield tmp_path
    for name in FILES:
        sys.modules.pop(f"nuwa.benchmarks.{name}", None)
        monkeypatch.delattr(nuwa.benchmarks, name, raising=False)


@pytest.fixture
def clocks(folder) -> Benchmark:
    return read_folders(nuwa.benchmarks.__path__)["clocks"][0]


def table(*times: str) -> pa.Table:
    photo = io.BytesIO()
    Image.new("RGB", (8, 8)).save(photo, "PNG")
    image = {"bytes": photo.getvalue(), "path": None}
    rows = [{"id": str(n), "image": image, "time": time, "style": "roman"} for n, time in enumerate(times)]
    kinds = {"id": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    return pa.Table.from_pylist(rows, pa.schema(kinds | {"time": pa.string(), "style": pa.string()}))


def test_the_guide_is_one_file_and_nothing_else_knows_of_it(folder):
    assert list(FILES) == ["clocks"] and "clocks" not in BENCHMARKS
    assert set(read_folders(nuwa.benchmarks.__path__)) == {"clocks", *BENCHMARKS}


def test_the_order_is_that_of_the_files_and_stands_still(folder):
    first, again = (list(read_folders(nuwa.benchmarks.__path__)) for _ in range(2))
    assert first == again and list(BENCHMARKS) == sorted(BENCHMARKS)


def test_a_name_that_is_taken_is_refused(folder):
    (folder / "dials.py").write_text("from dataclasses import replace\nfrom nuwa.benchmarks.clocks import VARIANTS\n"
                                     "VARIANTS = (replace(VARIANTS[0]),)\n")  # fmt: skip
    with pytest.raises(NameTaken, match=r"^benchmark 'clocks' is registered twice; choose another name"):
        read_folders(nuwa.benchmarks.__path__)
    sys.modules.pop("nuwa.benchmarks.dials", None)


def test_its_rows_are_asked_and_scored(clocks):
    one, other = clocks.examples(table("10:45", "12:02"))
    assert (one.example_id, one.category, one.truth) == ("clocks:0", "roman", {"answer": "10:45"})
    word = "\nAnswer the question using a single word or phrase."
    assert clocks.prompt(one, "llava_v1") == "What time does the clock show?" + word
    answers = ["It is 10:50.", "11:59"]
    scored = clocks.score_table(answers, [one.truth, other.truth], ["roman"] * 2)
    assert clocks.aggregate(scored) == {"accuracy": 1, "parse_failure": 0}
    assert clocks.score("10:51", one.truth) == {"accuracy": 0, "parse_failure": 0}
    assert clocks.score("a quarter to eleven", one.truth) == {"accuracy": 0, "parse_failure": 1}


def test_its_facts_stand_with_it(clocks):
    assert clocks.splits["test"].questions == 1200 and clocks.family == "vqa"
    assert clocks.title == "Clocks" and clocks.right in clocks.score("1:00", {"answer": "1:00"})
