"""What a search found, as the tables that are kept and as runs for MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pipelines.search.racing import Race, Standing
from pipelines.search.swarm import Tried
from pipelines.sweep.trials import Trial
from pipelines.tracking.runs import TrialRun

TRIAL_COLUMNS = ("trial_id", "label", "method", "preset", "position", "budget", "average_tokens", "flops")
SPANS = ("", "_low", "_high")


def race_table(race: Race, rows: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a trial: how far it got, and per family its mean retention there, its interval, whether it is on the
    final front and who stopped it. ``rows``: of ``trials.parquet``, by trial id."""
    families = next(iter(race.standings.values())).estimates
    return pd.DataFrame(
        {
            **{name: rows[trial_id][name] for name in TRIAL_COLUMNS},
            "cost": standing.cost,
            **_progress(standing),
            **_estimates(standing, ""),
            **{f"{family}_front": family in standing.front for family in families},
            **{f"{family}_beaten_by": standing.beaten_by.get(family) for family in families},
        }
        for trial_id, standing in race.standings.items()
    )


def study_table(
    tried: Sequence[Tried],
    preset: Standing,
    point: Mapping[str, Any],
    confirmed: Mapping[str, Standing],
    objective: str,
) -> pd.DataFrame:
    """The preset, which lies at ``point`` (without a number), then every point in the order it was asked.

    A point is JSON. Columns ``unseen_*`` are on images the search has not seen, for the trials in ``confirmed``.
    """
    first = {
        "number": None,
        "state": "preset",
        "point": json.dumps(point, sort_keys=True),
        **_study_row(preset.trial, preset, confirmed, objective),
    }

    rows = [
        {
            "number": one.number,
            "state": "failed" if one.standing is None else "finished" if one.finished else "stopped",
            "point": json.dumps(one.point, sort_keys=True),
            **_study_row(one.trial, one.standing, confirmed if one.finished else {}, objective),
        }
        for one in tried
    ]
    return pd.DataFrame([first, *rows]).astype(
        {"number": "Int32", "rung": "Int32", "images": "Int32", "answers": "Int32"}
    )


def _study_row(trial: Trial, standing: Standing | None, confirmed: Mapping[str, Standing], objective: str) -> dict:
    row = {"trial_id": trial.trial_id, "label": trial.label, "average_tokens": trial.schedule.average_tokens}
    if standing is None:
        return row
    row |= _progress(standing) | _estimates(standing, "")
    row["objective"] = standing.estimates[objective][0]
    again = confirmed.get(trial.trial_id)
    return row | (_estimates(again, "unseen_") if again else {})


def _progress(standing: Standing) -> dict[str, Any]:
    return {"rung": standing.rung, "images": standing.images, "answers": standing.answers}


def _estimates(standing: Standing, prefix: str) -> dict[str, float]:
    return {
        f"{prefix}{name}{end}": value
        for name, values in standing.estimates.items()
        for end, value in zip(SPANS, values, strict=True)
    }


def study_runs(batch: Sequence[Tried], objective: str, tags: Mapping[str, str]) -> list[TrialRun]:
    """One run a point: its place in the space, its last estimates, and its values rung by rung as steps."""
    return [
        TrialRun(
            trial_id=f"point {one.number}",
            name=f"{one.number} · {one.trial.label}",
            params={
                "trial_id": one.trial.trial_id,
                "state": "failed" if one.standing is None else "finished" if one.finished else "stopped",
                **{name: json.dumps(value) for name, value in one.point.items()},
            },
            metrics={} if one.standing is None else _metrics(one.standing, objective),
            tags=dict(tags),
            steps=() if one.standing is None else tuple(_by_rung(one.standing)),
        )
        for one in batch
    ]


def _metrics(standing: Standing, objective: str) -> dict[str, float]:
    retentions = {
        f"{name}_retention{end}": value
        for name, values in standing.estimates.items()
        for end, value in zip(SPANS, values, strict=True)
    }
    return retentions | {
        "objective": standing.estimates[objective][0],
        "rung": standing.rung,
        "answers": standing.answers,
    }


def _by_rung(standing: Standing) -> list[dict[str, float]]:
    return [{f"rung/{name}_retention": value for name, value in values.items()} for values in standing.history]
