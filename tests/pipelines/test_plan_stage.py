"""`make plan` beside the store: what it says is missing is what the next sweep does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bench import BENCHMARKS, ROOT
from workers_here import work_here

from pipelines.sweep.results import ResultStore, StoredUnit, file_of, unit_name
from stages.entry import run_stage
from stages.plan import plan
from stages.sweep import sweep
from stages.track import _origins

GRID = [{"name": "methods", "method": ["nuwa", "random"], "budget": 16}]
MORE = [*GRID, {"name": "cuts", "method": "nuwa", "budget": 16, "stage2_layer": [2, 6]}]


@pytest.fixture
def project(model_folder, prepared, examples, params, tmp_path, monkeypatch) -> Path:
    """A folder in which stages run: a tiny model, twelve images, one grid."""
    shutil.copytree(model_folder, tmp_path / "models" / "tiny")
    (tmp_path / "data").mkdir()
    shutil.copy(prepared / "images.parquet", tmp_path / "data")
    # A random model never ends an answer by itself.
    examples.assign(max_new_tokens=3).to_parquet(tmp_path / "data" / "examples.parquet")
    params["model"]["path"] = "models/tiny"
    params["cluster"] |= {"workers": 1, "cpus": 1}
    params["sweep"] |= {"benchmarks": BENCHMARKS, "images": 12, "unit_images": 4, "budgets": [16], "grids": GRID}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    work_here(monkeypatch)
    return tmp_path


def of_the_store(capsys) -> list[str]:
    run_stage(plan)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("stored:", "to come:"))]


def with_grid(project: Path, grids: list[dict]) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["sweep"]["grids"] = grids
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def test_the_plan_and_the_sweep_say_what_a_grid_leaves_out(project, capsys):
    reach = {"name": "cuts", "method": ["fastv", "pyramiddrop"], "budget": [16, 48], "where_reachable": True}
    with_grid(
        project, [*GRID, {**reach, "position": ["perc", "pesp"]}, {**reach, "name": "more", "method": "sparsevlm"}]
    )
    run_stage(plan)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("grid ")]
    assert told == [
        "grid 'cuts' leaves out 4 trials that cannot be reached: fastv at 16; pyramiddrop at 16 (the first: budget 16 is "
        "out of reach with a stage-2 cut before layer 1 of 8: allowed 18.88..144 average tokens)",
        "grid 'more' leaves out 1 trial that cannot be reached: sparsevlm at 16 (the first: budget 16 is out of reach "
        "with stage-2 cuts before layers 1, 2, 4 of 8: allowed 18.88..144 average tokens)",
    ]
    run_stage(sweep)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("grid ")] == told


def swept(project: Path) -> list[dict]:
    """The units of all sweeps so far."""
    run_stage(sweep)
    return [json.loads(line) for line in (project / "cache" / "units.jsonl").read_text().splitlines()]


HEAVY = ("transformers", "accelerate", "sklearn", "scipy.stats", "mlflow", "ray", "dvc", "optuna", "matplotlib")


def test_a_folder_that_is_known_is_planned_without_importing_what_it_takes_to_run(project, capsys):
    run_stage(plan)
    told = capsys.readouterr().out
    program = (
        "import sys; from stages.entry import run_stage; from stages.plan import plan; run_stage(plan); "
        f"print('imported:', *sorted(set({HEAVY}) & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=project, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{told}imported:\n")


def test_the_plan_says_what_the_next_sweep_does(project, capsys):
    assert of_the_store(capsys) == [], "nothing is stored, so nothing is missing"
    first = swept(project)
    answers = sum(row["trials"] * row["examples"] for row in first)
    assert of_the_store(capsys) == [
        f"stored: {answers} of {answers} answers",
        "to come: 0 answers, 0.00 TFLOP, 0 seconds, 0.00 GPU hours",
    ]

    with_grid(project, MORE)
    stored, to_come = of_the_store(capsys)
    new = swept(project)[len(first) :]
    missing = sum(row["trials"] * row["examples"] for row in new)
    assert missing == 2 * answers // 3, "two trials join three"
    assert stored == f"stored: {answers} of {answers + missing} answers"
    said = re.fullmatch(rf"to come: {missing} answers, ([\d.]+) TFLOP, .+ seconds, 0\.00 GPU hours", to_come)
    assert said.group(1) == f"{sum(row['flops'] for row in new) / 1e12:.2f}"

    # Weights are read once a change of files: others of the same size and time go unnoticed until then.
    weights = project / "models" / "tiny" / "model.safetensors"
    known, whole = weights.stat(), weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\1\2\3\4")
    os.utime(weights, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert of_the_store(capsys)[0] == f"stored: {answers + missing} of {answers + missing} answers"
    os.utime(weights)
    assert of_the_store(capsys)[0] == f"stored: 0 of {answers + missing} answers"


def test_answers_of_other_versions_are_taken_and_told_or_asked_again(project, capsys):
    """A unit as an earlier torch would have left it, beside all others; before that, no unit but the tables of them."""
    answers = sum(row["trials"] * row["examples"] for row in swept(project))
    results = project / "cache" / "results"
    results.rename(project / "aside")  # as in a clone that pulled the tables alone
    assert of_the_store(capsys)[0] == f"stored: {answers} of {answers} answers"
    assert not results.exists() or not ResultStore(results).done(), "a plan writes no answers"
    shutil.rmtree(results, ignore_errors=True)
    (project / "aside").rename(results)

    store = ResultStore(results)
    unit = store.done()[0]
    (tables,) = store.read_all([unit.unit])
    older = tuple(f"{answer.rpartition('.')[0]}.{'0' * 8}" for answer in unit.trials)
    origin = json.dumps(unit.origin | {"torch": "2.0"})
    store.write(StoredUnit(unit_name(older, unit.examples), older, unit.examples, origin), tables)
    (results / file_of(unit.unit)).unlink()
    count = len(unit.trials) * len(unit.examples)

    capsys.readouterr()
    run_stage(sweep)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("answers of mixed provenance: ")]
    facts = json.loads((project / "data" / "sweep.json").read_text())
    words = facts["provenance"]
    assert told == [f"answers of mixed provenance: {'; '.join(words)}"] and len(words) == 2
    assert sorted(one.split(",")[0] for one in words) == sorted(["torch 2.0", f"torch {torch.__version__}"])
    assert _origins(facts) == {"answers": f"of mixed provenance: {'; '.join(words)}"}, "the tag of MLflow"

    params = yaml.safe_load((project / "params.yaml").read_text())
    params["sweep"]["reuse"] = "same_versions"
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    assert of_the_store(capsys)[0] == f"stored: {answers - count} of {answers} answers"
    run_stage(plan)
    trials = len(unit.trials)
    assert f"why: other versions or device: {count} answers of {trials} trial{'s' if trials > 1 else ''}" in (
        capsys.readouterr().out.splitlines()
    )
    run_stage(sweep)
    assert "mixed provenance" not in capsys.readouterr().out
    (one,) = json.loads((project / "data" / "sweep.json").read_text())["provenance"]
    assert one.startswith(f"torch {torch.__version__}")
