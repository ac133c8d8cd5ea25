"""Replay a finished sweep into MLflow: the Parquet files are the record, MLflow is a view that can be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.settings import Settings
from pipelines.tracking.revision import git_and_dvc_tags
from pipelines.tracking.runs import trial_runs
from pipelines.tracking.tracker import Tracker
from stages.entry import COMPARISONS, HEADLINE, METRICS, PLOTS, REPORT, SCORES, SWEEP, TIMINGS, TRIALS, run_stage


def track(settings: Settings, *, with_report: bool = True) -> None:
    """One child run a trial; scores, plots and, where it is of this sweep, the report as artifacts of the parent."""
    if not SWEEP.exists() or not SCORES.exists():
        raise FileNotFoundError(f"{SWEEP} or {SCORES} is missing; `dvc repro evaluate` makes them")
    facts = json.loads(SWEEP.read_text())
    trials, scores = pd.read_parquet(TRIALS), pd.read_parquet(SCORES)
    tags = git_and_dvc_tags(Path()) | facts["fingerprints"] | _origins(facts)
    with Tracker.open(
        settings.tracking.resolved_uri, settings.tracking.experiment, sweep_id=facts["sweep_id"]
    ) as tracker:
        tracker.parent(facts["name"], facts["counts"], tags)
        tracker.dataset("examples", facts["fingerprints"]["data"][:32], facts["counts"]["questions"])
        tracker.trials(trial_runs(trials, scores, _seconds(trials), tags))
        for path, place in (
            (SCORES, None),
            (COMPARISONS, None),
            (METRICS, None),
            (HEADLINE, None),
            (PLOTS, "plots"),
            (REPORT, "report"),
        ):
            if path.exists() and (with_report or path != REPORT):
                tracker.artifacts(path, place)


def _seconds(trials: pd.DataFrame) -> pd.DataFrame | None:
    """Wall seconds a trial, where this machine ran it."""
    if not TIMINGS.exists():
        return None
    timings = pd.read_parquet(TIMINGS)
    timings = timings[timings["trial_id"].isin(trials["trial_id"])].dropna()  # those of pulled tables are not known
    return timings.drop(columns="unit").groupby("trial_id", as_index=False).sum()


def _origins(facts: Mapping[str, Any]) -> dict[str, str]:
    """Where the answers of a sweep came from, as a tag."""
    words = facts.get("provenance", [])
    return {"answers": f"{'of mixed provenance: ' if len(words) > 1 else ''}{'; '.join(words)}"} if words else {}


if __name__ == "__main__":
    run_stage(track)
