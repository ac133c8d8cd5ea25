"""``make report INTERIM=1`` beside a sweep that is half done: what it shows is what the whole sweep says of the same
questions."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import pytest
import test_plan_stage
import torch
import yaml
from bench import BENCHMARKS
from mlflow import MlflowClient
from stores import copy_store

from nuwa.stage1.learnpruner import Lpm, save_lpm
from nuwa.vlm import load_adapter
from pipelines.sweep.results import ResultStore, StoredUnit, unit_name
from pipelines.tracking.runs import metric_key
from stages.entry import DATA, EXAMPLES, INTERIM, PREDICTIONS, TRIALS, run_stage
from stages.evaluate import score_tables
from stages.interim import interim
from stages.sweep import sweep

project = test_plan_stage.project


def half_done(store: ResultStore) -> set[str]:
    """Leave one unit whole, another without its last trial, and no more; the images of the first."""
    whole, cut, *others = store.done()
    (tables,) = store.read_all([cut.unit])
    trials = cut.trials[:-1]
    wanted = [answer.partition(".")[0] for answer in trials]
    rows = {
        part: table.filter(pc.is_in(table["trial_id"], pc.cast(wanted, "string"))) for part, table in tables.items()
    }
    store.write(StoredUnit(unit_name(trials, cut.examples), trials, cut.examples, cut.provenance), rows)
    for unit in (cut, *others):
        store.remove(unit.unit)
    return set(store.read(whole.unit)["predictions"]["example_id"].to_pylist())


def trained(model: Path, path: Path) -> None:
    """Weights of LearnPruner for the encoder of the model in a folder."""
    vlm = load_adapter(model, "cpu", torch.float32)
    torch.manual_seed(0)
    save_lpm(Lpm(vlm.signal_widths(vlm.model.config)["features"]), path, vlm.encoder_identity, {})


def test_a_sweep_that_is_half_done_is_shown_on_what_all_trials_have_answered(
    project, new_store, capsys, tmp_path, monkeypatch
):
    copy_store(new_store, project / "mlflow.db")
    # The sweep finds them by their encoder, and its trials are called by them; so must whoever looks for its answers.
    monkeypatch.setenv("NUWA_PRUNER", str(tmp_path / "store"))
    trained(project / "models" / "tiny", tmp_path / "store" / "mine.safetensors")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["sweep"]["grids"] = [{"name": "methods", "method": ["learnpruner", "random"], "budget": 16}]
    params["evaluate"] |= {"resamples": 100, "against": {"method": "random", "preset": None}}
    params["report"] |= {"headline_budget": 16}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    examples = pd.read_parquet(EXAMPLES)
    examples = examples[examples["benchmark"].isin(BENCHMARKS)]
    everything = 3 * len(examples)
    with pytest.raises(SystemExit) as refused:
        run_stage(interim)
    told = f"no question has an answer of all 3 trials yet: 0 of {everything} answers are made; ask again later"
    assert refused.value.code == 1 and f"error: {told}\n" in capsys.readouterr().err
    run_stage(sweep)
    answered = half_done(ResultStore(project / "cache" / "results"))
    assert 0 < len(answered) < len(examples)
    tracked = {path: path.read_bytes() for path in DATA.rglob("*") if path.is_file()}
    capsys.readouterr()
    run_stage(interim)

    made = 3 * len(answered) + 2 * len(answered)
    line = (
        f"INTERIM: {len(answered)} of {len(examples)} questions, those that all 3 trials have answered so far; {made} of "
        f"{everything} answers are made. The rest will change these figures."
    )
    assert capsys.readouterr().out.splitlines()[0] == line
    page, markdown = ((INTERIM / "report" / name).read_text() for name in ("index.html", "report.md"))
    assert f"<strong>{line}</strong>" in page and "<title>INTERIM: " in page
    assert markdown.startswith("# INTERIM: Visual token pruning") and f"**{line}**" in markdown.splitlines()

    # The same questions of the whole sweep's tables come to the same.
    some = examples[examples["example_id"].isin(answered)].reset_index(drop=True)
    chosen = pd.read_parquet(PREDICTIONS)
    chosen[chosen["example_id"].isin(answered)].to_parquet(tmp_path / "some.parquet")
    expected = score_tables(TRIALS, some, tmp_path / "some.parquet", 100, params["evaluate"]["seed"])
    scores = pd.read_parquet(INTERIM / "data" / "scores.parquet")
    pd.testing.assert_frame_equal(scores, expected)
    assert {path: path.read_bytes() for path in DATA.rglob("*") if path.is_file()} == tracked

    client = MlflowClient(params["tracking"]["uri"] or "sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name(params["tracking"]["experiment"])
    (run,) = client.search_runs([experiment.experiment_id], "tags.interim != ''")
    assert run.info.run_name == f"INTERIM: {len(answered)} of {len(examples)} questions"
    assert run.info.status == "FINISHED" and run.data.tags["interim"] == line
    labels = pd.read_parquet(TRIALS).set_index("trial_id")["label"]
    shown = {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")}
    own = scores[scores["headline"] & (scores["benchmark"] != "mean")]  # a random model's retention is of nothing
    keys = own["benchmark"] + "/" + own["metric"] + "/" + own["trial_id"].map(labels)
    assert shown == {metric_key(key): score for key, score in zip(keys, own["score"], strict=True)} and len(shown) == 9
    assert {held.step for held in client.get_metric_history(run.info.run_id, next(iter(shown)))} == {len(answered)}
