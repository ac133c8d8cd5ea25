"""Replay a finished sweep into MLflow: the Parquet files are the record, MLflow is a view that can be made again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nuwa.budget import budget_tokens
from pipelines.scores.seeds import sentence
from pipelines.scores.summary import headline_trials
from pipelines.settings import Settings, asked
from pipelines.sweep.provenance import came_from
from pipelines.tracking.revision import git_and_dvc_tags, source_tags, write_reproduction
from pipelines.tracking.runs import trial_runs
from pipelines.tracking.tracker import Tracker
from stages.entry import (
    COMPARISONS,
    GROUPS,
    HEADLINE,
    METRICS,
    PLOTS,
    REPORT,
    SCORES,
    SEEDS,
    SWEEP,
    TIMINGS,
    TRIALS,
    run_stage,
)

OF_ALL = ("images", "questions", "protocol")  # parameters of a sweep that its trials show too
SIDE_BY_SIDE = 8  # columns that fit a screen


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
        shared = facts["counts"] | asked(settings.model, settings.sweep)
        tracker.parent(facts["name"], shared, tags | source_tags(tags, "dvc repro"))
        tracker.dataset("examples", facts["fingerprints"]["data"][:32], facts["counts"]["questions"])
        groups = pd.read_parquet(GROUPS) if GROUPS.exists() else None
        of_all = {name: shared[name] for name in OF_ALL}
        spread = pd.read_parquet(SEEDS) if SEEDS.exists() else None
        runs = trial_runs(trials, scores, _seconds(trials), tags, groups=groups, asked=of_all, spread=spread)
        tracker.trials(runs)
        tracker.views(_compared(settings, trials, scores), partial(_note, facts, tags, _seeds(trials, spread)))

        for path, place in (
            (SCORES, None),
            (COMPARISONS, None),
            (GROUPS, None),
            (SEEDS, None),
            (METRICS, None),
            (HEADLINE, None),
            (PLOTS, "plots"),
            (REPORT, "report"),
        ):
            if path.exists() and (with_report or path != REPORT):
                tracker.artifacts(path, place)
        with tempfile.TemporaryDirectory() as folder:
            write_reproduction(Path(), Path(folder))
            tracker.artifacts(Path(folder), "reproduce")


def _compared(settings: Settings, trials: pd.DataFrame, scores: pd.DataFrame) -> list[str]:
    """The trials that MLflow shows side by side."""
    tokens, unit = int(trials["image_tokens"].iloc[0]), settings.sweep.budget_unit
    budget = budget_tokens(settings.report.headline_budget, unit, tokens)
    return headline_trials(trials, scores, budget, SIDE_BY_SIDE)


def _seeds(trials: pd.DataFrame, spread: pd.DataFrame | None) -> str:
    """What seeds change, in words; nothing where none was varied."""
    labels = trials.set_index("trial_id")["label"].to_dict()
    return "" if spread is None else sentence(spread, labels, {"grounding": "grounding", "vqa": "VQA"})


def _note(facts: Mapping[str, Any], tags: Mapping[str, str], seeds: str, pages: Mapping[str, str]) -> str:
    """Markdown for the parent's page: what came out, where to look, how to run it again. ``seeds``: see :func:`_seeds`.

    ``pages``: what else MLflow shows of the sweep → its address on the same server.
    """
    lines = [f"**{facts['name']}**", "", " · ".join(f"[{name}]({address})" for name, address in pages.items()), ""]
    if METRICS.exists():
        lines += _verdict(json.loads(METRICS.read_text()))

    known = f" Known is, in points of mean retention: {seeds}." if seeds else ""
    lines += [
        f"Intervals and verdicts are over images, of one seed; what another seed changes is not in them.{known}",
        "",
    ]
    dirty = tags.get("git_dirty") == "true"
    lines += [
        "* The page: artifact `report/index.html`; all scores: `scores.parquet`; pairs: `comparisons.parquet`;"
        " by what was asked: `groups.parquet`; over seeds: `seeds.parquet`.",
        "",
        "Again, from the artifacts under `reproduce`:",
        "",
        "```console",
        f"$ git checkout {tags['git_commit']}",
        *(["$ git apply uncommitted.patch"] if dirty else []),
        "$ make repro",
        "```",
    ]
    return "\n".join(lines)


def _verdict(metrics: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """A table of mean retention at the headline budget."""
    families = {"vg": "grounding", "vqa": "VQA"}
    rows = {"nuwa": "Nüwa’s best trial", "rival": "the best other", "lead": "difference"}
    cells = {key: [metrics[key].get(short) for short in families] for key in rows}
    return [
        f"| mean retention at the headline budget, % | {' | '.join(families.values())} |",
        "|---|--:|--:|",
        *(
            f"| {name} | {' | '.join('–' if value is None else f'{100 * value:.1f}' for value in cells[key])} |"
            for key, name in rows.items()
        ),
        "",
    ]


def _seconds(trials: pd.DataFrame) -> pd.DataFrame | None:
    """Wall seconds a trial, where this machine ran it."""
    if not TIMINGS.exists():
        return None
    timings = pd.read_parquet(TIMINGS)
    timings = timings[timings["trial_id"].isin(trials["trial_id"])].dropna()  # those of pulled tables are not known
    return timings.drop(columns="unit").groupby("trial_id", as_index=False).sum()


def _origins(facts: Mapping[str, Any]) -> dict[str, str]:
    """Where the answers of a sweep came from, as a tag."""
    origin = came_from(facts.get("provenance", []))
    return {"answers": origin} if origin else {}


if __name__ == "__main__":
    run_stage(track)
