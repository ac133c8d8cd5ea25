"""What another seed changes, beside what other images would.

Intervals and verdicts are over images, of one seed. Where trials differ in nothing but the seed, their spread is known; it
stands beside, in a table of its own and with every pair that one of them is in. It is part of no interval: a few seeds say
too little of a spread to widen one by. A pair says whether anything in it hangs on a seed at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from nuwa.methods import RECIPES
from nuwa.stage1.registry import get_method
from nuwa.stage2.scorers import get_scorer

COLUMNS = {
    "trial_id": "str",
    "family": "str",
    "benchmark": "str",
    "seeds": "int32",
    "mean": "float64",
    "least": "float64",
    "most": "float64",
    "deviation": "float64",
    "over_images": "float64",
}
OF_PAIRS = ("seeds", "seed_deviation")  # columns of comparisons
NO_SEED, ONE_SEED, SEVERAL = "no seed", "one seed", "several seeds"
TRAINED = ("learnpruner",)  # what they keep hangs on the seed of a training, which is no axis of a sweep
# All that a trial is, beside its seed.
SAME = (
    "method", "preset", "position", "average_tokens", "stage1_keep", "stage2_layer", "stage2_keep", "stage2_cuts",
    "stage2_scorer", "stage2_recycling", "params",
)  # fmt: skip


def spread_over_seeds(trials: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """A row for each trial that differs from others in its seed alone, and benchmark or family's ``mean``.

    ``trials``, ``scores``: rows of their tables. ``deviation``: the standard deviation of retention over ``seeds`` seeds;
    ``over_images``: how far a 95 % interval over images reaches to either side, on average.
    """
    key = trials[list(SAME)].astype("string").fillna("").agg("\x1f".join, axis=1)
    alike = trials[["trial_id"]].assign(kind=key)[key.duplicated(keep=False)]
    known = scores.loc[scores["headline"], ["trial_id", "family", "benchmark", "retention"]].assign(
        reach=(scores["retention_high"] - scores["retention_low"]) / 2
    )
    known = known.merge(alike, on="trial_id").dropna(subset="retention")

    grouped = known.groupby(["kind", "family", "benchmark"])
    for name, column, how in (
        ("seeds", "retention", "size"), ("mean", "retention", "mean"), ("least", "retention", "min"),
        ("most", "retention", "max"), ("deviation", "retention", "std"), ("over_images", "reach", "mean"),
    ):  # fmt: skip
        known[name] = grouped[column].transform(how)
    rows = known[known["seeds"] > 1].sort_values(["trial_id", "family", "benchmark"], ignore_index=True)
    return rows.astype(COLUMNS)[list(COLUMNS)]


def hangs_on_seed(trial: Mapping[str, Any]) -> bool:
    """Whether another seed, of the sweep or of a training, would change what a trial keeps; ``trial``: a row of its table."""
    recipe = RECIPES.get(trial["method"])
    scorer = trial["stage2_scorer"]
    drawn = get_method(recipe.stage1 if recipe else trial["method"]).seeded
    drawn |= not pd.isna(scorer) and get_scorer(scorer).seeded
    return drawn or bool(trial["stage2_recycling"]) or trial["method"] in TRAINED


def with_seeds(comparisons: pd.DataFrame, trials: pd.DataFrame, spread: pd.DataFrame) -> pd.DataFrame:
    """``comparisons`` with two columns more: what seeds have to do with each pair.

    ``seeds``: ``no seed`` where nothing hangs on one; ``one seed`` where something does of which one seed is known, whose
    spread is not included; ``several seeds`` where the spread is known of all that does. ``seed_deviation``: then the
    difference's standard deviation over seeds, which is beside its interval and not in it; else null. Both sides count as
    drawn apart: where they share their draws, as one method under two kinds of position ids, it is too large.
    """
    hangs = {row["trial_id"]: hangs_on_seed(row) for row in trials.to_dict("records")}
    known = spread.set_index(["trial_id", "family", "benchmark"])["deviation"].to_dict()
    seeds, deviations = [], []
    for row in comparisons.to_dict("records"):
        concerned = [one for one in (row["trial_id"], row["reference"]) if hangs[one]]
        found = [known.get((one, row["family"], row["benchmark"]), np.nan) for one in concerned]

        sure = bool(found) and not np.isnan(found).any()
        seeds.append(NO_SEED if not found else SEVERAL if sure else ONE_SEED)
        deviations.append(float(np.hypot.reduce(found)) if sure else np.nan)
    return comparisons.assign(
        seeds=pd.Series(seeds, dtype="str"), seed_deviation=pd.Series(deviations, dtype="float64")
    )


def sentence(spread: pd.DataFrame, labels: Mapping[str, str], names: Mapping[str, str]) -> str:
    """What seeds change in mean retention, in words; nothing where no seed was varied.

    ``labels``: trial id → its name; ``names``: family → as it is printed.
    """
    means = spread[spread["benchmark"] == "mean"]
    first = means.drop_duplicates(["family", "seeds", "mean", "deviation"])
    parts = [
        f"{labels[row.trial_id]}: {names[row.family]} {100 * row.mean_:.1f} on average of {row.seeds} seeds, "
        f"{100 * row.least:.1f} to {100 * row.most:.1f}, standard deviation {100 * row.deviation:.1f}, "
        f"where an interval over images reaches {100 * row.over_images:.1f} to either side"
        for row in first.rename(columns={"mean": "mean_"}).itertuples()
    ]
    return "; ".join(parts)
