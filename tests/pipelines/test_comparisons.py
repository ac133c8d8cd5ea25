"""Which trials are held against which, and what comes of it, on the made-up answers of tests/pipelines/test_evidence.py."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from test_evidence import world

from pipelines.scores.comparisons import COLUMNS, Pair, compare, never_met, pairs_of, with_verdicts
from pipelines.scores.evidence import evaluate, gather
from pipelines.settings import AgainstSettings, PlannedSettings


def trial(trial_id, method, preset, position, budgets, grids=("main",), cuts=None):
    return {
        "trial_id": trial_id, "label": f"{method} {preset} {position}", "method": method, "preset": preset,
        "position": position, "budgets": list(budgets), "grids": list(grids), "stage1_keep": 28,
        "stage2_cuts": cuts, "stage2_scorer": "attention_last_token" if cuts else None,
    }  # fmt: skip


TRIALS = pd.DataFrame(
    [
        trial("whole", "unpruned", "default", "pesp", []),
        trial("n16", "nuwa", "released", "pesp", [16.0], cuts="4:4"),
        trial("p16", "nuwa", "paper", "pesp", [16.0], cuts="4:4"),
        trial("v16", "visionzip", "default", "perc", [16.0]),
        trial("w16", "visionzip", "default", "pesp", [16.0, 32.0]),
        trial("l16", "learnpruner", "default", "pesp", [16.0], cuts="3:4"),
        trial("r16", "random", "default", "pesp", [16.0], ("learned stage 1",), cuts="3:4"),
        trial("x16", "nuwa", "released", "pesp", [16.0], ("ablation",), cuts="5:4"),
    ]
)


def test_pairs_follow_from_the_trials():
    pairs = {(pair.question, pair.budget, pair.trial, pair.reference) for pair in pairs_of(TRIALS, AgainstSettings())}
    against = {("against", 16.0, one, "n16") for one in ("p16", "v16", "w16", "l16")}
    position = {("position", 16.0, "w16", "v16")}
    control = {("control", 16.0, "l16", "r16")}
    unpruned = {("unpruned", 16.0, one, "whole") for one in ("n16", "p16", "v16", "w16", "l16")}
    assert pairs == against | position | control | unpruned | {("unpruned", 32.0, "w16", "whole")}


@pytest.mark.parametrize(
    ("against", "reference"),
    [
        (AgainstSettings(preset="paper"), "p16"),
        (AgainstSettings(preset=None), "p16"),  # the first by label
        (AgainstSettings(method="visionzip", preset=None), "v16"),  # its authors renumber
        (AgainstSettings(method="visionzip", preset=None, position="gap"), "w16"),
        (AgainstSettings(method="divprune", preset=None), None),
    ],
)
def test_what_others_are_held_against_is_named(against, reference):
    found = {pair.reference for pair in pairs_of(TRIALS, against) if pair.question == "against" and pair.budget == 16}
    assert found == ({reference} if reference else set())


def test_pairs_named_before_the_run_are_corrected_alone():
    """At every budget that has both; what is not there, and a trial less itself, are no pairs."""
    nuwa, zipped = {"method": "nuwa", "preset": "paper"}, {"method": "visionzip", "preset": None}
    named = [(nuwa, zipped), (nuwa, {"method": "divprune", "preset": None}), (nuwa, nuwa)]
    planned = [PlannedSettings.model_validate({"trial": trial, "less": less}) for trial, less in named]
    pairs = pairs_of(TRIALS, AgainstSettings(), planned)
    assert [pair for pair in pairs if pair.question == "planned"] == [Pair("planned", 16.0, "p16", "v16")]
    assert set(pairs) > set(pairs_of(TRIALS, AgainstSettings()))
    missed = never_met(TRIALS, planned)
    assert len(missed) == 2 and "nuwa (paper, own ids) and divprune (any preset, own ids)" in missed[0]

    rows = pd.DataFrame(
        {
            "question": ["planned"] + ["against"] * 9, "budget": 16.0, "trial_id": list("abcdefghij"), "reference": "n",
            "family": "vqa", "benchmark": "mean", "difference": -0.06, "low": -0.11, "high": -0.01, "images": 200,
            "p": 0.02, "p_margin": np.nan,
        }
    )  # fmt: skip
    verdicts = with_verdicts(rows).set_index("trial_id")
    assert verdicts.loc["a", ["together", "p_corrected", "verdict"]].tolist() == [1, 0.02, "behind"]
    assert set(verdicts.drop("a")["verdict"]) == {"not told apart"}


@pytest.fixture(scope="module")
def compared():
    """The trials `pruned` and `again` of which the second answers alike, and what their pairs came to."""
    trials, examples, predictions = world(images=40)
    twin = predictions[predictions["trial_id"] == "pruned"].assign(trial_id="again")
    trials = pd.concat([trials, pd.DataFrame({"trial_id": ["again"], "method": ["nuwa"]})], ignore_index=True)
    predictions = pd.concat([predictions, twin], ignore_index=True)
    pairs = [
        Pair("unpruned", 16.0, "pruned", "whole"),
        Pair("unpruned", 16.0, "again", "whole"),
        Pair("against", 16.0, "again", "pruned"),
    ]
    evidence = gather(trials, examples, predictions, 200, 0)
    scores = evaluate(trials, examples, predictions, 200, 0)
    return compare(evidence, pairs, 0.01), scores, (evidence, pairs)


def test_differences_are_of_retentions(compared):
    table, scores, _ = compared
    assert list(table.columns) == list(COLUMNS)
    kept = scores[scores["headline"]].set_index(["trial_id", "family", "benchmark"])["retention"]
    for row in table.itertuples():
        expected = kept[row.trial_id, row.family, row.benchmark] - kept[row.reference, row.family, row.benchmark]
        assert row.difference == pytest.approx(expected, abs=1e-12)
        assert row.low <= row.difference <= row.high
        assert row.images == 40


def test_trials_that_answer_alike_differ_in_nothing(compared):
    """On the 40 images of the sample; how much may change on others is what Wilson's interval says of no change in so many."""
    table, scores, _ = compared
    alike = table[table["question"] == "against"]
    whole = scores[(scores["trial_id"] == "whole") & scores["headline"] & (scores["benchmark"] != "mean")]
    unpruned = whole.set_index("benchmark")["score"].to_dict()
    for row in alike.itertuples():
        score = unpruned.get(row.benchmark) or unpruned[{"vqa": "textvqa", "grounding": "refcoco"}[row.family]]
        spread = student.ppf(0.975, 39) ** 2 * 3 / 79 / score  # an image has up to 3 of the 79 questions
        assert row.high == -row.low == pytest.approx(spread / (1 + spread))
    assert (alike["difference"] == 0).all()
    assert (alike["p"] == 1).all() and set(alike["verdict"]) == {"not told apart"}


