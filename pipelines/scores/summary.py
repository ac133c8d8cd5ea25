"""Scores in the small: what ``dvc metrics``, ``dvc plots`` and a diff of git show."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from nuwa import UNPRUNED

FAMILIES = {"grounding": "vg", "vqa": "vqa"}  # and their short names, so that a terminal has room for all
HERO = "nuwa"  # the method that is compared with the best of the others


def main_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """Trials of the first grid: methods as their authors meant them."""
    first = trials.loc[trials["method"] == UNPRUNED, "grids"].item()[0]
    return trials[[first in grids for grids in trials["grids"]]]


def _retention(scores: pd.DataFrame) -> pd.DataFrame:
    means = scores[scores["benchmark"] == "mean"]
    return means.pivot(index="trial_id", columns="family", values=["score", "low", "high"])


Metrics = dict[str, dict[str, float | None] | float | None]


def headline_metrics(
    trials: pd.DataFrame, scores: pd.DataFrame, budget: float, spread: pd.DataFrame | None = None
) -> Metrics:
    """Nine numbers whose names do not depend on the sweep, so that any two runs can be held side by side.

    ``full``: the unpruned model's mean headline score over the benchmarks of a family; ``nuwa`` and ``rival``: mean retention at ``budget``
    average tokens (``vg``: visual grounding) of Nüwa's best main trial and of the best of all others, where best is by the mean over families;
    ``lead``: Nüwa's less the rival's; ``seeds``: the largest standard deviation over seeds of a trial's mean retention at
    ``budget``, from ``spread`` (:func:`pipelines.scores.seeds.spread_over_seeds`). Null where there is none, and where the unpruned model scores 0, of which nothing
    is a share.
    """
    reference = trials.loc[trials["method"] == UNPRUNED, "trial_id"].item()
    own = scores[(scores["trial_id"] == reference) & scores["headline"] & (scores["benchmark"] != "mean")]
    unpruned = own.groupby("family")["score"].mean()

    table = headline_table(trials, scores, budget)
    table = table[table["method"] != UNPRUNED]
    hero, rival = (_best(table[of_hero]) for of_hero in (table["method"] == HERO, table["method"] != HERO))
    return {
        "full": {short: _rounded(unpruned.get(family)) for family, short in FAMILIES.items()},
        "nuwa": {short: _rounded(hero.get(family)) for family, short in FAMILIES.items()},
        "rival": {short: _rounded(rival.get(family)) for family, short in FAMILIES.items()},
        "lead": {short: _difference(hero.get(family), rival.get(family)) for family, short in FAMILIES.items()},
        "seeds": _over_seeds(trials, spread, budget),
    }


def headline_trials(trials: pd.DataFrame, scores: pd.DataFrame, budget: float, most: int) -> list[str]:
    """Ids of the unpruned trial and of every method's best main trial at ``budget``, the best methods first.

    Best is by the mean retention over families; ``most``: how many at most, the unpruned one among them.
    """
    retention = _retention(scores)["score"].mean(axis=1)
    chosen = main_trials(trials)
    chosen = chosen[[budget in budgets for budgets in chosen["budgets"]]]
    chosen = chosen[chosen["method"] != UNPRUNED]
    ranked = chosen.assign(kept=chosen["trial_id"].map(retention)).dropna(subset="kept")
    ranked = ranked.sort_values(["kept", "label"], ascending=[False, True]).drop_duplicates("method")
    reference = trials.loc[trials["method"] == UNPRUNED, "trial_id"].item()
    return [reference, *ranked["trial_id"]][:most]


def _over_seeds(trials: pd.DataFrame, spread: pd.DataFrame | None, budget: float) -> float | None:
    """Of any grid's trials at ``budget``; null where no seed was varied there."""
    if spread is None:
        return None
    there = trials.loc[[budget in budgets for budgets in trials["budgets"]], "trial_id"]
    means = spread[spread["trial_id"].isin(there) & (spread["benchmark"] == "mean")]
    return None if means.empty else _rounded(means["deviation"].max())


def _best(table: pd.DataFrame) -> dict[str, Any]:
    """The row with the highest mean retention; the first of equals, in the order of labels."""
    means = table[[family for family in FAMILIES if family in table]].mean(axis=1)
    return {} if means.isna().all() else table.loc[means.idxmax()].to_dict()


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else _rounded(one - other)


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(float(value), 4)  # JSON has no NaN


def headline_table(trials: pd.DataFrame, scores: pd.DataFrame, budget: float) -> pd.DataFrame:
    """The main trials at ``budget`` average tokens by label, with the mean retention of each family and its interval."""
    retention = _retention(scores)
    chosen = main_trials(trials)
    chosen = chosen[[budget in budgets for budgets in chosen["budgets"]]].sort_values("label")
    table = chosen[["label", "method", "preset", "position", "average_tokens", "trial_id"]].reset_index(drop=True)

    for family in retention["score"].columns:
        for bound, suffix in (("score", ""), ("low", " low"), ("high", " high")):
            table[f"{family}{suffix}"] = table["trial_id"].map(retention[bound][family]).round(4)
    return table.drop(columns="trial_id")


def budget_curves(trials: pd.DataFrame, scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Per family, retention against realised average tokens: a row a main trial, sorted for one line a method.

    ``method`` names the preset too where a method has several, and the layer of the cut; position strategies are panels beside each other.
    """
    retention = _retention(scores)
    chosen = main_trials(trials).copy()
    chosen = chosen[chosen["method"] != UNPRUNED]
    several = chosen.groupby("method")["preset"].transform("nunique") > 1
    details = chosen["preset"].where(several, "")
    # Of one selection with cuts at several layers each is a line.
    twice = chosen.assign(budget=chosen["average_tokens"].round()).duplicated(
        ["method", "preset", "position", "budget"]
    )
    apart = chosen["method"].isin(chosen.loc[twice, "method"]) & chosen["preset"].isin(chosen.loc[twice, "preset"])
    layers = "layer " + chosen["stage2_layer"].map(lambda layer: "off" if pd.isna(layer) else f"{layer:g}")
    details = details.where(~apart, (details + ", " + layers).str.removeprefix(", "))
    chosen["method"] = chosen["method"].where(details == "", chosen["method"] + " (" + details + ")")

    tables = {}
    for family in retention["score"].columns:
        table = chosen[["method", "position", "average_tokens", "trial_id"]].copy()
        for bound, name in (("score", "retention"), ("low", "low"), ("high", "high")):
            table[name] = table["trial_id"].map(retention[bound][family]).round(4)
        order = ["method", "position", "average_tokens"]
        tables[family] = table.drop(columns="trial_id").sort_values(order, ignore_index=True)
    return tables
