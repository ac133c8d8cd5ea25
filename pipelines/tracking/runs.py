"""Tables of a sweep → what MLflow shows of every trial."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipelines.axes import columns_of


@dataclass(frozen=True)
class TrialRun:
    """What MLflow shows of one trial.

    Name, `params` and `metrics` are the content: when they change, the child run is replaced. `tags` say where the run
    came from (a DVC revision, say) and do not count: a child keeps the tags it was written with. `steps` are metrics
    at steps 1, 2, and so on: a curve.
    """

    trial_id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    steps: tuple[Mapping[str, float], ...] = ()

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal characters over name, params, metrics and steps; independent of the order of keys."""
        content = [self.name, dict(self.params), mlflow_metrics(self.metrics), *map(mlflow_metrics, self.steps)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def trial_runs(
    trials: pd.DataFrame,
    scores: pd.DataFrame,
    timings: pd.DataFrame | None,
    tags: Mapping[str, str],
    *,
    groups: pd.DataFrame | None = None,
    asked: Mapping[str, object] | None = None,
    spread: pd.DataFrame | None = None,
) -> list[TrialRun]:
    """Turn the tables of a sweep into runs, in the order of `trials`.

    Args:
        trials: one row a trial (`trials.parquet`).
        scores: tidy scores (`scores.parquet`). Headline rows become `<benchmark>/<metric>` and
            `<benchmark>/retention`, aggregate rows (benchmark `mean`) `<family>_retention` with `_low` and `_high`
            (95 % interval). Other rows are detail, for the Parquet file on the parent.
        timings: one row a trial, `trial_id` and numeric columns; each becomes `timing/<column>`. None without timings.
        tags: provenance written on every child.
        groups: shares of right answers by what was asked (`groups.parquet`), which become
            `<family or benchmark>/<kind>/<group>`; those by whether an answer ran into its limit are left out.
        spread: of trials that differ in their seed alone (`seeds.parquet`): `<family>_retention_over_seeds`, the standard
            deviation, and `seeds`, how many.
        asked: params that all trials share: how many images and questions, by which protocol.

    Returns:
        Runs with MLflow's characters in their metric keys and without NaN or infinite values.
    """
    metrics: dict[str, dict[str, float]] = {trial_id: {} for trial_id in trials["trial_id"]}
    for row in scores[scores["trial_id"].isin(metrics)].to_dict("records"):
        metrics[row["trial_id"]] |= _score_metrics(row)

    for row in [] if groups is None else groups[groups["kind"] != "limit"].to_dict("records"):
        if row["trial_id"] in metrics:
            metrics[row["trial_id"]][_group_key(row)] = row["score"]
    for row in [] if spread is None else spread[spread["benchmark"] == "mean"].to_dict("records"):
        if row["trial_id"] in metrics:
            over = {f"{row['family']}_retention_over_seeds": row["deviation"], "seeds": row["seeds"]}
            metrics[row["trial_id"]] |= over
    if timings is not None:
        for trial_id, row in timings.set_index("trial_id").select_dtypes("number").to_dict("index").items():
            if trial_id in metrics:
                metrics[trial_id] |= {f"timing/{column}": value for column, value in row.items()}
    return [
        TrialRun(
            trial_id=row["trial_id"],
            name=row["label"],
            params=_trial_params(row) | {name: param_text(value) for name, value in (asked or {}).items()},
            metrics=mlflow_metrics({name: row[name] for name in columns_of("metric")} | metrics[row["trial_id"]]),
            tags=dict(tags),
        )
        for row in trials.to_dict("records")
    ]


def _score_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    if row["benchmark"] == "mean":
        key = f"{row['family']}_retention"
        return {key: row["score"], f"{key}_low": row["low"], f"{key}_high": row["high"]}
    if row["headline"]:
        key = f"{row['benchmark']}/{row['metric']}"
        return {key: row["score"], f"{row['benchmark']}/retention": row["retention"]}
    return {}


def _group_key(row: Mapping[str, Any]) -> str:
    """`smallest third, up to 5.7 %` → `grounding/size/smallest_third`: what follows a comma differs from data to data."""
    name = str(row["group"]).partition(",")[0].replace(" ", "_")
    return f"{row['benchmark'] or row['family']}/{row['kind']}/{name}"


def _trial_params(row: Mapping[str, Any]) -> dict[str, str]:
    """Columns as params, then `method.<name>` for each hyper-parameter off the preset; absent values are left out."""
    columns = {name: row[name] for name in columns_of("parameter")} | {"grids": ",".join(row["grids"])}
    columns |= {f"method.{name}": value for name, value in json.loads(row["params"]).items()}
    return {name: param_text(value) for name, value in columns.items() if not _is_missing(value)}


def _is_missing(value: object) -> bool:
    return pd.api.types.is_scalar(value) and bool(pd.isna(value))


def param_text(value: object) -> str:
    """Lists and mappings as JSON. `8.0` reads `8`, because pandas holds an integer column with nulls as floats."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool | list | tuple | Mapping):
        return json.dumps(value, sort_keys=True, default=str)
    return str(value)


def metric_key(name: str) -> str:
    """Spell a metric's name with the characters MLflow allows: `acc@0.5` → `acc_at_0.5`, others → `_`."""
    return re.sub(r"[^/\w.\- ]", "_", name.replace("@", "_at_"))


def mlflow_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as MLflow can hold them: allowed keys, Python floats, finite (it would store infinity as 1.8e308)."""
    values = {metric_key(name): float(value) for name, value in metrics.items() if value is not None}
    return {key: value for key, value in values.items() if math.isfinite(value)}