def test_verdicts_follow_from_corrected_p_values(compared):
    table, _, _ = compared
    whole = table[table["question"] == "unpruned"]
    assert set(whole["together"]) == {4}  # two trials in two families; and as many benchmarks
    assert (whole["p_corrected"] >= whole["p"]).all()
    assert set(whole.loc[whole["p_corrected"] < 0.05, "verdict"]) == {"behind"}
    assert whole["p_margin"].notna().all() and table.loc[table["question"] == "against", "p_margin"].isna().all()


def test_blocks_change_nothing(compared, monkeypatch):
    table, _, (evidence, pairs) = compared
    monkeypatch.setattr("pipelines.scores.evidence.BLOCK_BYTES", 1)
    pd.testing.assert_frame_equal(table, compare(evidence, pairs, 0.01), rtol=1e-12)


def test_no_pair_makes_an_empty_table_of_all_columns(compared):
    _, _, (evidence, _) = compared
    table = compare(evidence, [], 0.01)
    assert table.empty and list(table.columns) == list(COLUMNS)


def test_a_small_sure_difference_within_the_margin_is_equivalence():
    rows = pd.DataFrame(
        {
            "question": "unpruned", "budget": 16.0, "trial_id": ["a", "b"], "reference": "whole", "family": "vqa",
            "benchmark": "mean", "difference": [-0.002, -0.2], "low": -0.3, "high": 0.1, "images": 500,
            "p": [0.001, 0.001], "p_margin": [0.001, 1.0],
        }
    )  # fmt: skip
    assert with_verdicts(rows)["verdict"].tolist() == ["equivalent", "behind"]
    assert np.isclose(with_verdicts(rows)["p_corrected"], 0.002).all()
