"""A sweep's trials take the weights that were trained for its encoder, wherever these lie."""

from __future__ import annotations

import shutil

import pytest

from nuwa.grid import PatchGrid
from nuwa.stage1.found_weights import SHIPPED
from nuwa.stage1.learnpruner import WeightsError, read_lpm
from pipelines.settings import SweepSettings
from pipelines.sweep.engine import with_weights
from pipelines.sweep.trials import Layouts, Trial, expand

MODEL = SHIPPED.parent / "testbed"
ENCODER = read_lpm(SHIPPED / "lpm.safetensors").encoder
GRID = {"name": "learned", "method": "learnpruner", "budget": 36}


def trials(*grids: dict) -> list[Trial]:
    of = {"benchmarks": ["gqa"], "budgets": [36], "images": 8, "subset_seed": 0, "unit_images": 8}
    sweep = SweepSettings(**of, grids=[GRID, *grids])
    return expand(sweep, Layouts.fixed(PatchGrid(12, 12)), 8)


def ids(of: list[Trial]) -> list[str]:
    return [trial.trial_id for trial in of]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that holds no project, and a store that holds nothing."""
    monkeypatch.setenv("NUWA_PRUNER", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_in_the_project_nothing_changes_and_elsewhere_the_trials_are_the_same(elsewhere, monkeypatch):
    found = with_weights(trials(), ENCODER, str(MODEL))
    assert found[-1].spec.config.weights == str(SHIPPED / "lpm.safetensors") and ids(found) != ids(trials())
    monkeypatch.chdir(SHIPPED.parents[1])
    planned = trials()
    assert with_weights(planned, ENCODER, "models/testbed") == planned and ids(planned) == ids(found)
    assert planned[-1].spec.config.weights == "models/pruner/lpm.safetensors"


def test_the_projects_own_folder_comes_first_and_a_file_that_is_named_is_taken_alone(elsewhere):
    shutil.copytree(SHIPPED, elsewhere / "models/pruner")
    (elsewhere / "models/pruner/lpm.safetensors").rename(elsewhere / "models/pruner/of_the_testbed.safetensors")
    (found,) = with_weights(trials()[1:], ENCODER, str(MODEL))
    assert found.spec.config.weights == "models/pruner/of_the_testbed.safetensors"

    named = {
        "name": "named",
        "method": "learnpruner",
        "budget": 36,
        "parameters": {"weights": found.spec.config.weights},
    }
    assert len(trials(named)) == 3, "until it is known that both are one"
    (both,) = with_weights(trials(named)[1:], ENCODER, str(MODEL))
    assert both.grids == ("learned", "named") and both.budgets == (36.0,)
    with pytest.raises(
        WeightsError, match=r"^learnpruner.weights 'models/pruner/of_the_testbed.safetensors' were trained"
    ):
        with_weights(trials(named)[2:], "c" * 64, str(MODEL))


def test_a_sweep_on_another_encoder_is_refused_in_one_line(elsewhere):
    with pytest.raises(WeightsError) as caught:
        with_weights(trials(), "c" * 64, "llava-hf/llava-1.5-7b-hf")
    assert str(caught.value) == (
        f"learnpruner has no weights for the model's encoder cccccccccccc; looked in models/pruner (no such folder), "
        f"{elsewhere}/store (no such folder), {SHIPPED} (lpm.safetensors is of encoder {ENCODER[:12]}); train them with "
        "`make pruner` on that model (docs/models.md), or name their file as learnpruner.weights"
    )
