"""Plugins in the pipeline: loaded by name, part of the identity of their own trials only, isolated where they fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import plugin_run
import pytest
import yaml
from forked import forked
from PIL import Image
from warm_workers import warm_program

from nuwa.plugins import PluginError, load_plugins, plugin_code
from nuwa.stage1 import get_method
from pipelines.files.code_package import code_files
from pipelines.settings import SettingsError, parse_settings
from stages.inputs import inputs

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "plugin_run.py"
METHODS = '''
"""A plugin."""
from dataclasses import dataclass
from nuwa.benchmarks import register_benchmark
from nuwa.benchmarks.own_tables import own_benchmark
from nuwa.selection import keep_unmerged
from nuwa.stage1 import register
from nuwa.stage2 import register_scorer
from ranks.order import order


@dataclass(frozen=True)
class Own:
    pass


@register("own", Own)
def select(signals, keep, config, seed=0):
    return keep_unmerged(signals, order(signals.features)[:, :keep].sort(dim=1).values)


@register("broken", Own)
def fail(signals, keep, config, seed=0):
    raise RuntimeError("this plugin is broken")


@register_scorer("own_score", reads_attention=False)
def score(evidence):
    return evidence.visual.float().norm(dim=-1)


register_benchmark(own_benchmark("signs", "Signs", "exact"))
'''
ORDER = """
def order(features):
    return features.float().norm(dim=-1).sort(dim=1, descending={falling}, stable=True).indices
"""


@pytest.fixture
def project(tmp_path) -> Path:
    package = tmp_path / "ranks"
    package.mkdir()
    (package / "__init__.py").write_text(METHODS)
    (package / "order.py").write_text(ORDER.format(falling=True))
    return tmp_path


@pytest.fixture
def asked(params) -> dict:
    grids = [
        {"name": "own", "method": ["own", "broken", "random"], "budget": 16},
        {"name": "score", "method": "fastv", "budget": 32, "stage2_scorer": ["own_score", "random"]},
    ]
    benchmarks = ["refcoco", "pope"]
    params["sweep"] |= {"grids": grids, "benchmarks": benchmarks}
    return {"params": params | {"plugins": ["ranks"], "search": params["search"] | {"swarm": None}}}


def run(project: Path, asked: dict) -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        warm_program(PROGRAM),
        input=json.dumps(asked),
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def trials_of(project: Path, asked: dict) -> dict[str, str]:
    """Label → id of the trials, in a copy of this process: it has not imported the plugin."""

    def tell() -> None:
        os.chdir(project)
        json.dump(plugin_run.main(asked)["trials"], sys.stdout)

    ended = forked(tell)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_a_change_to_a_plugin_changes_its_own_trials_only(project, asked):
    before = trials_of(project, asked)
    (project / "ranks" / "order.py").write_text(ORDER.format(falling=False))
    after = trials_of(project, asked)
    changed = {label for label in before if before[label] != after[label]}
    assert changed == {"own · 16 · pesp"}, "its neighbour in the plugin does not rank"
    assert len(before) == 6


def test_the_pipeline_runs_a_plugins_method_scorer_and_benchmark_and_isolates_one_that_fails(
    project, asked, bench, warm
):
    """From the plugin's own table by ``prepare`` to answers of Ray's workers, scored by the plugin's rule."""
    rows = []
    for number, colour in enumerate(["red", "blue", "green"]):
        Image.new("RGB", (96, 96), colour).save(project / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"Sign {number}?", "answers": [colour]})
    (project / "tables").mkdir()
    (project / "tables" / "signs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for picture in project.glob("*.png"):
        picture.rename(project / "tables" / picture.name)
    asked["params"]["model"] |= {"path": bench.model}
    asked["params"]["prepare"] |= {"tables": {"signs": "tables"}}
    asked["params"]["sweep"] |= {"benchmarks": ["signs"]}
    asked["sweep"] = {"encoder": bench.encoder, "said": ["red", "a red one", "Green."]}
    told = run(project, asked)
    assert list(told["failed"]) == ["broken · 16 · pesp"]
    assert "this plugin is broken" in told["failed"]["broken · 16 · pesp"]
    assert set(told["answered"]) == set(told["trials"]) - set(told["failed"])
    assert told["questions"] == [row["question"] for row in rows] and told["scores"] == [1, 0, 1]


def test_a_plugin_in_the_project_folder_travels_and_is_digested(project, monkeypatch):
    assert {"ranks/__init__.py", "ranks/order.py"} <= set(code_files(project))
    monkeypatch.chdir(project)
    digests = []
    for falling in (True, False):
        (project / "ranks" / "order.py").write_text(ORDER.format(falling=falling))

        class Memo:
            def of(self, place):
                return "".join(path.read_text() for path in sorted(place.rglob("*.py")))

        digests.append(inputs({"plugins": ["ranks"]}, Memo())["plugins"])
    assert list(digests[0]) == ["ranks"] and digests[0] != digests[1]


def test_code_of_this_package_is_no_plugins():
    assert plugin_code(get_method("nuwa").select) == ""


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "plugins: {name}: no such module; install it, or put it into the project folder"),
        ("1 / 0\n", "plugins: {name}: ZeroDivisionError: division by zero ({name}.py, line 1); mend it or take it out"),
        (
            "import nowhere_at_all\n",
            "plugins: {name}: ModuleNotFoundError: No module named 'nowhere_at_all' ({name}.py, line 1); mend it or "
            "take it out",
        ),
        (
            "from nuwa.stage1 import register\nfrom nuwa.stage1.random import Random\n"
            "register('nuwa', Random)(lambda *_: None)\n",
            "plugins: {name}: stage-1 method 'nuwa' is registered twice; choose another name for the second",
        ),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_named(tmp_path, monkeypatch, request, content, line, params):
    name = f"plugin_{abs(hash(content)) % 10**6}"
    monkeypatch.syspath_prepend(str(tmp_path))
    if content is not None:
        (tmp_path / f"{name}.py").write_text(content)
    with pytest.raises(PluginError) as caught:
        load_plugins([name])
    assert str(caught.value) == line.format(name=name)
    with pytest.raises(SettingsError) as refused:
        parse_settings(yaml.safe_dump(params | {"plugins": [name]}), "params.yaml")
    assert str(refused.value) == f"params.yaml: {line.format(name=name)}"
