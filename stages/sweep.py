"""``sweep``: answer every question under every trial, on Ray; an interrupted sweep continues where it stopped."""

from __future__ import annotations

import json
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nuwa.cost import LlmShape, cost_columns
from pipelines.axes import COLUMNS
from pipelines.data.datasets import choose_questions
from pipelines.features.identity import ModelIdentity
from pipelines.features.layouts import image_layouts
from pipelines.features.loading import Loading
from pipelines.files.atomic import atomic_path
from pipelines.files.lock import exclusive
from pipelines.settings import Settings, SweepSettings, asked
from pipelines.sweep.answers import SweepOutcome
from pipelines.sweep.askable import askable
from pipelines.sweep.engine import Engine, with_weights
from pipelines.sweep.finishing import Finished, LimitReached, finish
from pipelines.sweep.provenance import mixed, told
from pipelines.sweep.refill import table_facts
from pipelines.sweep.trials import Layouts, Trial, expand
from pipelines.tracking.revision import git_and_dvc_tags, source_tags
from pipelines.tracking.tracker import Tracker
from pipelines.workers import Fault
from stages.entry import (
    COLLECTING,
    EXAMPLES,
    KEPT,
    PREDICTIONS,
    QUARANTINE,
    SWEEP,
    TIMINGS,
    TRIALS,
    places,
    run_stage,
    shared_cache,
)


def sweep(settings: Settings) -> None:
    # DVC ignores Ctrl-C while a command runs and leaves it to the command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan, model = settings.sweep, settings.model
    loading = Loading.of(model, settings.cluster)
    questions = choose_questions(pd.read_parquet(EXAMPLES), plan.benchmarks, plan.images, plan.subset_seed).examples
    vlm = loading.here(model.path)
    questions, unasked = askable(vlm, questions, allowed=plan.quarantine == "allow")
    of_image = image_layouts(vlm, questions)
    layouts = Layouts.of(of_image.values(), vlm.dynamic)
    trials = expand(plan, layouts, vlm.layers, tell=print)
    trials = with_weights(trials, ModelIdentity.of(model.path, loading, vlm).fingerprint, model.path)

    with exclusive(shared_cache()):
        engine = Engine.start(settings, vlm, of_image, places(settings))
        facts = _facts(engine, trials, questions)
        tracking = settings.tracking
        with Tracker.open(tracking.resolved_uri, tracking.experiment, sweep_id=facts["sweep_id"]) as tracker:
            revision = git_and_dvc_tags(Path())
            tags = revision | source_tags(revision, "dvc repro") | facts["fingerprints"]
            tracker.parent(facts["name"], facts["counts"] | asked(settings.model, settings.sweep), tags)
            outcome, _ = engine.run(trials, questions, tracker.progress)
            try:
                finished = _finished(plan, trials, questions, outcome)
            except LimitReached:
                tracker.finish("KILLED")  # as asked for; it did not fail
                raise

        trials = finished.trials
        facts |= {"left_out": left_out} if (left_out := unasked | finished.left_out) else {}
        facts |= {"incomplete": finished.incomplete} if finished.incomplete else {}
        if finished.told:
            facts["missing"] = finished.told
            print(finished.told)
        targets = {"predictions": PREDICTIONS, "kept": KEPT, "timings": TIMINGS}
        origins = engine.collect(trials, questions, targets, COLLECTING, finished.left_out, outcome.stored)
        facts["provenance"] = told(origins.provenance)
        answered = engine.examples(questions, finished.left_out)
        facts["tables"] = table_facts(origins, engine.spec.context, answered, targets)
        if line := mixed(facts["provenance"]):
            print(line)

        shape, number = LlmShape.from_config(vlm.model.config), vlm.model.dtype.itemsize
        costs = partial(cost_columns, llm=shape, bytes_per_number=number)
        write_trials([trial.row(layouts, costs) for trial in trials], TRIALS)
        with atomic_path(SWEEP) as fresh:
            fresh.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


def _finished(plan: SweepSettings, trials: list[Trial], questions: pd.DataFrame, outcome: SweepOutcome) -> Finished:
    """What is compared; all that failed is listed in ``QUARANTINE``. Raises as :func:`finish` does."""
    rows: list[dict[str, Any]] = [
        {
            "trials": [trial.trial_id for trial in unit.trials],
            "examples": [example.example_id for example in unit.examples],
            "images": list(unit.images),
            "reason": failure.reason,
            "attempts": failure.attempts,
            "detail": failure.detail,
        }
        for unit, failure in outcome.failures.values()
        if failure.fault != Fault.LEFT
    ]

    QUARANTINE.unlink(missing_ok=True)
    if rows:
        with atomic_path(QUARANTINE) as path:
            path.write_text(json.dumps(rows, indent=1) + "\n")
    return finish(
        trials,
        questions,
        outcome,
        quarantine=plan.quarantine,
        finish_with=plan.finish_with,
        listed=str(QUARANTINE),
    )


def _facts(engine: Engine, trials: list[Trial], questions: pd.DataFrame) -> dict:
    """What identifies this sweep, and its size."""
    sweep_id, fingerprints = engine.identify(trials, questions)
    counts = {
        "trials": len(trials),
        "questions": len(questions),
        "images": int(questions["image"].nunique()),
        "benchmarks": ", ".join(sorted(set(questions["benchmark"]))),
    }
    name = f"sweep {sweep_id[:8]}: {counts['trials']} trials, {counts['questions']} questions"
    return {"sweep_id": sweep_id, "name": name, "counts": counts, "fingerprints": fingerprints}


def write_trials(trials: list[dict], target: Path) -> None:
    """The table of trials, from their rows."""
    rows = sorted(trials, key=lambda row: row["trial_id"])
    types = {name: column.dtype for name, column in COLUMNS.items() if column.dtype is not None}
    table = pa.Table.from_pandas(pd.DataFrame(rows).astype(types), preserve_index=False)
    with atomic_path(target) as fresh:
        pq.write_table(table, fresh)


if __name__ == "__main__":
    began = time.monotonic()
    run_stage(sweep)
    print(f"sweep finished in {time.monotonic() - began:.0f} s")
