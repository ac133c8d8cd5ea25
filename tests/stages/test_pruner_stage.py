"""The stage `pruner`: weights that fit the model it was given, curves in MLflow, wrong settings in one line."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from nuwa.stage1.learnpruner import LearnPruner, check, read_lpm
from nuwa.vlm import LlavaAdapter
from pipelines.settings import SettingsError, load_settings
from stages.pruner import pruner

torch.set_num_threads(1)
PARAMS = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())


def settings_of(folder: Path, **changes):
    params = copy.deepcopy(PARAMS)
    for section, values in changes.items():
        params[section] |= values
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return load_settings(path)


def test_the_stage_trains_for_the_model_of_the_settings_and_logs(tiny_vlm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("nuwa.pruner.train.VALIDATION_IMAGES", 2)
    tiny_vlm.model.save_pretrained("tiny")
    tiny_vlm.processor.save_pretrained("tiny")
    settings = settings_of(tmp_path, model={"path": "tiny"}, pruner={"steps": 30, "batch_size": 1, "images": 10})
    pruner(settings)
    config, model = LearnPruner(), LlavaAdapter.load("tiny")
    check(config, model.encoder_fingerprint())
    training = read_lpm(Path(config.weights)).training
    assert training == {"parameters": settings.pruner.model_dump(), "model": model.fingerprint()}
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(PARAMS["tracking"]["experiment"])
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["sparsity"] == "topk_ste"
    for name in ("loss_answers", "keep_rate"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, f"pruner/{name}")] == [10, 20, 30]
    assert run.data.metrics["pruner/keep_rate"] == pytest.approx(29 / 144)
    assert "pruner/validation_loss_lpm" in run.data.metrics


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("share", 0.0, "pruner.share = 0.0: Input should be greater than 0"),
        ("share", 1.5, "pruner.share = 1.5: Input should be less than or equal to 1"),
        ("keep_share", 1.0, "pruner.keep_share = 1.0: Input should be less than 1"),
        ("sparsity", "gumbel", "pruner.sparsity = 'gumbel': Input should be 'topk_ste' or 'ratio_penalty'"),
        ("steps", 0, "pruner.steps = 0: Input should be greater than or equal to 1"),
        ("rate", 1, "pruner.rate: unknown key; see docs/params.md for the keys that exist"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, key, value, message):
    with pytest.raises(SettingsError) as caught:
        settings_of(tmp_path, pruner={key: value})
    assert str(caught.value) == f"{tmp_path / 'params.yaml'}: {message}"


def test_the_sparsities_of_the_settings_are_those_of_the_learner():
    from typing import get_args

    from nuwa.pruner.learner import Sparsity
    from pipelines.settings import PrunerSettings

    assert get_args(PrunerSettings.model_fields["sparsity"].annotation) == get_args(Sparsity)
