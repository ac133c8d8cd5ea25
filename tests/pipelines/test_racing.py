"""Races over images: slices, who dominates whom, and that stopping early costs no answer and no truth."""

from __future__ import annotations

import itertools
import json
import math
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from forked import kill_when
from hypothesis import given
from hypothesis import strategies as st

from nuwa import UNPRUNED
from pipelines.scores.evidence import evaluate
from pipelines.scores.front import pareto_front
from pipelines.search.racing import Measure, check_slices, dominators, race, slices
from pipelines.settings import SettingsError
from pipelines.sweep.results import ResultStore
from pipelines.sweep.units import read_examples

RESAMPLES, SEED, CONFIDENCE = 200, 0, 0.9


def questions_of(images):
    return pd.DataFrame({"image": images, "example_id": [f"q{row}" for row in range(len(images))]})


@given(
    images=st.lists(st.integers(0, 40).map(str), min_size=1, max_size=80),
    shares=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5, unique=True).map(lambda s: [*sorted(s), 1.0]),
    seed=st.integers(0, 5),
    shuffle=st.randoms(use_true_random=False),
)
def test_slices_are_nested_whole_and_blind_to_the_order_of_rows(images, shares, seed, shuffle):
    table = questions_of(images)
    rungs = slices(table, shares, seed)
    for share, rung in zip(shares, rungs, strict=True):
        assert rung["image"].nunique() == math.ceil(share * table["image"].nunique())
        whole = table[table["image"].isin(rung["image"])]
        assert rung["example_id"].tolist() == whole["example_id"].tolist(), "all questions of an image, in file order"
    for smaller, larger in itertools.pairwise(rungs):
        assert set(smaller["example_id"]) <= set(larger["example_id"])
    rows = list(range(len(images)))
    shuffle.shuffle(rows)
    again = slices(table.iloc[rows], shares, seed)
    assert [set(one["image"]) for one in again] == [set(one["image"]) for one in rungs]


def test_another_image_changes_nobodys_place_and_the_seed_does():
    table = questions_of([str(number) for number in range(100)])
    first = set(slices(table, [0.2], 0)[0]["image"])
    without = table[~table["image"].isin(sorted(first)[:5])]
    assert set(slices(without, [15 / 95], 0)[0]["image"]) == first - set(sorted(first)[:5])
    assert set(slices(table, [0.2], 1)[0]["image"]) != first


def test_a_first_slice_too_small_to_judge_by_is_refused():
    table = questions_of([str(number) for number in range(100)]).assign(benchmark="pope")
    with pytest.raises(SettingsError) as raised:
        check_slices(slices(table, [0.05, 1.0], 0), [0.05, 1.0])
    assert str(raised.value) == (
        "search.shares.0 = 0.05: the first slice has 5 of 100 images; an interval over images needs at least 10"
    )
    rungs = slices(table, [0.1, 1.0], 0)
    check_slices(rungs, [0.1, 1.0])
    rare = table["image"].isin(rungs[0]["image"])
    table.loc[~rare, "benchmark"] = "gqa"
    with pytest.raises(SettingsError) as raised:
        check_slices(slices(table, [0.1, 1.0], 0), [0.1, 1.0])
    assert str(raised.value) == "search.shares.0 = 0.1: the first slice asks nothing of 'gqa'; use a larger share"


def measure_of(value, draws):
    """Who leads does not depend on intervals of one trial."""
    return Measure(value, value, value, draws)


def dominators_by_hand(value, draws, cost, images, confidence):
    """Loop over trials, rivals and draws."""
    found = []
    for trial in range(len(value)):
        leads, largest = {}, [0.0] * len(draws[0])
        for rival in range(len(value)):
            if rival == trial or cost[rival] > cost[trial]:
                continue
            lead = value[rival] - value[trial]
            excess = [draws[rival][draw] - draws[trial][draw] - lead for draw in range(len(draws[0]))]
            middle = sum(excess) / len(excess)
            variance = sum((one - middle) ** 2 for one in excess) / len(excess)
            if variance > 1e-24:
                largest = [max(top, one / math.sqrt(variance)) for top, one in zip(largest, excess, strict=True)]
            around_none = math.sqrt(variance + lead**2 / images)
            leads[rival] = lead / around_none if around_none > 1e-12 else 0.0
        critical = max(sorted(largest)[math.ceil(confidence * (len(largest) - 1))], NormalDist().inv_cdf(confidence))
        best = max(leads, key=leads.get, default=None)
        found.append(best if best is not None and leads[best] > critical else -1)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_dominators_are_those_of_the_loop(seed):
    rng = np.random.default_rng(seed)
    right = rng.random((9, 40)) < rng.uniform(0.3, 0.9, (9, 1))
    draws = np.stack([right[:, rng.integers(40, size=40)].mean(axis=1) for _ in range(120)], axis=1)
    cost = rng.choice([16.0, 32.0, 48.0], 9)
    measure = measure_of(right.mean(axis=1), draws)
    found = dominators(measure, cost, 40, 0.9).tolist()
    assert found == dominators_by_hand(right.mean(axis=1), draws.tolist(), cost, 40, 0.9)
    assert -1 in found and any(rival >= 0 for rival in found)


