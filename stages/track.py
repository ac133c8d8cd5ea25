"""Replay a finished sweep into MLflow: the Parquet files are the record, MLflow is a view that can be made again."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from pipelines.settings import Settings
from pipelines.tracking import Tracker, git_and_dvc_tags, trial_runs
from stages.entry import METRICS, PLOTS, REPORT, SCORES, SWEEP, TIMINGS, TRIALS, run_stage


def track(settings: Settings, *, with_report: bool = True) -> None:
    """One child run a trial; scores, plots and, where it is of this sweep, the report as artifacts of the parent."""
    if not SWEEP.exists() or not SCORES.exists():
        raise FileNotFoundError(f"{SWEEP} or {SCORES} is missing; `dvc repro evaluate` makes them")
    facts = json.loads(SWEEP.read_text())
    trials, scores = pd.read_parquet(TRIALS), pd.read_parquet(SCORES)
    tags = git_and_dvc_tags(Path()) | facts["fingerprints"]
    with Tracker.open(
        settings.tracking.resolved_uri, settings.tracking.experiment, sweep_id=facts["sweep_id"]
    ) as tracker:
        tracker.parent(facts["name"], facts["counts"], tags)
        tracker.dataset("examples", facts["fingerprints"]["data"][:32], facts["counts"]["questions"])
        tracker.trials(trial_runs(trials, scores, _seconds(trials), tags))
        for path, place in ((SCORES, None), (METRICS, None), (PLOTS, "plots"), (REPORT, "report")):
            if path.exists() and (with_report or path != REPORT):
                tracker.artifacts(path, place)


def _seconds(trials: pd.DataFrame) -> pd.DataFrame | None:
    """Wall seconds a trial, where this machine ran it."""
    if not TIMINGS.exists():
        return None
    timings = pd.read_parquet(TIMINGS)
    mine = timings[timings["trial_id"].isin(trials["trial_id"])]
    return mine.drop(columns="unit").groupby("trial_id", as_index=False).sum()


if __name__ == "__main__":
    run_stage(track)
