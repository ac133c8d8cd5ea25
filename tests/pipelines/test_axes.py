"""One table of axes: what follows from it, and docs/adding_an_axis.md's example."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError, create_model

from nuwa.grid import PatchGrid
from pipelines import axes
from pipelines.axes import AXES, COLUMNS, Axis, columns_of
from pipelines.settings import GridBlock, SweepSettings, load_settings
from pipelines.sweep.trials import Layouts, expand

DOCS = Path(__file__).parents[2] / "docs"
GRID, LAYERS = Layouts.fixed(PatchGrid(12, 12)), 8


@pytest.fixture(scope="module")
def sweep() -> SweepSettings:
    return load_settings(DOCS.parent / "params.yaml").sweep


def documented_axis() -> Axis:
    """The row that the guide shows."""
    (example,) = re.findall(r"^Axis\(.*\)$", (DOCS / "adding_an_axis.md").read_text(), re.MULTILINE)
    return eval(example, {"Axis": Axis})


def test_the_docs_table_is_the_table_of_axes():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (DOCS / "params.md").read_text(), re.MULTILINE)
    documented = dict(rows)
    assert {name: documented[name] for name in AXES} == {name: axis.meaning for name, axis in AXES.items()}


def test_the_guides_axis_is_swept_like_those_that_are_there(monkeypatch, sweep):
    axis = documented_axis()
    monkeypatch.setitem(AXES, axis.name, axis)
    fields: dict[str, Any] = {known.name: (known.annotation, known.usual) for known in AXES.values()}
    entry = create_model("Entry", __base__=GridBlock, **fields)(
        name="g", method="sparsevlm", budget=32.0, recycle=[True, False]
    )
    trials = expand(sweep.model_copy(update={"grids": [entry]}), GRID, LAYERS)

    recycled = [bool(trial.spec.stage2 and trial.spec.stage2.recycling) for trial in trials]
    assert recycled == [False, True, False]  # the unpruned trial comes first
    assert len({trial.trial_id for trial in trials}) == 3
    with pytest.raises(ValidationError, match="recycle"):
        create_model("Entry", __base__=GridBlock, **fields)(name="g", method="sparsevlm", recycle="perhaps")


def test_a_dotted_argument_is_a_key_of_a_mapping_and_null_leaves_it_out():
    values = dict.fromkeys(AXES) | {"method": "nuwa", "stage2_layer": 3, "seed": 1}
    assert axes.arguments(values) == {
        "method": "nuwa", "preset": None, "position": None, "budget": None, "stage2": {"layer": 3}, "seed": 1,
    }  # fmt: skip


def test_a_row_has_every_column_in_order(sweep):
    trial = expand(sweep, GRID, LAYERS)[1]
    costs = {"flops": 1.0, "flops_convention": "in words", "kv_bytes": 2.0}
    assert list(trial.row(GRID, lambda schedule: costs)) == list(COLUMNS)


def test_every_axis_is_shown_by_a_column_or_by_what_follows_from_it():
    # The ratio is shown by what it decides: how many tokens stage 1 and the last cut keep.
    assert set(AXES) - set(columns_of("parameter")) == {"stage2_ratio"}
