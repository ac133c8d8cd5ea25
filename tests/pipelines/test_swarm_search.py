"""Searching hyper-parameters: what is asked, what is told, and that a study is a function of seed and answers."""

from __future__ import annotations

import numpy as np
import pytest
from test_racing import RESAMPLES, SEED, kill_half_way

from nuwa.grid import PatchGrid
from nuwa.stage1 import get_method
from pipelines.scores.sampled import Sampled
from pipelines.search.racing import race, slices
from pipelines.search.space import check_space, preset_point, trial_at
from pipelines.search.swarm import best_of, objective_of, ranking, run_study
from pipelines.search.tables import study_table
from pipelines.settings import SettingsError, SwarmSettings, SweepSettings
from pipelines.sweep.trials import Layouts
from pipelines.sweep.units import read_examples

LAYOUTS, LAYERS = Layouts.fixed(PatchGrid(12, 12)), 8
SWEEP = SweepSettings(
    benchmarks=["gqa"],
    images=None,
    subset_seed=0,
    unit_images=4,
    budgets=[16],
    grids=[{"name": "a", "method": "random"}],
)
SPACE = {
    "stage2_layer": [2, 4, 6, "off"],
    "stage2_ratio": {"low": 0.1, "high": 0.9},
    "parameters": {
        "pillar_quantile": {"low": 0.0, "high": 1.0},
        "distance_threshold": {"low": 0.01, "high": 1.0, "log": True},
        "candidates_per_region": {"low": 1, "high": 3},
        "separation": [True, False],
    },
}


def swarm_of(**changes):
    usual = {"method": "nuwa", "budget": 16, "objective": "vqa", "trials": 10, "batch": 4, "space": SPACE}
    return SwarmSettings.model_validate(usual | changes)


