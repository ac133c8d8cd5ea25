"""The stage `search` on a random model: what it leaves, that it asks nothing twice, and what MLflow shows."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from stores import copy_store
from workers_here import work_here

from pipelines.settings import SettingsError, load_settings
from pipelines.sweep.results import ResultStore
from stages.entry import EXAMPLES
from stages.prepare import prepare
from stages.search import search

ROOT = Path(__file__).parents[2]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
SPACE = {"stage2_layer": [2, 6], "parameters": {"pillar_quantile": {"low": 0.0, "high": 1.0}}}
GRIDS = [{"name": "methods", "method": ["nuwa", "random"], "position": ["perc", "pesp"]}]


def settings_of(folder: Path, **changes):
    params = copy.deepcopy(PARAMS)
    params["model"]["path"] = "tiny"
    params["prepare"] |= {"images": 24, "questions": {"pope": 1, "gqa": 1}}
    params["cluster"]["workers"] = 1
    params["sweep"] |= {"benchmarks": ["pope", "gqa"], "images": 12, "budgets": [16], "grids": GRIDS}
    params["evaluate"]["resamples"] = 100
    params["search"]["swarm"] |= {"preset": "released", "objective": "vqa", "trials": 2, "batch": 2, "space": SPACE}
    params["search"] |= {"shares": [0.85, 1.0]} | changes
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return load_settings(path)


@pytest.fixture
def work(tiny_vlm, new_store, tmp_path, monkeypatch) -> Path:
    """A folder with a random model and prepared questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tiny_vlm.model.save_pretrained("tiny")
    tiny_vlm.processor.save_pretrained("tiny")
    copy_store(new_store, tmp_path / "mlflow.db")
    prepare(settings_of(tmp_path))
    # A random model never ends an answer by itself.
    pd.read_parquet(EXAMPLES).assign(max_new_tokens=3).to_parquet(EXAMPLES)
    return tmp_path


def test_a_search_leaves_its_tables_and_runs_and_asks_nothing_twice(work, capsys, monkeypatch):
    settings = settings_of(work)
    work_here(monkeypatch)
    search(settings)
    trials, points = (pd.read_csv(work / "data" / "search" / name) for name in ("trials.csv", "swarm.csv"))
    summary = json.loads((work / "data" / "search" / "search.json").read_text())
    assert len(trials) == 5 and trials["rung"].between(1, 2).all()
    assert summary["answers"] == trials["answers"].sum() and summary["full_answers"] == 5 * 24
    assert [rung["images"] for rung in summary["rungs"]] == [11, 12]
    assert points["number"].tolist()[1:] == [0, 1] and points["state"].iloc[0] == "preset"
    assert summary["swarm"]["unseen_images"] == 12
    assert f"asked {summary['answers']} of {summary['full_answers']}" in capsys.readouterr().out

    client = MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name(PARAMS["tracking"]["experiment"]).experiment_id])
    (parent,) = (run for run in runs if "sweep_id" in run.data.tags)
    children = {run.data.tags["trial_id"]: run for run in runs if run is not parent}
    assert set(children) == {f"point {number}" for number in range(2)}
    for row in points.iloc[1:].itertuples():
        run = children[f"point {int(row.number)}"]
        assert run.info.status == "FINISHED" and run.data.params["state"] == row.state
        assert run.data.metrics.get("objective", float("nan")) == pytest.approx(row.objective, nan_ok=True)
    history = client.get_metric_history(parent.info.run_id, "race/answers")
    assert [(point.step, point.value) for point in history] == [
        (rung["rung"], rung["answers"]) for rung in summary["rungs"]
    ]

    held = {path.name: path.read_bytes() for path in (work / "data" / "search").iterdir()}
    units = ResultStore(work / "cache" / "results").done()
    search(settings)
    assert "0 answers were new" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (work / "data" / "search").iterdir()} == held
    assert ResultStore(work / "cache" / "results").done() == units
    search(settings_of(work, swarm=None))
    assert not (work / "data" / "search" / "swarm.csv").exists(), "what is not of this search goes"


def test_workers_of_ray_race_to_the_same_table(work, warm, monkeypatch):
    settings, table = settings_of(work, swarm=None), work / "data" / "search" / "trials.csv"
    with monkeypatch.context() as here:
        work_here(here)
        search(settings)
    alone = table.read_bytes()
    shutil.rmtree(work / "cache" / "results")
    table.unlink()
    search(settings)
    assert table.read_bytes() == alone
    assert ResultStore(work / "cache" / "results").done()


def test_a_first_slice_too_small_is_refused_before_any_work(work):
    with pytest.raises(SettingsError) as raised:
        search(settings_of(work, shares=[0.5, 1.0]))
    assert str(raised.value) == (
        "search.shares.0 = 0.5: the first slice has 6 of 12 images; an interval over images needs at least 10"
    )
    assert not (work / "cache").exists() and not (work / "data" / "search").exists()
