"""Scores, retention and intervals against loops and hand-worked numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from nuwa.benchmarks import BENCHMARKS
from pipelines.data.datasets import parse_name
from pipelines.scores.evidence import IncompleteTrials, evaluate


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


def widened_bca(point, draws, left_out):
    """Efron (1987), equations 2.3, 2.4 and 6.6, with Student's t in place of the normal quantile, number by number.

    ``left_out``: the quantity without each image that has questions.
    """
    normal, count = NormalDist(), len(left_out)
    below = sum(1.0 if draw < point - 1e-12 else 0.5 if draw < point + 1e-12 else 0.0 for draw in draws) / len(draws)
    bias = normal.inv_cdf(min(max(below, 1 / (len(draws) + 1)), len(draws) / (len(draws) + 1)))
    pulls = [point - value for value in left_out]
    skew = sum(pull**3 for pull in pulls) / (6 * sum(pull**2 for pull in pulls) ** 1.5)
    ends = []
    for tail in (0.025, 0.975):
        reach = bias + student.ppf(tail, count - 1) * math.sqrt(count / (count - 1))
        ends.append(np.quantile(draws, normal.cdf(bias + reach / (1 - skew * reach))))
    return tuple(ends)


def paired_ends(point, draws, left_out, changed, step):
    """Of a retention: ``widened_bca``, Student's with half an image's change more, and the root of Wilson's quadratic.

    ``changed``: which images' answers score otherwise than the unpruned model's; ``step``: the most that an image can do.
    """
    low, high = widened_bca(point, draws, left_out)
    count, quantile = len(left_out), student.ppf(0.975, len(left_out) - 1)
    pulls = [point - value for value in left_out]
    variance = (count - 1) / count * sum((pull - sum(pulls) / count) ** 2 for pull in pulls)
    own = [abs(point - 1 + (count - 1) * pull) / count for pull, other in zip(pulls, changed, strict=True) if other]
    size = (sum(one**2 for one in own) - sum(own) ** 2 / count + step**2) / (sum(own) + step)
    reach = quantile * math.sqrt(variance + (size / 2) ** 2)
    # (p - lost)² = t² p (1 - p) size, in the shares p that may truly be lost
    lost = max(np.roots([1 + quantile**2 * size, -2 * (1 - point) - quantile**2 * size, (1 - point) ** 2]))
    return min(low, max(0.0, min(point - reach, 1 - lost))), max(high, point + reach)


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
    trials, examples, predictions = world(images=18)
    resamples, seed = 150, 3
    scores = evaluate(trials, examples, predictions, resamples, seed)
    images = sorted(set(examples["image"]))
    weights = np.random.default_rng(seed).multinomial(len(images), [1 / len(images)] * len(images), size=resamples)
    answers = predictions.set_index(["trial_id", "example_id"])["prediction"]
    mine = examples[examples.benchmark == "textvqa"]
    left_out = [[int(other != image) for other in images] for image in images]
    score_draws, retention_draws = [], []
    for draw in [*weights, *left_out, [1] * len(images)]:
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

    def by_hand(values, ends=widened_bca, *more):
        return ends(values[-1], values[:resamples], values[resamples:-1], *more)

    right = {(trial, example) for (trial, example), answer in answers.items() if answer == "3"}
    hits = {
        trial: [
            sum((trial, one.example_id) in right for one in mine.itertuples() if one.image == image) for image in images
        ]
        for trial in ("whole", "pruned")
    }
    changed = [one != other for one, other in zip(hits["whole"], hits["pruned"], strict=True)]
    kept = by_hand(retention_draws, paired_ends, changed, 3 / sum(hits["whole"]))
    assert (found.low, found.high) == pytest.approx(by_hand(score_draws))
    assert (found.retention_low, found.retention_high) == pytest.approx(kept)
    assert kept != by_hand(retention_draws)
    family = row(scores, "pruned", "mean", "retention")
    assert family.score == pytest.approx(
        row(scores, "pruned", "refcoco", "acc@0.5").retention if family.family == "grounding" else found.retention
    )


def test_the_unpruned_model_retains_itself_exactly():
    trials, examples, predictions = world()
    scores = evaluate(trials, examples, predictions, 100, 0)
    own = scores[(scores.trial_id == "whole") & scores.headline]
    assert (own[["retention", "retention_low", "retention_high"]] == 1.0).all(axis=None)


RATIO_BENCHMARKS = {
    "pope": lambda rng, i: ({"answer": ("yes", "no")[int(rng.integers(2))]}, "random"),
    "mme": lambda rng, i: ({"answer": ("yes", "no")[i % 2], "group": f"g{i // 2}"}, ("count", "OCR")[i // 2 % 2]),
    "mmbench": lambda rng, i: ({"answer": "A", "options": {"A": "x", "B": "y"}, "group": f"g{i // 4}"}, ""),
}
ANSWERS = {"pope": ("yes", "no", "maybe"), "mme": ("yes", "no", "maybe"), "mmbench": ("A", "A", "A", "B")}


@pytest.mark.parametrize("name", RATIO_BENCHMARKS)
def test_ratio_metrics_bootstrap_as_if_every_resample_were_scored_again(name):
    """The oracle draws images, copies their rows, gives every copy's groups names of their own, and aggregates."""
    rng = np.random.default_rng(1)
    truths, categories = zip(*(RATIO_BENCHMARKS[name](rng, i) for i in range(48)), strict=True)
    images = [f"i{i // 4 % 7}" for i in range(48)]
    examples = pd.DataFrame(
        {
            "example_id": [f"{name}:{i}" for i in range(48)],
            "benchmark": name,
            "image": images,
            "truth": [json.dumps(truth) for truth in truths],
            "category": categories,
        }
    )
    said = [str(rng.choice(ANSWERS[name])) for _ in range(48)]
    right = ["A" if name == "mmbench" else truth["answer"] for truth in truths]
    trials = pd.DataFrame({"trial_id": ["whole", "pruned"], "method": ["unpruned", "nuwa"]})
    predictions = pd.concat(
        pd.DataFrame({"trial_id": trial, "example_id": examples["example_id"], "prediction": answers})
        for trial, answers in (("whole", right), ("pruned", said))
    )
    resamples, seed = 120, 5
    benchmark = parse_name(name)
    found = row(evaluate(trials, examples, predictions, resamples, seed), "pruned", name, benchmark.headline)

    table = benchmark.score_table(said, truths, categories)
    drawn = np.random.default_rng(seed).multinomial(7, [1 / 7] * 7, size=resamples)
    draws = []
    for weights in [*drawn, *(1 - np.eye(7, dtype=int))]:
        copies = [
            table[[image == f"i{number}" for image in images]].assign(copy=copy)
            for number, count in enumerate(weights)
            for copy in range(count)
        ]
        resampled = pd.concat(copies, ignore_index=True)
        resampled["group"] += "#" + resampled.pop("copy").astype(str)
        draws.append(benchmark.aggregate(resampled)[benchmark.headline])
    assert found.score == pytest.approx(benchmark.aggregate(table)[benchmark.headline])
    assert (found.low, found.high) == pytest.approx(widened_bca(found.score, draws[:resamples], draws[resamples:]))
    assert found.low < found.high


