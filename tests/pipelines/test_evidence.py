"""Scores, retention and intervals against loops and hand-worked numbers."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from pipelines.evidence import IncompleteTrials, Resamples, evaluate


def world(images=6):
    """Two benchmarks, two trials; `pruned` is right on some of what `unpruned` is right on."""
    rng = np.random.default_rng(0)
    examples, predictions = [], []
    for number in range(images):
        for k in range(1 + number % 3):
            for name, family, truth in (
                ("textvqa", "vqa", {"answers": ["3"] * 10}),
                ("refcoco", "grounding", {"box": [0.1, 0.1, 0.5, 0.5]}),
            ):
                example = f"{name}:{number}:{k}"
                examples.append(
                    {
                        "example_id": example,
                        "benchmark": name,
                        "family": family,
                        "image": f"i{number}",
                        "truth": json.dumps(truth),
                        "category": "",
                    }
                )
                right = {"textvqa": "3", "refcoco": "[0.10, 0.10, 0.50, 0.50]"}[name]
                wrong = {"textvqa": "4", "refcoco": "no box"}[name]
                for trial, chance in (("whole", 0.9), ("pruned", 0.5)):
                    answer = right if rng.random() < chance else wrong
                    predictions.append({"trial_id": trial, "example_id": example, "prediction": answer})
    trials = pd.DataFrame({"trial_id": ["whole", "pruned"], "method": ["unpruned", "nuwa"]})
    return trials, pd.DataFrame(examples), pd.DataFrame(predictions)


def row(scores, trial, benchmark, metric):
    return scores[(scores.trial_id == trial) & (scores.benchmark == benchmark) & (scores.metric == metric)].iloc[0]


def test_scores_and_retention_are_plain_means_and_ratios():
    trials, examples, predictions = world()
    scores = evaluate(trials, examples, predictions, 200, 0)
    merged = predictions.merge(examples, on="example_id")
    for benchmark, metric, right in (("textvqa", "accuracy", "3"), ("refcoco", "acc@0.5", "[0.10, 0.10, 0.50, 0.50]")):
        mine = merged[merged.benchmark == benchmark]
        means = {trial: float((group.prediction == right).mean()) for trial, group in mine.groupby("trial_id")}
        for trial, mean in means.items():
            found = row(scores, trial, benchmark, metric)
            assert found.score == pytest.approx(mean)
            assert found.retention == pytest.approx(mean / means["whole"])
            assert found.headline
            assert found.n == len(mine) // 2
    failures = row(scores, "pruned", "refcoco", "parse_failure")
    assert failures.score == pytest.approx(1 - row(scores, "pruned", "refcoco", "acc@0.5").score)


def test_intervals_are_the_paired_image_bootstrap_done_by_hand():
    trials, examples, predictions = world()
    resamples, seed = 150, 3
    scores = evaluate(trials, examples, predictions, resamples, seed)
    images = sorted(set(examples["image"]))
    weights = np.random.default_rng(seed).multinomial(len(images), [1 / len(images)] * len(images), size=resamples)
    answers = predictions.set_index(["trial_id", "example_id"])["prediction"]
    mine = examples[examples.benchmark == "textvqa"]
    score_draws, retention_draws = [], []
    for draw in weights:
        totals = {}
        for trial in ("whole", "pruned"):
            hits = count = 0
            for example in mine.itertuples():
                copies = draw[images.index(example.image)]
                hits += copies * (answers[trial, example.example_id] == "3")
                count += copies
            totals[trial] = hits / count
        score_draws.append(totals["pruned"])
        retention_draws.append(totals["pruned"] / totals["whole"])
    found = row(scores, "pruned", "textvqa", "accuracy")
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(score_draws, [2.5, 97.5])))
    expected = tuple(np.percentile(retention_draws, [2.5, 97.5]))
    assert (found.retention_low, found.retention_high) == pytest.approx(expected)
    family = row(scores, "pruned", "mean", "retention")
    assert family.score == pytest.approx(
        row(scores, "pruned", "refcoco", "acc@0.5").retention if family.family == "grounding" else found.retention
    )


def test_the_unpruned_model_retains_itself_exactly():
    trials, examples, predictions = world()
    scores = evaluate(trials, examples, predictions, 100, 0)
    own = scores[(scores.trial_id == "whole") & scores.headline]
    assert (own[["retention", "retention_low", "retention_high"]] == 1.0).all(axis=None)


def test_ratio_metrics_bootstrap_the_same_from_sums_and_from_resampled_rows():
    from pipelines.datasets import parse_name
    from pipelines.evidence import score_benchmark

    rng = np.random.default_rng(1)
    examples = pd.DataFrame(
        {
            "example_id": [f"pope:{i}" for i in range(40)],
            "image": [f"i{i % 7}" for i in range(40)],
            "truth": [json.dumps({"answer": ("yes", "no")[int(rng.integers(2))]}) for _ in range(40)],
            "category": "random",
        }
    )
    answers = {"t": [("yes", "no", "maybe")[int(rng.integers(3))] for _ in range(40)]}
    draws = Resamples.draw(sorted(set(examples["image"])), 120, 5)
    from dataclasses import replace

    pope = parse_name("pope")
    _, fast, _ = score_benchmark(pope, "pope", examples, answers, draws)
    _, slow, _ = score_benchmark(replace(pope, headline_of_sums=None), "pope", examples, answers, draws)
    np.testing.assert_allclose(fast["t"], slow["t"], atol=1e-12)


def test_missing_predictions_are_refused_by_name():
    trials, examples, predictions = world()
    with pytest.raises(IncompleteTrials) as raised:
        evaluate(trials, examples, predictions.iloc[:-1], 100, 0)
    total = len(examples)
    assert str(raised.value) == f"trial pruned lacks 1 of {total} predictions; `dvc repro sweep` computes them"
    with pytest.raises(IncompleteTrials, match="trial pruned has no predictions; `dvc repro sweep` computes them"):
        evaluate(trials, examples, predictions[predictions.trial_id == "whole"], 100, 0)


def test_order_of_rows_changes_nothing():
    trials, examples, predictions = world()
    one = evaluate(trials, examples, predictions, 100, 0)
    shuffled = evaluate(
        trials.sample(frac=1, random_state=1),
        examples.sample(frac=1, random_state=2),
        predictions.sample(frac=1, random_state=3),
        100,
        0,
    )
    pd.testing.assert_frame_equal(one, shuffled)
