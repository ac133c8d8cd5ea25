"""The whole recipe: what it writes, and that a killed training ends with the very same bytes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from nuwa.pruner.conversations import Scenes
from nuwa.pruner.train import build_learner, train_pruner
from nuwa.stage1.learnpruner import LearnPruner, check, read_lpm
from nuwa.training import PhaseSchedule

torch.set_num_threads(1)
SCHEDULE = PhaseSchedule(
    steps=4, batch_size=2, learning_rate=3e-3, warmup=1, checkpoint_every=1, evaluate_every=2, log_every=2
)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def train(tiny_vlm):
    def run(folder, schedule=SCHEDULE, kill_at=None, **recipe):
        vlm, logged = copy.deepcopy(tiny_vlm), []

        def log(step, metrics):
            logged.append((step, metrics))
            if step == kill_at:
                raise Killed

        recipe = {"seed": 5, "images": 40, "share": 0.1} | recipe
        output, seed = folder / "lpm.safetensors", recipe["seed"]
        train_pruner(
            build_learner(vlm, seed, "topk_ste", 0.2, 10.0),
            Scenes(vlm, **recipe),
            output,
            folder / "checkpoints",
            seed=seed,
            schedule=schedule,
            facts={"steps": schedule.steps},
            log=log,
        )
        return output, logged

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.fixture(autouse=True)
def small_validation(monkeypatch):
    monkeypatch.setattr("nuwa.pruner.train.VALIDATION_IMAGES", 2)


def test_weights_are_tied_to_the_encoder_and_tell_how_they_were_trained(whole, tiny_vlm):
    output, _ = whole
    file = read_lpm(output)
    assert file.encoder == tiny_vlm.encoder_fingerprint()
    assert file.training == {"steps": 4}
    check(LearnPruner(str(output)), tiny_vlm.encoder_fingerprint())
    fresh = build_learner(copy.deepcopy(tiny_vlm), 5, "topk_ste", 0.2, 10.0).lpm
    moved = [(one - other).abs().max() for one, other in zip(file.lpm.parameters(), fresh.parameters(), strict=True)]
    assert min(moved) > 1e-4, "every part has learned"


def test_loss_and_keep_rate_are_logged(whole):
    _, logged = whole
    steps = [step for step, metrics in logged if "pruner/loss_answers" in metrics]
    assert steps == [2, 4]
    training = logged[0][1]
    assert training["pruner/keep_rate"] == pytest.approx(29 / 144)
    assert training["pruner/loss_answers"] > 0
    validation = [metrics for _, metrics in logged if "pruner/validation_loss_lpm" in metrics]
    assert len(validation) == 2
    assert {"pruner/validation_loss_random", "pruner/validation_loss_all"} <= set(validation[0])


def test_a_killed_training_resumes_to_the_same_bytes(train, whole, tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, kill_at=2)  # steps 1 is in a checkpoint, step 2 is lost
    assert not (tmp_path / "lpm.safetensors").exists()
    held = [path for path in (tmp_path / "checkpoints").iterdir() if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in held) < 50_000, "the frozen model is in no checkpoint"
    output, logged = train(tmp_path)
    assert logged[0][0] == 2, "step 2 is done again, step 1 is not"
    assert output.read_bytes() == whole[0].read_bytes()
    assert not (tmp_path / "checkpoints").exists(), "a finished training leaves nothing to resume"


def test_the_data_share_and_the_seed_decide_the_weights(train, whole, tmp_path):
    schedule = dataclasses.replace(SCHEDULE, steps=1)
    outcomes = [
        train(tmp_path / str(number), schedule, **change)[0].read_bytes()
        for number, change in enumerate([{}, {}, {"share": 0.5}, {"seed": 6}])
    ]
    assert outcomes[0] == outcomes[1]
    assert len(set(outcomes)) == 3