def test_blocks_of_trials_and_images_change_nothing(monkeypatch):
    trials, examples, predictions = world()
    one = evaluate(trials, examples, predictions, 100, 0)
    monkeypatch.setattr("pipelines.scores.evidence.BLOCK_BYTES", 1)
    monkeypatch.setattr("pipelines.scores.evidence.IMAGE_BLOCK", 2)
    pd.testing.assert_frame_equal(one, evaluate(trials, examples, predictions, 100, 0), rtol=1e-14)


def test_a_draw_without_any_question_of_a_benchmark_does_not_count():
    """One image holds all of a benchmark's questions: draws that miss it have no score, and the others are all alike.

    It is wrong on all of them; what one image can say is that a score above 97.5 % would hardly look so.
    """
    trials, examples, predictions = world()
    lonely = examples[(examples.benchmark == "refcoco") | (examples.image == "i1")]
    scores = evaluate(trials, lonely, predictions, 100, 0)
    found = row(scores, "pruned", "textvqa", "accuracy")
    assert found.low == found.score == 0
    assert found.high == pytest.approx(0.975)


def test_each_distinct_answer_is_scored_once(monkeypatch):
    trials, examples, predictions = world()
    asked = []
    for name in ("textvqa", "refcoco"):
        benchmark = parse_name(name)

        def counting(prediction, truth, score=benchmark.score):
            asked.append((json.dumps(truth), prediction))
            return score(prediction, truth)

        known = dataclasses.replace(benchmark, score=counting)
        monkeypatch.setitem(BENCHMARKS._entries, name, (known, *BENCHMARKS[name][1:]))
    evaluate(trials, examples, predictions, 100, 0)
    assert len(asked) == len(predictions.drop_duplicates(["example_id", "prediction"]))
    assert len(asked) < len(predictions)


def test_categorical_columns_and_foreign_rows_change_nothing():
    trials, examples, predictions = world()
    one = evaluate(trials, examples, predictions, 100, 0)
    foreign = pd.DataFrame({"trial_id": ["whole", "x"], "example_id": ["y", "y"], "prediction": ["3", "3"]})
    more = pd.concat([foreign, predictions, foreign.assign(example_id=predictions["example_id"].iloc[0]).iloc[1:]])
    pd.testing.assert_frame_equal(one, evaluate(trials, examples, more.astype("category"), 100, 0))


def test_an_answer_given_twice_is_refused():
    trials, examples, predictions = world()
    twice = pd.concat([predictions, predictions.iloc[:1]])
    with pytest.raises(ValueError, match="predictions hold 1 answers twice; `dvc repro -f sweep` mends it"):
        evaluate(trials, examples, twice, 100, 0)


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
