"""Predictions → scores, retention against the unpruned model, and how sure one can be of them.

Intervals are percentile bootstraps over *images*: questions of one image are not independent. Every trial is
resampled with the same draws, so a retention is a paired ratio. An aggregate interval (mean retention of a family)
comes from the same draws again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nuwa import UNPRUNED
from nuwa.benchmarks import Benchmark
from pipelines.datasets import parse_name

LEVEL = 0.95
COLUMNS = {
    "trial_id": "str",
    "benchmark": "str",
    "family": "str",
    "metric": "str",
    "score": "float64",
    "low": "float64",
    "high": "float64",
    "n": "int32",
    "headline": "bool",
    "retention": "float64",
    "retention_low": "float64",
    "retention_high": "float64",
}


class IncompleteTrials(ValueError):
    """Predictions are missing for some examples; scoring them would compare unequal question sets."""


@dataclass(frozen=True)
class Resamples:
    """``weights`` ``(resamples, images)``: how often each draw takes each image."""

    images: tuple[str, ...]
    weights: np.ndarray

    @classmethod
    def draw(cls, images: list[str], count: int, seed: int) -> Resamples:
        rng = np.random.default_rng(seed)
        share = np.full(len(images), 1 / len(images))
        return cls(tuple(images), rng.multinomial(len(images), share, size=count).astype(np.float64))

    def sums(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Weighted sums ``(resamples, columns)`` of ``values`` ``(examples, columns)``; ``rows``: each one's image."""
        per_image = np.zeros((len(self.images), values.shape[1]))
        np.add.at(per_image, rows, values)
        return self.weights @ per_image