def test_what_costs_more_never_dominates_and_no_evidence_stops_nobody():
    rng = np.random.default_rng(0)
    value, even = np.array([0.9, 0.5]), np.array([1.0, 1.0])
    draws = value[:, None] + rng.normal(0, 0.02, (2, 100))
    assert dominators(measure_of(value, draws), even, 40, 0.95).tolist() == [-1, 0]
    assert dominators(measure_of(value, draws), np.array([2.0, 1.0]), 40, 0.95).tolist() == [-1, -1]
    still = measure_of(value, np.repeat(value[:, None], 100, axis=1))
    assert dominators(still, even, 2, 0.95).tolist() == [-1, -1], "two images that agree are no certainty"
    assert dominators(still, even, 10, 0.95).tolist() == [-1, 0], "ten are"
    assert dominators(measure_of(value[[0, 0]], draws[[0, 0]]), even, 40, 0.95).tolist() == [-1, -1], "equals"
    hollow = draws.copy()
    hollow[:, :51] = np.nan
    assert dominators(measure_of(value, hollow), even, 40, 0.95).tolist() == [-1, -1]
    hollow[:, 50] = draws[:, 50]
    assert dominators(measure_of(value, hollow), even, 40, 0.95).tolist() == [-1, 0]


def test_among_equals_the_promise_holds_for_a_trial_whatever_the_number_of_its_rivals():
    """Thirty trials right equally often: over the rungs of a race, the first is wrongly dominated in at most
    1 - confidence of the worlds. Bounds for one comparison at a time break that promise in the same worlds.
    """
    rng = np.random.default_rng(5)
    worlds, trials, slices_of, confidence = 150, 30, (25, 60), 0.95
    level = 1 - (1 - confidence) / len(slices_of)
    cost = np.array([trials, *range(trials - 1)], float)  # all others cost less than the first
    jointly = singly = 0
    for _ in range(worlds):
        right = (rng.random((trials, max(slices_of))) < 0.7).astype(float)
        wrongly, naively = False, False
        for images in slices_of:
            weights = rng.multinomial(images, np.full(images, 1 / images), size=1000) / images
            measure = measure_of(right[:, :images].mean(axis=1), right[:, :images] @ weights.T)
            wrongly |= dominators(measure, cost, images, level)[0] >= 0
            lead, excess = measure.value[1:] - measure.value[0], measure.draws[1:] - measure.draws[0]
            naively |= bool((2 * lead > np.quantile(excess, level, axis=1)).any())
        jointly += wrongly
        singly += naively
    assert jointly / worlds <= 1 - confidence + 2 * math.sqrt(confidence * (1 - confidence) / worlds)
    assert singly / worlds > 0.2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_else_makes_pointless(pairs):
    value, cost = (np.array(column, float) for column in zip(*pairs, strict=True))
    expected = [
        not any((v >= value[i] and c <= cost[i]) and (v, c) != (value[i], cost[i]) for v, c in pairs)
        for i in range(len(pairs))
    ]
    assert pareto_front(value, cost).tolist() == expected


# Races on answers that are made up here: two families, trials of known worth.

WORTH = {"whole": (0.9, 0.9), "good": (0.8, 0.85), "fair": (0.7, 0.8), "poor": (0.2, 0.4), "seer": (0.1, 0.9)}
WORTH |= {"cheap": (0.3, 0.3), "twin": (0.8, 0.85)}
COST = {"whole": 144.0, "good": 32.0, "fair": 32.0, "poor": 32.0, "seer": 32.0, "cheap": 16.0, "twin": 32.0}
RIGHT = {"textvqa": "3", "gqa": "red", "refcoco": "[0.10, 0.10, 0.50, 0.50]"}
TRUTH = {"textvqa": {"answers": ["3"] * 10}, "gqa": {"answer": "red"}, "refcoco": {"box": [0.1, 0.1, 0.5, 0.5]}}


