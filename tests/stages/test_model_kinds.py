"""Models of every family are planned before any stage starts; others, and methods they cannot have, are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import (
    InternVLConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from nuwa.vlm import CheckpointError, adapter_class
from pipelines.settings import SettingsError, load_settings, parse_settings
from stages.entry import planned_trials

ROOT = Path(__file__).parents[2]


def settings_for(folder: Path, model: Path, grids: list[dict], **sections):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"]["path"] = str(model)
    params["sweep"] |= {"budget_unit": "share", "budgets": [0.25, 0.5], "grids": grids}
    params["report"]["headline_budget"] = 0.25
    params["search"]["swarm"] = None
    for name, values in sections.items():
        params[name] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return load_settings(folder / "params.yaml")


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (LlavaNextConfig, 2340),
        (LlavaOnevisionConfig, 2929),
        (Qwen2_5_VLConfig, 391),
        (Qwen2VLConfig, 391),
        (Qwen3VLConfig, 300),
    ],
)
def test_dynamic_layouts_are_planned_for_a_usual_photo(config, tokens, tmp_path):
    config().save_pretrained(tmp_path / "model")
    trials = planned_trials(settings_for(tmp_path, tmp_path / "model", [{"name": "g", "method": ["nuwa", "random"]}]))
    assert [trial.spec.method for trial in trials] == ["unpruned", "nuwa", "nuwa", "random", "random"]
    assert trials[0].schedule.tokens == tokens
    for trial, share in zip(trials[1:], [0.25, 0.5, 0.25, 0.5], strict=True):
        assert trial.dynamic and abs(trial.schedule.average_tokens / tokens - share) < 0.01


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("visionzip", "needs the attention of a CLS token, and Qwen2.5-VL's vision encoder has none; methods that do"),
        (
            "downsample",
            "makes images smaller before the encoder, and Qwen2.5-VL's vision encoder chooses sizes by itself",
        ),
    ],
)
def test_methods_that_the_encoder_cannot_serve_are_refused(method, reason, tmp_path):
    Qwen2_5_VLConfig().save_pretrained(tmp_path / "model")
    with pytest.raises(SettingsError) as caught:
        planned_trials(settings_for(tmp_path, tmp_path / "model", [{"name": "g", "method": method}]))
    assert str(caught.value).startswith(f"grid g: method '{method}' {reason}")


def test_attention_of_a_cls_token_that_siglip_lacks_is_refused(tmp_path):
    LlavaOnevisionConfig().save_pretrained(tmp_path / "model")
    with pytest.raises(SettingsError) as caught:
        planned_trials(settings_for(tmp_path, tmp_path / "model", [{"name": "g", "method": "visionzip"}]))
    assert str(caught.value).startswith(
        "grid g: method 'visionzip' needs the attention of a CLS token, and LLaVA-OneVision's SigLIP tower has none; "
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_aspect_ratio", "pad", "config.vision_aspect_ratio = 'pad': only anyres_max_<crops> is supported, as anyres_max_9"),
        ("vision_feature_layer", 30, "config.vision_feature_layer = 30: the tower has 26 layers; allowed: 1 to 26 and -26 to -1"),
        (
            "vision_feature_select_strategy",
            "default",
            "config.vision_feature_select_strategy = 'default' with vision_feature_layer -1: only one layer and 'full' are supported",
        ),
    ],
)  # fmt: skip
def test_a_llava_onevision_of_other_mathematics_is_refused(key, value, message):
    config = LlavaOnevisionConfig(**{key: value})
    with pytest.raises(CheckpointError) as caught:
        adapter_class("llava_onevision").check_config(config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision_feature_select_strategy": "full"},
            "config.vision_feature_select_strategy = 'full' with vision_feature_layer -1: only one layer and 'default' (no CLS) are supported",
        ),
        ({"vision_feature_layer": 30}, "config.vision_feature_layer = 30: the tower has 24 layers; allowed: 1 to 24 and -24 to -1"),
        (
            {"vision_config": {"image_size": [448, 224]}},
            "config.vision_config has 32 x 16 patches a tile and config.downsample_ratio = 0.5: only square tiles that 2 divides are supported",
        ),
    ],
)  # fmt: skip
def test_an_internvl_of_other_mathematics_is_refused(changes, message):
    with pytest.raises(CheckpointError) as caught:
        adapter_class("internvl").check_config(InternVLConfig(**changes))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision_config": {"image_size": 384, "patch_size": 14}, "scale_factor": 4},
            "config.vision_config.image_size = 384 in patches of 14 with scale_factor 4: only square tiles whose patches the factor divides are supported",
        ),
        (
            {"text_config": {"model_type": "gpt2"}},
            "language model (text_config.model_type) 'gpt2' is unknown; allowed: ",
        ),
    ],
)  # fmt: skip
def test_a_smolvlm_of_other_mathematics_is_refused(changes, message):
    usual = {"vision_config": {"image_size": 384, "patch_size": 14}, "scale_factor": 3}
    with pytest.raises(ValueError) as caught:
        adapter_class("smolvlm").check_config(SmolVLMConfig(**usual | changes))
    assert str(caught.value).startswith(message)


def test_a_method_that_reads_what_is_not_kept_is_refused(tmp_path):
    LlavaNextConfig().save_pretrained(tmp_path / "model")
    grids, keep = [{"name": "g", "method": ["random", "nuwa"]}], {"keep": ["cls_attention", "features"]}
    with pytest.raises(SettingsError) as caught:
        planned_trials(settings_for(tmp_path, tmp_path / "model", grids, features=keep))
    assert str(caught.value) == (
        "features.keep = features, cls_attention: method 'nuwa' of grid 'g' reads similarity; add it there"
    )
    grids = [{"name": "g", "method": "nuwa", "parameters": {"aggregation": False}}]
    assert len(planned_trials(settings_for(tmp_path, tmp_path / "model", grids, features=keep))) == 3
    with pytest.raises(SettingsError, match="keep must hold features, which every method reads"):
        settings_for(tmp_path, tmp_path / "model", grids, features={"keep": ["keys"]})


@pytest.mark.parametrize(
    ("method", "keep", "message"),
    [
        ("visionzip", None, "grid swarm search: method 'visionzip' needs the attention of a CLS token"),
        ("nuwa", ["features", "cls_attention"], "method 'nuwa' of grid 'swarm search' reads similarity; add it there"),
    ],
)
def test_what_is_searched_is_checked_like_what_is_swept(method, keep, message, tmp_path):
    Qwen2_5_VLConfig().save_pretrained(tmp_path / "model")
    space = {"stage2_ratio": {"low": 0.2, "high": 0.4}}
    swarm = yaml.safe_load((ROOT / "params.yaml").read_text())["search"]["swarm"] | {
        "method": method,
        "preset": None,
        "budget": 0.25,
        "space": space,
    }
    features = {"keep": keep} if keep else {}
    grids = [{"name": "g", "method": "random"}]
    with pytest.raises(SettingsError, match=message):
        planned_trials(settings_for(tmp_path, tmp_path / "model", grids, search={"swarm": swarm}, features=features))


def test_an_unknown_kind_of_model_is_refused_with_what_is_supported(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SettingsError) as caught:
        planned_trials(settings_for(tmp_path, tmp_path / "model", [{"name": "g", "method": "nuwa"}]))
    assert (
        "model type 'bert' is unknown; allowed: idefics3, internvl, llava, llava_next, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl, smolvlm"
        in str(caught.value)
    )


def test_the_projects_own_model_is_planned():
    assert planned_trials(load_settings(ROOT / "params.yaml"))


def test_a_folder_that_is_not_there_is_no_model_of_the_hub(tmp_path, monkeypatch):
    """A mistyped folder is not looked up on the network; a published checkpoint's own may be fetched later."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["model"]["path"] = "models/nothere"
    with pytest.raises(SettingsError) as caught:
        planned_trials(parse_settings(yaml.safe_dump(raw), "params.yaml"))
    assert str(caught.value) == (
        "model.path = 'models/nothere': there is no such folder; name one that holds a model, or a model of the hub"
    )