def interval(draws: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def score_benchmark(
    benchmark: Benchmark, name: str, examples: pd.DataFrame, predictions: Mapping[str, list[str]], resamples: Resamples
) -> tuple[pd.DataFrame, dict[str, np.ndarray], dict[str, float]]:
    """Score every trial on one benchmark.

    ``predictions``: per trial, aligned with ``examples``. Returns tidy rows, and per trial the headline metric of
    every resample and of the sample itself.
    """
    truths = [json.loads(truth) for truth in examples["truth"]]
    categories = examples["category"].tolist()
    place = {image: row for row, image in enumerate(resamples.images)}
    image_rows = examples["image"].map(place).to_numpy()
    rows, draws, points = [], {}, {}
    for trial, answers in predictions.items():
        table = benchmark.score_table(answers, truths, categories)
        metrics = benchmark.aggregate(table)
        if benchmark.headline not in metrics:
            raise ValueError(f"{name} has no {benchmark.headline!r} without a judge; leave it out of sweep.benchmarks")
        numeric = table.select_dtypes("number").astype(float)
        sums = resamples.sums(np.column_stack([numeric.to_numpy(), np.ones(len(table))]), image_rows)
        by_name = dict(zip([*numeric.columns, "n"], sums.T, strict=True))
        means = {metric: _ratio(by_name[metric], by_name["n"]) for metric in metrics if metric in numeric.columns}
        draws[trial] = _headline_draws(benchmark, table, by_name, means, resamples, image_rows)
        points[trial] = metrics[benchmark.headline]
        means[benchmark.headline] = draws[trial]
        for metric, score in metrics.items():
            low, high = interval(means[metric]) if metric in means else (np.nan, np.nan)
            rows.append(
                {
                    "trial_id": trial,
                    "benchmark": name,
                    "family": benchmark.family,
                    "metric": metric,
                    "score": score,
                    "low": low,
                    "high": high,
                    "n": len(table),
                    "headline": metric == benchmark.headline,
                }
            )
    return pd.DataFrame(rows), draws, points


def _headline_draws(
    benchmark: Benchmark,
    table: pd.DataFrame,
    sums: Mapping[str, np.ndarray],
    means: Mapping[str, np.ndarray],
    resamples: Resamples,
    image_rows: np.ndarray,
) -> np.ndarray:
    """The headline metric of every resample: from sums where the benchmark can, else by scoring each resample."""
    if benchmark.headline_of_sums is not None:
        return benchmark.headline_of_sums(sums)
    if benchmark.headline in means:
        return means[benchmark.headline]
    members = pd.Series(np.arange(len(table))).groupby(image_rows).indices
    values = np.empty(len(resamples.weights))
    for number, weights in enumerate(resamples.weights):
        taken = [
            (image, copy)
            for image in np.flatnonzero(weights)
            for copy in range(int(weights[image]))
            if image in members
        ]
        parts = [table.iloc[members[image]].assign(copy=copy) for image, copy in taken]
        drawn = pd.concat(parts, ignore_index=True)
        drawn["group"] = drawn["group"] + "#" + drawn.pop("copy").astype(str)
        values[number] = benchmark.aggregate(drawn)[benchmark.headline]
    return values


def evaluate(
    trials: pd.DataFrame, examples: pd.DataFrame, predictions: pd.DataFrame, resamples: int, seed: int
) -> pd.DataFrame:
    """The tidy table of scores: see docs/results.md for its columns.

    Raises :class:`IncompleteTrials` when a trial lacks an answer to one of ``examples``.
    """
    reference = trials.loc[trials["method"] == UNPRUNED, "trial_id"].item()
    draws_of = Resamples.draw(sorted(set(examples["image"])), resamples, seed)
    answers = predictions.pivot(index="example_id", columns="trial_id", values="prediction")
    _check_complete(answers, trials, examples)
    tables, retentions, families = [], {}, {}
    for name, mine in examples.groupby("benchmark", sort=True):
        benchmark = parse_name(name)
        aligned = answers.loc[mine["example_id"]]
        by_trial = {trial: aligned[trial].tolist() for trial in trials["trial_id"]}
        rows, draws, points = score_benchmark(benchmark, name, mine, by_trial, draws_of)
        kept = {trial: _ratio(draw, draws[reference]) for trial, draw in draws.items()}
        shares = {
            trial: point / points[reference] if points[reference] > 0 else np.nan for trial, point in points.items()
        }
        for trial in kept:
            retentions[trial, name] = (shares[trial], kept[trial])
        families.setdefault(benchmark.family, []).append((name, len(mine)))
        spans = {trial: interval(draw) if np.isfinite(draw).any() else (np.nan, np.nan) for trial, draw in kept.items()}
        head = rows["headline"]
        rows.loc[head, "retention"] = rows.loc[head, "trial_id"].map(shares)
        for side, column in enumerate(("retention_low", "retention_high")):
            rows.loc[head, column] = rows.loc[head, "trial_id"].map(lambda trial: spans[trial][side])  # noqa: B023
        tables.append(rows)
    tables.append(_family_rows(trials["trial_id"].tolist(), families, retentions))
    scores = pd.concat(tables, ignore_index=True).sort_values(
        ["trial_id", "benchmark", "family", "metric"], ignore_index=True
    )
    return scores.astype(COLUMNS)[list(COLUMNS)]


def _family_rows(
    trials: list[str],
    families: Mapping[str, list[tuple[str, int]]],
    retentions: Mapping[tuple[str, str], tuple[float, np.ndarray]],
) -> pd.DataFrame:
    """Unweighted mean retention over a family's benchmarks, as the papers average."""
    rows = []
    for family, members in families.items():
        for trial in trials:
            points, draws = zip(*(retentions[trial, name] for name, _ in members), strict=True)
            low, high = interval(np.mean(draws, axis=0))
            mean = float(np.mean(points))
            rows.append(
                {
                    "trial_id": trial,
                    "benchmark": "mean",
                    "family": family,
                    "metric": "retention",
                    "score": mean,
                    "low": low,
                    "high": high,
                    "n": sum(count for _, count in members),
                    "headline": True,
                    "retention": mean,
                    "retention_low": low,
                    "retention_high": high,
                }
            )
    return pd.DataFrame(rows)


def _check_complete(answers: pd.DataFrame, trials: pd.DataFrame, examples: pd.DataFrame) -> None:
    for trial in trials["trial_id"]:
        if trial not in answers.columns:
            raise IncompleteTrials(f"trial {trial} has no predictions; `dvc repro sweep` computes them")
        lacking = answers[trial].reindex(examples["example_id"]).isna().sum()
        if lacking:
            raise IncompleteTrials(
                f"trial {trial} lacks {lacking} of {len(examples)} predictions; `dvc repro sweep` computes them"
            )