def run_swarm(engine, results, done=lambda *_: None, races=None, seed=0, **changes):
    bench, swarm = engine.bench, swarm_of(**changes)
    reference, rungs = bench.trials[0], slices(engine.table, [0.5, 1.0], 0)

    def ask(trials, questions):
        asked = read_examples(questions, bench.context)
        return bench.run(results, engine.cluster, trials=trials, examples=asked, done=done).predictions.to_pandas()

    def run(batch, stay):
        cost = dict.fromkeys([trial.trial_id for trial in (*batch, *stay)], 16.0)
        judge = objective_of(swarm.objective)
        options = {"confidence": 0.8, "resamples": RESAMPLES, "seed": SEED, "stay": stay, "judge": judge}
        found = race(batch, reference, rungs, ask, cost, **options)
        if races is not None:
            races.append((batch, stay, found))
        return found

    def make(point):
        return trial_at(swarm, point, SWEEP, LAYOUTS, LAYERS)

    tried, preset = run_study(swarm, seed, make, make({}), run)
    assert preset.trial == make({}) and preset.rung == 2
    return tried


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A store for tests of what a study does with answers: one asks what the next finds there."""
    return tmp_path_factory.mktemp("answered")


def outcome(tried):
    return [(one.number, one.point, one.trial.trial_id, one.standing, one.finished) for one in tried]


def test_a_study_asks_in_batches_from_the_space_and_races_beside_preset_and_best(engine, answered):
    races = []
    tried = run_swarm(engine, answered, races=races)
    assert [len(batch) for batch, _, _ in races] == [4, 4, 2]
    assert [one.number for one in tried] == list(range(10))
    preset = trial_at(swarm_of(), {}, SWEEP, LAYOUTS, LAYERS).trial_id
    for number, (_, stay, found) in enumerate(races):
        best = best_of(tried[: 4 * number], "vqa")
        assert [trial.trial_id for trial in stay] == [preset, *([best.trial.trial_id] if best else [])]
        assert all(found.standings[trial.trial_id].rung == 2 for trial in stay)
    for one in tried:
        off = one.point["stage2_layer"] == "off"
        assert ("stage2_ratio" in one.point) == (not off)
        assert off or 0.1 <= one.point["stage2_ratio"] <= 0.9
        assert type(one.point["parameters.candidates_per_region"]) is int
        assert one.trial.schedule.average_tokens == pytest.approx(16, abs=0.5)
        assert one.trial.parameters == {
            name.removeprefix("parameters."): value for name, value in one.point.items() if "." in name
        }
    assert any(not one.finished for one in tried) and any(one.finished for one in tried)
    values = [one.standing.estimates["vqa"][0] for one in ranking(tried, "vqa")]
    assert values == sorted(values, reverse=True)


def test_a_study_is_a_function_of_seed_and_answers_and_asks_nothing_twice(engine, answered, tmp_path):
    first, again, new = run_swarm(engine, answered), run_swarm(engine, tmp_path), []
    assert outcome(first) == outcome(again)
    assert outcome(run_swarm(engine, answered, lambda unit, report: new.append(unit))) == outcome(first)
    assert not new
    other = run_swarm(engine, answered, seed=1)
    assert [one.point for one in other] != [one.point for one in first]


def test_a_longer_study_begins_as_the_shorter_one(engine, answered):
    assert outcome(run_swarm(engine, answered, trials=8)) == outcome(run_swarm(engine, answered, trials=12))[:8]


def test_a_killed_study_goes_on_to_the_same_outcome_and_asks_only_the_rest(engine, tmp_path):
    whole, new = [], []
    undisturbed = run_swarm(engine, tmp_path / "undisturbed", lambda unit, report: whole.append(report.answers))
    results, stored = kill_half_way(engine, tmp_path, run_swarm, 6)
    assert 0 < stored < sum(whole)
    assert outcome(run_swarm(engine, results, lambda unit, report: new.append(report.answers))) == outcome(undisturbed)
    assert sum(new) == sum(whole) - stored


def test_later_points_answer_to_what_was_told(engine, answered):
    """With other truths the first batch is the same and what follows differs: the sampler hears the objective."""
    table = engine.table.assign(truth=engine.table["truth"].tolist()[::-1])
    many = {"trials": 20, "batch": 10}  # beyond the ten points that TPE draws blindly
    first = run_swarm(engine, answered, **many)
    engine.table = table
    other = run_swarm(engine, answered, **many)
    assert [one.point for one in first[:10]] == [one.point for one in other[:10]]
    assert [one.point for one in first[10:]] != [one.point for one in other[10:]]


def test_the_mean_weighs_families_alike_and_a_family_stands_alone():
    everywhere = np.ones(3, bool)
    families = {
        "grounding": Sampled(np.array([0.2, 0.4]), np.zeros((2, 5)), np.full((2, 3), 0.1), everywhere),
        "vqa": Sampled(np.array([0.8, 1.0]), np.ones((2, 5)), np.full((2, 3), 0.7), everywhere),
    }
    both = objective_of("mean")(families)["mean"]
    assert both.point.tolist() == pytest.approx([0.5, 0.7]) and (both.draws == 0.5).all()
    assert both.left_out == pytest.approx(np.full((2, 3), 0.4))
    assert objective_of("vqa")(families) == {"vqa": families["vqa"]}


def test_the_tables_rows_are_the_preset_and_every_point(engine, answered):
    races = []
    tried = run_swarm(engine, answered, races=races)
    preset = races[0][1][0]
    standing = races[0][2].standings[preset.trial_id]
    table = study_table(tried, standing, {"stage2_layer": 4}, {preset.trial_id: standing}, "vqa")
    assert table["state"].tolist() == ["preset", *("finished" if one.finished else "stopped" for one in tried)]
    assert table["objective"].tolist() == [s.estimates["vqa"][0] for s in (standing, *(one.standing for one in tried))]
    assert table["unseen_vqa"].notna().tolist() == [True] + [one.trial.trial_id == preset.trial_id for one in tried]
    assert table["rung"].tolist() == [2, *(one.standing.rung for one in tried)]


@pytest.mark.parametrize("preset", ["released", "paper"])
def test_the_trial_at_the_presets_place_is_the_preset(preset):
    config = get_method("nuwa").configure(preset)
    names = ("pillar_quantile", "salience", "separation", "candidates_per_region")
    space = {"stage2_layer": ["off"], "stage2_scorer": ["random"], "stage2_ratio": [0.5]}
    space["parameters"] = {name: [getattr(config, name)] for name in names}
    swarm = swarm_of(preset=preset, space=space)
    trial = trial_at(swarm, {}, SWEEP, LAYOUTS, LAYERS)
    point = preset_point(swarm, trial)
    assert set(point) == set(swarm.space.axes)
    assert (point["stage2_layer"], point["stage2_ratio"]) == (4, 1 / 7)
    assert trial_at(swarm, point, SWEEP, LAYOUTS, LAYERS).trial_id == trial.trial_id


def test_a_preset_with_values_by_budget_lies_where_its_budget_puts_it():
    space = {"stage2_ratio": [0.5], "parameters": {"candidates_per_region": [1]}}
    swarm = swarm_of(preset="released_qwen", budget=108, space=space)  # 75 % of 144
    trial = trial_at(swarm, {}, SWEEP, LAYOUTS, LAYERS)
    point = preset_point(swarm, trial)
    assert point == {"stage2_ratio": 0.70, "parameters.candidates_per_region": 4}
    assert trial_at(swarm, point, SWEEP, LAYOUTS, LAYERS).trial_id == trial.trial_id


def test_a_preset_without_stage_2_lies_at_off():
    swarm = swarm_of(method="visionzip", space={"stage2_layer": [2, "off"], "stage2_ratio": [0.5]})
    assert preset_point(swarm, trial_at(swarm, {}, SWEEP, LAYOUTS, LAYERS)) == {
        "stage2_layer": "off",
        "stage2_ratio": None,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 145}, "search.swarm.budget: budget 145 is out of reach with a stage-2 cut before layer 2 of 8: allowed 1..144 average tokens"),
        (
            {"space": {"stage2_layer": [2, 8]}},
            "search.swarm.space: stage-2 layer 8 must lie in 1..7: the model has 8 layers",
        ),
        (
            {"method": "fastv", "space": {"stage2_layer": [1, 4]}},
            "search.swarm.budget: budget 16 is out of reach with a stage-2 cut before layer 1 of 8: allowed 18.88..144 average tokens",
        ),
    ],
)  # fmt: skip
def test_what_the_models_layers_do_not_reach_is_refused(changes, message):
    with pytest.raises(SettingsError) as raised:
        check_space(swarm_of(**changes), "tokens", LAYOUTS, LAYERS)
    assert str(raised.value) == message