def made_up(seed, images=48):
    """Examples of three benchmarks, two families, and the answers of all trials."""
    rng = np.random.default_rng(seed)
    examples, answers = [], []
    for image in range(images):
        ease = rng.normal(0, 0.15)
        for name, truth in TRUTH.items():
            for question in range(1 + image % 2):
                example = {"example_id": f"{name}:{image}:{question}", "benchmark": name, "image": f"i{image}"}
                examples.append(example | {"truth": json.dumps(truth), "category": ""})
                for trial, worth in WORTH.items():
                    right = rng.random() < worth[name != "refcoco"] + ease
                    answers.append((trial, example["example_id"], RIGHT[name] if right else "nothing"))
    return pd.DataFrame(examples), pd.DataFrame(answers, columns=["trial_id", "example_id", "prediction"])


def race_of(examples, answers, shares=(0.25, 0.5, 1.0), asked=None, **options):
    trials = [SimpleNamespace(trial_id=name) for name in WORTH]

    def ask(runners, questions):
        ids = [trial.trial_id for trial in runners]
        if asked is not None:
            asked.append((ids, len(questions)))
        return answers[answers["trial_id"].isin(ids) & answers["example_id"].isin(questions["example_id"])]

    rungs = slices(examples, shares, 0)
    options = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED} | options
    return race(trials[1:], trials[0], rungs, ask, COST, **options), rungs


def brute_force(examples, answers, trial, rival, family, level):
    """Whether ``rival`` leads ``trial``: the basic bootstrap of one difference, image by image and draw by draw."""
    images = sorted(set(examples["image"]))
    rng = np.random.default_rng(SEED)
    draws = [rng.multinomial(len(images), [1 / len(images)] * len(images)) for _ in range(RESAMPLES)]
    given_answers = answers.set_index(["trial_id", "example_id"])["prediction"]
    names = ["refcoco"] if family == "grounding" else ["gqa", "textvqa"]
    tables = {}
    for name in names:
        for who in (trial, rival, "whole"):
            table = {image: [0.0, 0] for image in images}
            for row in examples[examples["benchmark"] == name].itertuples():
                table[row.image][0] += given_answers[who, row.example_id] == RIGHT[name]
                table[row.image][1] += 1
            tables[name, who] = table

    def lead(copies):
        total = 0.0
        for name in names:
            shares = {}
            for who in (trial, rival, "whole"):
                hits = sum(copies[n] * tables[name, who][image][0] for n, image in enumerate(images))
                count = sum(copies[n] * tables[name, who][image][1] for n, image in enumerate(images))
                shares[who] = hits / count
            total += (shares[rival] - shares[trial]) / shares["whole"] / len(names)
        return total

    whole = lead([1] * len(images))
    excess = sorted(lead(draw) - whole for draw in draws)
    return whole - excess[math.ceil(level * (len(excess) - 1))] > 0


@pytest.mark.parametrize("seed", range(4))
def test_nobody_stops_whom_a_bootstrap_by_hand_does_not_find_dominated(seed):
    examples, answers = made_up(seed)
    raced, rungs = race_of(examples, answers)
    stopped = [standing for standing in raced.standings.values() if standing.beaten_by]
    assert {"poor"} <= {standing.trial.trial_id for standing in stopped}
    for standing in stopped:
        questions = rungs[standing.rung - 1]
        assert set(standing.beaten_by) == {"grounding", "vqa"}
        for family, rival in standing.beaten_by.items():
            assert COST[rival] <= COST[standing.trial.trial_id]
            level = 1 - (1 - CONFIDENCE) / 2
            assert brute_force(questions, answers, standing.trial.trial_id, rival, family, level)


@pytest.mark.parametrize("seed", range(4))
def test_who_is_good_at_one_family_the_cheapest_and_the_unpruned_stay(seed):
    raced, rungs = race_of(*made_up(seed))
    finished = {standing.trial.trial_id for standing in raced.finished()}
    assert {"whole", "cheap", "seer"} <= finished
    assert raced.answers < len(WORTH) * len(rungs[-1])


def test_survivors_are_estimated_as_the_full_grid_does_and_only_runners_are_asked():
    examples, answers = made_up(1)
    asked = []
    raced, rungs = race_of(examples, answers, asked=asked)
    trials = pd.DataFrame({"trial_id": list(WORTH), "method": [UNPRUNED, *["nuwa"] * (len(WORTH) - 1)]})
    scores = evaluate(trials, examples, answers, RESAMPLES, SEED).query("benchmark == 'mean'")
    finished = raced.finished()
    assert 2 < len(finished) < len(WORTH)
    for standing in finished:
        for row in scores[scores["trial_id"] == standing.trial.trial_id].itertuples():
            assert standing.estimates[row.family] == (row.score, row.low, row.high)
    costs = np.array([COST[standing.trial.trial_id] for standing in finished])
    for family in ("grounding", "vqa"):
        values = np.array([standing.estimates[family][0] for standing in finished])
        on = [family in standing.front for standing in finished]
        assert pareto_front(values, costs).tolist() == on
    assert [set(ids) for ids, _ in asked] == [
        {standing.trial.trial_id for standing in raced.standings.values() if standing.rung >= rung}
        for rung in range(1, len(rungs) + 1)
    ]
    assert raced.answers == sum(
        len(rungs[standing.rung - 1]) for standing in raced.standings.values()
    ) and raced.answers < len(WORTH) * len(examples)


