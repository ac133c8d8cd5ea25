"""Models whose images differ in grid are refused before any stage starts; the library answers with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import LlavaNextConfig, Qwen2_5_VLConfig

from pipelines.settings import SettingsError, load_settings
from stages.entry import planned_trials

ROOT = Path(__file__).parents[2]


def settings_for(folder: Path, model: Path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"]["path"] = str(model)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return load_settings(folder / "params.yaml")


@pytest.mark.parametrize("config", [LlavaNextConfig, Qwen2_5_VLConfig])
def test_models_of_dynamic_grids_are_refused_with_one_line(config, tmp_path):
    config().save_pretrained(tmp_path / "model")
    with pytest.raises(SettingsError) as caught:
        planned_trials(settings_for(tmp_path, tmp_path / "model"))
    assert str(caught.value) == (
        f"model.path = '{tmp_path / 'model'}': its images have grids of their own, and the pipeline holds one grid for "
        "all images; ask this model with nuwa.generate, or name one of model type llava"
    )


def test_an_unknown_kind_of_model_is_refused_with_what_is_supported(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SettingsError) as caught:
        planned_trials(settings_for(tmp_path, tmp_path / "model"))
    assert "model type 'bert' is not supported; supported: llava, llava_next, qwen2_5_vl" in str(caught.value)


def test_the_projects_own_model_is_planned():
    assert planned_trials(load_settings(ROOT / "params.yaml"))
