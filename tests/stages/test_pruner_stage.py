"""The stage `pruner`: weights that fit the model it was given, curves in MLflow, wrong settings in one line."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from commands import run_here
from forked import forked
from instruction_data import tiny_llava, write_data
from mlflow import MlflowClient
from stores import copy_store
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import InternVLConfig, Qwen3VLConfig

from nuwa.pruner.instructions import Conversations, read_instructions
from nuwa.pruner.train import build_learner
from nuwa.stage1.learnpruner import DEFAULT_WEIGHTS, LearnPruner, WeightsError, check, read_lpm
from nuwa.training import PhaseSchedule, step_rng
from nuwa.vlm import ImageRules, LlavaAdapter, LlavaNextAdapter
from pipelines.presets import compose
from pipelines.settings import SettingsError, load_settings, parse_settings
from stages.entry import planned_trials
from stages.pruner import DECAY_SHARE, WARMUP, pruner

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def settings_of(folder: Path, **changes):
    params = copy.deepcopy(PARAMS)
    for section, values in changes.items():
        params[section] |= values
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return load_settings(path)


def test_the_stage_trains_for_the_model_of_the_settings_logs_and_stops_early_where_it_is_done(
    tiny_vlm, new_store, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("nuwa.pruner.train.VALIDATION_IMAGES", 2)
    for name, steps in {"LOG_EVERY": 2, "EVALUATE_EVERY": 6}.items():
        monkeypatch.setattr(f"stages.pruner.{name}", steps)
    recipe = {"steps": 6, "batch_size": 1, "images": 10}
    tiny_vlm.model.save_pretrained("tiny")
    tiny_vlm.processor.save_pretrained("tiny")
    copy_store(new_store, tmp_path / "mlflow.db")
    settings = settings_of(tmp_path, model={"path": "tiny"}, pruner=recipe)
    pruner(settings)
    config, model = LearnPruner(), LlavaAdapter.load("tiny")
    check(config, model.encoder_fingerprint())
    training = dict(read_lpm(Path(config.weights)).training)
    assert len(training.pop("code")) == 64
    assert training == {"parameters": settings.pruner.model_dump(), "model": model.fingerprint()}
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(PARAMS["tracking"]["experiment"])
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["sparsity"] == "topk_ste"
    for name in ("loss_answers", "keep_rate"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, f"pruner/{name}")] == [2, 4, 6]
    assert run.data.metrics["pruner/keep_rate"] == pytest.approx(29 / 144)
    assert "pruner/validation_loss_lpm" in run.data.metrics

    written = Path(config.weights).stat().st_mtime_ns
    capsys.readouterr()
    pruner(settings)
    assert "is of this recipe, data, model and code already" in capsys.readouterr().out
    assert Path(config.weights).stat().st_mtime_ns == written
    pruner(settings_of(tmp_path, model={"path": "tiny"}, pruner=recipe | {"seed": 1}))
    assert read_lpm(Path(config.weights)).training["parameters"]["seed"] == 1


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with a LLaVA, instruction data, and the weights of git, which are another encoder's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    vlm = tiny_llava()
    vlm.model.save_pretrained("llava")
    vlm.processor.save_pretrained("llava")
    write_data(tmp_path / "tables")
    (tmp_path / "models").mkdir()
    shutil.copytree(ROOT / "models/pruner", tmp_path / "models/pruner")
    return tmp_path


@pytest.fixture
def taught(published, new_store) -> Path:
    """The same with MLflow's database, for what is trained."""
    copy_store(new_store, published / "mlflow.db")
    return published


INSTRUCTIONS = {
    "data": "tables/instructions.json",
    "share": 0.5,
    "steps": 30,
    "batch_size": 2,
    "learning_rate": 0.003,
}


def taught_with(folder: Path, model: dict | None = None, **recipe):
    model = {"path": "llava", "prompt_style": "llava_v1"} | (model or {})
    return settings_of(folder, model=model, pruner=INSTRUCTIONS | recipe)