def test_a_race_is_a_function_of_its_answers_and_seed():
    examples, answers = made_up(2)
    again = answers.sample(frac=1, random_state=0)
    assert race_of(examples, answers)[0] == race_of(examples, again)[0]


def test_a_trial_without_answers_leaves_the_race_and_one_that_must_stay_stays():
    examples, answers = made_up(3)
    poor = SimpleNamespace(trial_id="poor")
    raced, _ = race_of(examples, answers[answers["trial_id"] != "good"], stay=[poor])
    assert "good" not in raced.standings
    assert raced.standings["poor"].rung == 3 and not raced.standings["poor"].beaten_by


# Races on the engine's own answers.


def run_race(engine, results, done=lambda *_: None):
    bench, rungs = engine.bench, slices(engine.table, [0.5, 1.0], 0)

    def ask(trials, questions):
        asked = read_examples(questions, bench.context)
        return bench.run(results, engine.cluster, trials=trials, examples=asked, done=done).predictions.to_pandas()

    cost = {trial.trial_id: trial.schedule.average_tokens for trial in bench.trials}
    return race(bench.trials[1:], bench.trials[0], rungs, ask, cost, confidence=0.8, resamples=RESAMPLES, seed=SEED)


def run_grid(engine, results, done=lambda *_: None):
    asked = read_examples(engine.table, engine.bench.context)
    return engine.bench.run(results, engine.cluster, examples=asked, done=done)


def test_a_races_work_counts_towards_a_grid_and_a_grids_towards_a_race(engine, results_of_all, tmp_path):
    raced_new, grid_new, again = [], [], []
    raced = run_race(engine, tmp_path / "a", lambda unit, report: raced_new.append(report.answers))
    stopped = [standing for standing in raced.standings.values() if standing.rung < raced.rungs]
    assert stopped and len(raced.finished()) > 2
    assert sum(raced_new) == raced.answers < len(engine.bench.trials) * len(engine.table)
    grid = run_grid(engine, tmp_path / "a", lambda unit, report: grid_new.append(report.answers))
    assert sum(grid_new) == len(engine.bench.trials) * len(engine.table) - raced.answers, "only what was not raced"
    alone = run_grid(engine, results_of_all, lambda unit, report: again.append(unit))
    assert not again, "the undisturbed sweep is that grid"
    assert grid.predictions.equals(alone.predictions)
    assert run_race(engine, results_of_all, lambda unit, report: again.append(unit)) == raced
    assert not again, "after a grid a race asks nothing"


def test_survivors_of_the_engines_race_score_as_in_the_full_grid_bit_for_bit(engine, results_of_all, tmp_path):
    raced = run_race(engine, tmp_path / "a")
    trials = pd.DataFrame([{"trial_id": trial.trial_id, "method": trial.spec.method} for trial in engine.bench.trials])
    predictions = run_grid(engine, results_of_all).predictions.to_pandas()
    scores = evaluate(trials, engine.table, predictions, RESAMPLES, SEED).query("benchmark == 'mean'")
    rows = scores.set_index("trial_id")
    for standing in raced.finished():
        row = rows.loc[standing.trial.trial_id]
        assert standing.estimates == {"vqa": (row.score, row.low, row.high)}
    assert len({standing.estimates["vqa"] for standing in raced.finished()}) > 1


def kill_half_way(engine, tmp_path, search, units):
    """Start a ``search`` in a copy of this process and kill it (SIGKILL) once ``units`` units are stored."""
    results = tmp_path / "results"
    kill_when(lambda: len(list(results.rglob("*.unit.parquet"))) >= units, lambda: search(engine, results))
    held = ResultStore(results).done()
    return results, sum(len(unit.trials) * len(unit.examples) for unit in held)


def test_a_killed_race_goes_on_to_the_same_outcome_and_asks_only_the_rest(engine, results_of_all, tmp_path):
    undisturbed = run_race(engine, results_of_all)
    results, stored = kill_half_way(engine, tmp_path, run_race, 3)
    assert 0 < stored < undisturbed.answers
    new = []
    assert run_race(engine, results, lambda unit, report: new.append(report.answers)) == undisturbed
    assert sum(new) == undisturbed.answers - stored
