"""The guide's method is one file, and the guide's own test holds it to the slow way."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
from oracles.pictures import KINDS, SHAPES

from nuwa import methods
from nuwa.grid import PatchGrid
from nuwa.methods import Recipe, specify
from nuwa.stage1 import METHODS

GUIDE = (Path(__file__).parents[2] / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", GUIDE, re.DOTALL))
METHOD, TEST = "nuwa/stage1/loudest.py", "tests/nuwa/test_stage1_loudest.py"


@pytest.fixture
def loudest(monkeypatch) -> types.ModuleType:
    """The guide's file, imported as the package imports all of its files."""
    name = "nuwa.stage1.loudest"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS))
    # Before the file is run, which would leave one of its own behind.
    monkeypatch.setitem(methods.RECIPES, "loudest", Recipe("loudest"))
    exec(compile(FILES[METHOD], name, "exec"), vars(module))
    return module


def test_the_guide_touches_one_file_tests_aside():
    assert list(FILES) == [METHOD, TEST] and "touches one file" in GUIDE
    assert "loudest" not in METHODS


def test_the_guides_test_passes(loudest):
    told: dict[str, object] = {}
    exec(compile(FILES[TEST], TEST, "exec"), told)
    check = told["test_the_longest_features_are_kept"]
    for kind in KINDS:
        for shape in SHAPES:
            check(kind, shape)


def test_it_combines_with_a_stage_2_and_any_positions(loudest):
    cut = {"layer": 4, "scorer": "attention_last_token", "ratio": 0.5}
    spec = specify("loudest", position="rpme", budget=16, stage2=cut, parameters={"power": 1})
    assert spec.schedule(PatchGrid(12, 12), 8).average_tokens == pytest.approx(16, abs=0.5)
    with pytest.raises(ValueError, match=r"loudest\.power -1 must be positive"):
        specify("loudest", budget=16, parameters={"power": -1})
