"""One table of axes: what follows from it, and docs/adding_an_axis.md's example."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import forked
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


AXIS_OF_ITS_OWN = """
import json, re, sys
from pathlib import Path
import torch
from nuwa.grid import PatchGrid
from nuwa.methods import specify
from nuwa.stage2.recycling import Recycling, recycle
from pipelines.axes import AXES, COLUMNS
from pipelines.settings import load_settings
from pipelines.sweep.trials import Layouts, expand

layouts, costs = Layouts.fixed(PatchGrid(12, 12)), {"flops": 1.0, "flops_convention": "in words", "kv_bytes": 2.0}
trials = expand(load_settings(Path("params.yaml")).sweep, layouts, 8)
generator = torch.Generator().manual_seed(0)
hidden, scores, noise = (torch.rand(*shape, generator=generator) for shape in ((1, 60, 4), (1, 60), (1, 60)))
asked = hidden, scores, torch.arange(5)[None], 4
try:
    specify("nuwa", budget=32, stage2={"neighbours": 2})
except ValueError as error:
    refused = str(error)
told = {
    "rows": [trial.row(layouts, lambda schedule: costs)["stage2_neighbours"] for trial in trials],
    "ids": [trial.trial_id for trial in trials],
    "centres": [recycle(*asked, Recycling(1.0, 10, number), noise)[0].tolist() for number in (None, 1, 20)],
    "refused": refused,
    "documented": dict(re.findall(r"^\\| `(\\w+)` \\| (.*) \\|$", Path("docs/params.md").read_text(), re.MULTILINE)),
    "axes": {name: axis.meaning for name, axis in AXES.items()},
    "from": sys.modules["pipelines.axes"].__file__,
}
print(json.dumps(told))
"""


def edited(folder: Path) -> list[str]:
    """Copies what the guide changes into ``folder``, with its changes; returns the files it touches."""
    guide = (DOCS / "adding_an_axis.md").read_text()
    edits = re.findall(r"```diff\n# (\S+)\n(.*?)```", guide, re.DOTALL)
    for package in ("nuwa", "pipelines"):
        shutil.copytree(DOCS.parent / package, folder / package)
    (folder / "docs").mkdir()
    shutil.copy(DOCS / "params.md", folder / "docs")
    for name, hunks in edits:
        text = (folder / name).read_text()
        for hunk in hunks.split("@@\n"):
            before, after = ("\n".join(re.findall(rf"^\{sign}(.*)$", hunk, re.MULTILINE)) for sign in "-+")
            assert text.count(before) == 1, f"{name} has {text.count(before)} times: {before}"
            text = text.replace(before, after)
        (folder / name).write_text(text)
    return [name for name, _ in edits]


def test_the_guides_new_axis_touches_four_files_and_is_swept(tmp_path, params):
    assert edited(tmp_path) == ["nuwa/stage2/recycling.py", "nuwa/methods.py", "pipelines/axes.py", "docs/params.md"]
    cut = {"method": "sparsevlm", "budget": 32, "stage2_layer": [[1, 3, 5]]}
    params["sweep"]["grids"] = [{"name": "g", "stage2_neighbours": [2, 5], **cut}, {"name": "usual", **cut}]
    params["report"]["headline_budget"], params["search"]["swarm"] = 32, None
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))

    def sweep_it() -> None:
        """In a copy of this process that knows the libraries and forgets the project."""
        os.chdir(tmp_path)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("nuwa", "pipelines")]:
            del sys.modules[name]
        sys.path.insert(0, str(tmp_path))
        exec(AXIS_OF_ITS_OWN, {})

    ended = forked(sweep_it)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["from"] == str(tmp_path / "pipelines" / "axes.py")
    assert told["rows"] == [None, 2, 5, None] and len(set(told["ids"])) == 4
    usual, one, many = told["centres"]
    assert usual != one != many, "the science reads it"
    assert told["refused"] == "stage2_neighbours 2 needs a cut that recycles; set stage2_recycling: true"
    assert {name: told["documented"].get(name) for name in told["axes"]} == told["axes"]


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
