"""Scores in the small: the numbers ``dvc metrics`` and ``dvc plots`` show."""

from __future__ import annotations

import math

import pandas as pd

from nuwa import UNPRUNED


def main_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """Trials of the first grid: methods as their authors meant them."""
    first = trials.loc[trials["method"] == UNPRUNED, "grids"].item()[0]
    return trials[[first in grids for grids in trials["grids"]]]


def _retention(scores: pd.DataFrame) -> pd.DataFrame:
    means = scores[scores["benchmark"] == "mean"]
    return means.pivot(index="trial_id", columns="family", values=["score", "low", "high"])


def headline_metrics(trials: pd.DataFrame, scores: pd.DataFrame, budget: float) -> dict:
    """Unpruned headline scores per benchmark, and mean retentions of the main trials at ``budget`` average tokens; null
    where the unpruned model scores 0, of which nothing is a share."""
    reference = trials.loc[trials["method"] == UNPRUNED, "trial_id"].item()
    own = scores[(scores["trial_id"] == reference) & scores["headline"] & (scores["benchmark"] != "mean")]
    retention = _retention(scores)["score"]
    chosen = main_trials(trials)
    chosen = chosen[[budget in asked for asked in chosen["budgets"]]].sort_values("label")
    return {
        "unpruned": {row.benchmark: round(row.score, 4) for row in own.itertuples()},
        f"retention at {budget:g} tokens": {
            row.label: {family: _rounded(value) for family, value in retention.loc[row.trial_id].items()}
            for row in chosen.itertuples()
        },
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)  # JSON has no NaN


def budget_table(trials: pd.DataFrame, scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Per family, retention against realised average tokens: one row a main trial, sorted for a line chart."""
    retention = _retention(scores)
    chosen = main_trials(trials).copy()
    chosen["line"] = (
        chosen["method"] + " " + chosen["preset"].where(chosen["method"] == "nuwa", "") + " " + chosen["position"]
    )
    chosen["line"] = chosen["line"].str.replace("  ", " ")
    tables = {}
    for family in retention["score"].columns:
        table = chosen[["line", "average_tokens", "trial_id"]].copy()
        for name in ("score", "low", "high"):
            table["retention" if name == "score" else name] = table["trial_id"].map(retention[name][family]).round(4)
        tables[family] = table.drop(columns="trial_id").sort_values(["line", "average_tokens"], ignore_index=True)
    return tables
