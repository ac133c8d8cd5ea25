"""What another seed changes: the spread by hand, which pairs it belongs to, and what metrics, MLflow and words make of it."""

from __future__ import annotations

import statistics

import numpy as np
import pandas as pd
import pytest
from test_tracking import tables

from pipelines.scores.seeds import hangs_on_seed, sentence, spread_over_seeds, with_seeds
from pipelines.scores.summary import headline_metrics
from pipelines.tracking.runs import trial_runs

KEPT = {"r0": 0.50, "r1": 0.54, "r2": 0.52}


def trial(trial_id: str, method: str, seed: int = 0, **more) -> dict:
    plain = {"preset": "default", "position": "pesp", "average_tokens": 16.0, "budgets": [16.0], "grids": ["main"]}
    cuts = {"stage1_keep": 16, "stage2_layer": None, "stage2_keep": None, "stage2_cuts": None, "stage2_scorer": None}
    row = {"trial_id": trial_id, "label": trial_id, "method": method, "seed": seed, **plain, **cuts}
    return row | {"stage2_recycling": False, "params": "{}"} | more


TRIALS = pd.DataFrame(
    [
        trial("whole", "unpruned", budgets=[]), trial("n", "nuwa"), trial("l", "learnpruner"),
        *(trial(name, "random", seed) for seed, name in enumerate(KEPT)), trial("alone", "random", position="perc"),
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    kept = dict.fromkeys(TRIALS["trial_id"], 0.9) | KEPT
    of = {"metric": "retention", "headline": True}
    return pd.DataFrame(
        [
            {**of, "trial_id": name, "family": family, "benchmark": benchmark, "score": value}
            | {"low": value - 0.03, "high": value + 0.05}
            | {"retention": value, "retention_low": value - 0.03, "retention_high": value + 0.05}
            for name, value in kept.items()
            for family, benchmark in (("vqa", "mean"), ("vqa", "pope"))
        ]
    )


@pytest.fixture(scope="module")
def spread(scores) -> pd.DataFrame:
    return spread_over_seeds(TRIALS, scores)


def test_spread_is_of_trials_that_differ_in_their_seed_alone(spread):
    assert spread["trial_id"].tolist() == ["r0", "r0", "r1", "r1", "r2", "r2"]
    row = spread.iloc[0]
    assert (row["benchmark"], row["seeds"], row["least"], row["most"]) == ("mean", 3, 0.50, 0.54)
    assert row["mean"] == pytest.approx(0.52) and row["over_images"] == pytest.approx(0.04)
    assert row["deviation"] == pytest.approx(statistics.stdev(KEPT.values()))


@pytest.mark.parametrize(
    ("more", "hangs"),
    [
        ({"method": "nuwa"}, False), ({"method": "random"}, True), ({"method": "learnpruner"}, True),
        ({"method": "nuwa", "stage2_scorer": "random"}, True), ({"method": "sparsevlm", "stage2_recycling": True}, True),
        ({"method": "nuwa", "stage2_scorer": "attention_last_token"}, False),
    ],
)  # fmt: skip
def test_what_is_drawn_or_trained_hangs_on_a_seed(more, hangs):
    assert hangs_on_seed(trial("t", **more)) is hangs


def test_pairs_say_whether_their_spread_over_seeds_is_known(spread):
    ends = [("n", "whole"), ("r1", "n"), ("r1", "l"), ("l", "n"), ("alone", "n"), ("r0", "r2")]
    pairs = pd.DataFrame(ends, columns=["trial_id", "reference"]).assign(family="vqa", benchmark="mean")
    told = with_seeds(pairs, TRIALS, spread)
    assert told["seeds"].tolist() == [
        "no seed", "several seeds", "one seed", "one seed", "one seed", "several seeds",
    ]  # fmt: skip
    deviation = statistics.stdev(KEPT.values())
    assert told["seed_deviation"].dropna().tolist() == pytest.approx([deviation, deviation * np.sqrt(2)])
    empty = with_seeds(pairs[:0], TRIALS, spread)
    assert list(empty.columns) == list(told.columns)


def test_metrics_hold_the_largest_spread_at_the_budget(scores, spread):
    assert headline_metrics(TRIALS, scores, 16.0, spread)["seeds"] == 0.02
    assert headline_metrics(TRIALS, scores, 16.0, spread[:0])["seeds"] is None


def test_mlflow_shows_it_of_the_trials_that_have_it(spread):
    trials, scores, _ = tables()
    mine = spread.iloc[:1].assign(trial_id=trials["trial_id"].iloc[-1])
    plain, shown = (trial_runs(trials, scores, None, {}, spread=known) for known in (None, mine))
    assert shown[:-1] == plain[:-1]
    assert dict(shown[-1].metrics) == dict(plain[-1].metrics) | {
        "vqa_retention_over_seeds": pytest.approx(0.02),
        "seeds": 3,
    }


def test_words_say_it_once(spread):
    labels = {"r0": "random", "r1": "random 1", "r2": "random 2"}
    assert sentence(spread, labels, {"vqa": "VQA"}) == (
        "random: VQA 52.0 on average of 3 seeds, 50.0 to 54.0, standard deviation 2.0, where an interval over images "
        "reaches 4.0 to either side"
    )
    assert sentence(spread[:0], labels, {}) == ""