def refusal(settings) -> str:
    with pytest.raises(SettingsError) as caught:
        pruner(settings)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_instruction_data_replace_the_weights_of_another_encoder(taught, dtype, capsys):
    before = read_lpm(Path(DEFAULT_WEIGHTS))
    settings = taught_with(taught, {"dtype": dtype})
    pruner(settings)
    file, model = read_lpm(Path(DEFAULT_WEIGHTS)), LlavaAdapter.load("llava", dtype=getattr(torch, dtype))
    assert file.encoder == model.encoder_fingerprint() != before.encoder
    check(LearnPruner(), model.encoder_fingerprint())
    assert file.training == {
        "code": file.training["code"],
        "parameters": settings.pruner.model_dump(),
        "model": model.fingerprint(),
        "data": hashlib.sha256(Path("tables/instructions.json").read_bytes()).hexdigest(),
    }
    assert capsys.readouterr().out.splitlines()[0] == (
        "tables/instructions.json: 3 of 6 conversations about images are taught; 2 entries without an image are left out"
    )
    client = MlflowClient(f"sqlite:///{taught / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name(PARAMS["tracking"]["experiment"]).experiment_id])
    assert run.data.params["data"] == "tables/instructions.json"
    losses = [point.value for point in client.get_metric_history(run.info.run_id, "pruner/loss_answers")]
    assert losses[-1] < losses[0]


def test_a_folder_of_their_own_and_other_data_give_other_weights(taught):
    written = []
    for change in ("none", "folder", "content"):
        if change == "folder":
            (taught / "tables/photos").rename(taught / "photos")
        if change == "content":
            path = taught / "tables/instructions.json"
            path.write_text(path.read_text().replace("A blue sign", "A red sign").replace("A dog", "Two dogs"))
        folder = None if change == "none" else "."
        pruner(taught_with(taught, steps=1, share=1.0, images_folder=folder))
        file = read_lpm(Path(DEFAULT_WEIGHTS))
        written.append((file.training["data"], [value.tolist() for value in file.lpm.state_dict().values()]))
    assert written[0] == written[1]
    assert written[0][0] != written[2][0] and written[0][1] != written[2][1]


def test_wrong_data_are_one_line_before_the_model_is_loaded(published):
    before = Path(DEFAULT_WEIGHTS).read_bytes()
    Path("llava/model.safetensors").unlink()
    assert refusal(taught_with(published, data="tables/none.json")) == (
        "pruner.data: tables/none.json: No such file or directory; expected instruction data in LLaVA's form, such as "
        "llava_v1_5_mix665k.json"
    )
    Path("tables/instructions.json").write_text('[{"image": "a.png", "conversations": [{"from": "user"}]}]')
    assert refusal(taught_with(published)) == (
        "pruner.data: tables/instructions.json: entry 0: conversations.0.from = \"user\": expected 'human'; "
        "human and gpt take turns, human first"
    )
    write_data(published / "tables")
    assert refusal(taught_with(published, images_folder="elsewhere", share=1.0)) == (
        "pruner.data: tables/instructions.json: entry 0: image: no such file elsewhere/photos/0.png; "
        "pruner.images_folder is where image paths begin"
    )
    assert Path(DEFAULT_WEIGHTS).read_bytes() == before and not Path("mlflow.db").exists()


def test_damage_that_shows_while_training_is_one_line_and_the_training_goes_on_where_it_was(taught, monkeypatch):
    monkeypatch.setattr("stages.pruner.CHECKPOINT_EVERY", 1)
    image = Path("tables/photos/0.png")
    whole = image.read_bytes()
    pruner(taught_with(taught, share=1.0))
    expected = Path(DEFAULT_WEIGHTS).read_bytes()
    Path(DEFAULT_WEIGHTS).unlink()  # or the stage would see that it is done
    image.write_bytes(whole[:100])
    message = refusal(taught_with(taught, share=1.0))
    assert message.startswith("pruner.data: tables/photos/0.png: the image of entry 0 cannot be read (")
    (checkpoint,) = Path("cache/training").glob("*/step.json")
    assert 0 < json.loads(checkpoint.read_text())["step"] < INSTRUCTIONS["steps"]
    image.write_bytes(whole)
    pruner(taught_with(taught, share=1.0))
    assert Path(DEFAULT_WEIGHTS).read_bytes() == expected


def test_a_llava_next_is_taught_by_the_same_stage(tiny_next, taught, monkeypatch):
    """Pictures of three shapes; the weights are those of its encoder and of the rules by which pictures are prepared."""
    vlm = copy.deepcopy(tiny_next)
    template = vlm.processor.chat_template
    vlm.processor.chat_template = template.replace("user :", "{{ '' if loop.first else ' ' }}{{ message['role'] }} :")
    vlm.model.save_pretrained("next")
    vlm.processor.save_pretrained("next")
    pruner(taught_with(taught, {"path": "next", "image_grid": "llava"}, steps=2, share=1.0))
    rules = ImageRules(grid="llava")
    file, model = read_lpm(Path(DEFAULT_WEIGHTS)), LlavaNextAdapter.load("next", image_rules=rules)
    assert file.encoder == model.encoder_fingerprint() != LlavaNextAdapter.load("next").encoder_fingerprint()
    assert file.training["model"] == model.fingerprint() and file.lpm.hidden.in_features == 32


@pytest.mark.parametrize(("config", "family"), [(InternVLConfig, "internvl"), (Qwen3VLConfig, "qwen3_vl")])
def test_families_that_cannot_be_taught_are_refused_before_anything_is_read(config, family, published):
    config().save_pretrained("other")
    before = Path(DEFAULT_WEIGHTS).read_bytes()
    assert refusal(taught_with(published, {"path": "other"}, data="nowhere.json")) == (
        "pruner.data = 'nowhere.json': instruction data teach models of family llava, llava_next, qwen2_vl, "
        f"qwen2_5_vl, and model.path = 'other' is of family {family}; allowed for it: scenes, which trains nothing, with weights of your own in the grids' "
        "parameters.weights"
    )
    assert Path(DEFAULT_WEIGHTS).read_bytes() == before


def test_scenes_teach_no_other_model_and_the_stage_says_what_becomes_of_the_weights(published, capsys):
    before = Path(DEFAULT_WEIGHTS).read_bytes()
    pruner(settings_of(published, model={"path": "llava", "prompt_style": "llava_v1"}))
    assert capsys.readouterr().out == (
        "pruner.data = scenes teaches the testbed's model: nothing is trained for llava, and "
        "models/pruner/lpm.safetensors stays as it is; the sweep refuses it on an encoder it was not trained on\n"
    )
    assert Path(DEFAULT_WEIGHTS).read_bytes() == before
    with pytest.raises(WeightsError, match="were trained on encoder"):
        check(LearnPruner(), LlavaAdapter.load("llava").encoder_fingerprint())


def test_the_preset_of_the_main_table_trains_the_weights_that_its_sweep_reads():
    overlay = (ROOT / "experiments/learnpruner_main.yaml").read_text()
    settings = parse_settings(compose((ROOT / "params.yaml").read_text(), overlay), "learnpruner_main")
    assert settings.pruner.data.endswith("/llava_v1_5_mix665k.json")
    learned = [trial.spec.config for trial in planned_trials(settings) if trial.spec.method == "learnpruner"]
    assert len(learned) > 3 and {config.weights for config in learned} == {DEFAULT_WEIGHTS}


def with_a_sweep(folder: Path) -> None:
    """Settings as a command needs them: with a sweep that the tiny model can have."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["sweep"] |= {"budgets": [9], "grids": [{"name": "g", "method": "learnpruner", "stage2_layer": "off"}]}
    params["report"]["headline_budget"], params["search"]["swarm"] = 9, None
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def started_stage() -> None:
    """``python -m stages.pruner`` in a copy of this process, which may have trained before."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = [str(ROOT / "stages/pruner.py")]
    runpy.run_path(sys.argv[0], run_name="__main__")


def launch_two() -> None:
    """``torchrun --standalone --nproc_per_node 2 -m stages.pruner``, whose processes are copies and import nothing anew."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        start_method="fork",
        monitor_interval=0.1,
    )
    elastic_launch(launch, started_stage)()


def test_two_processes_learn_from_both_their_batches(taught):
    taught_with(taught, steps=3, batch_size=4, share=1.0)
    with_a_sweep(taught)
    done = forked(launch_two)
    assert done.code == 0, done.err[-2000:]
    assert done.out.count("conversations about images are taught") == 1, "one process speaks"
    vlm = LlavaAdapter.load("llava")
    path = taught / "tables/instructions.json"
    data = Conversations(vlm, read_instructions(path, path.parent, 0, 1.0), 2048)
    learner = build_learner(vlm, 0, "topk_ste", 0.2, 10.0)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.003, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = PhaseSchedule(steps=3, batch_size=4, learning_rate=0.003, warmup=WARMUP, decay_share=DECAY_SHARE)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.003 * schedule.rate(step)
        batches = [data.draw(step_rng(0, "pruner", step, process), 2) for process in range(2)]
        optimizer.zero_grad()
        (sum(learner(batch)["answers"] for batch in batches) / 2).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), schedule.clip)
        optimizer.step()
    fresh = build_learner(vlm, 0, "topk_ste", 0.2, 10.0).lpm.state_dict()
    written = read_lpm(taught / DEFAULT_WEIGHTS).lpm.state_dict()
    for name, value in learner.lpm.state_dict().items():
        assert torch.allclose(written[name], value, atol=1e-6), name
        assert not torch.allclose(written[name], fresh[name], atol=1e-4), name


def test_the_command_ends_with_one_line_where_data_are_wrong(published):
    (published / "tables/instructions.json").write_text("{}")
    taught_with(published)
    with_a_sweep(published)
    done = run_here("stages.pruner", folder=published)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: pruner.data: tables/instructions.json: byte 0: expected '[', found '{'; "
        "the file must be a JSON list of entries"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("share", 0.0, "pruner.share = 0.0: Input should be greater than 0"),
        ("share", 1.5, "pruner.share = 1.5: Input should be less than or equal to 1"),
        ("keep_share", 1.0, "pruner.keep_share = 1.0: Input should be less than 1"),
        ("sparsity", "gumbel", "pruner.sparsity = 'gumbel': Input should be 'topk_ste' or 'ratio_penalty'"),
        ("data", "", "pruner.data = '': String should have at least 1 character"),
        ("max_tokens", 0, "pruner.max_tokens = 0: Input should be greater than or equal to 1"),
        ("images_folder", "coco", "pruner: images_folder 'coco' belongs to instruction data; data is scenes"),
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
