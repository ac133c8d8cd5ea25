"""``sweep``: answer every question under every trial, on Ray; an interrupted sweep continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nuwa.cost import LlmShape, cost_columns
from nuwa.source import code_fingerprint
from nuwa.stage1 import get_method
from nuwa.vlm import LlavaAdapter
from pipelines.atomic import atomic_path
from pipelines.datasets import choose_questions
from pipelines.executor import UnitsFailed
from pipelines.features import encode_missing, load_fixed_grid
from pipelines.grid import Trial, expand
from pipelines.lock import exclusive
from pipelines.progress import SweepProgress
from pipelines.settings import Settings
from pipelines.sweep import SweepOutcome, SweepSpec, answer_context, run_sweep
from pipelines.tracking import Tracker, git_and_dvc_tags
from stages.entry import (
    CACHE,
    EXAMPLES,
    FEATURE_STORE,
    IMAGES,
    KEPT,
    PREDICTIONS,
    PROGRESS,
    RESULT_STORE,
    SWEEP,
    TIMINGS,
    TRIALS,
    run_stage,
)


def sweep(settings: Settings) -> None:
    # DVC ignores Ctrl-C while a command runs and leaves it to the command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan = settings.sweep
    questions = choose_questions(pd.read_parquet(EXAMPLES), plan.benchmarks, plan.images, plan.subset_seed)
    vlm = load_fixed_grid(settings.model.path)
    trials = expand(plan, vlm.grid, vlm.layers)
    for trial in trials:
        if (check := get_method(trial.spec.stage1).check) is not None:
            check(trial.spec.config, vlm.encoder_identity)
    with ExitStack() as stack:
        stack.enter_context(exclusive(CACHE))
        # Normally finds everything; after the cache was thrown away it encodes again instead of failing.
        store, _ = encode_missing(settings.model.path, IMAGES, FEATURE_STORE, settings.features, settings.cluster)
        context = answer_context(vlm, store.identity)
        facts = _facts(vlm, trials, questions.examples, store.identity, context)
        tracking = settings.tracking
        tracker = Tracker.open(tracking.resolved_uri, tracking.experiment, sweep_id=facts["sweep_id"])
        stack.enter_context(tracker)
        tracker.parent(facts["name"], facts["counts"], git_and_dvc_tags(Path()) | facts["fingerprints"])
        progress = stack.enter_context(SweepProgress(PROGRESS, tracker.progress))
        spec = SweepSpec(
            settings.model.path,
            str(FEATURE_STORE.resolve()),
            store.identity,
            str(RESULT_STORE.resolve()),
            settings.cluster.cpus,
            settings.cluster.device,
        )
        outcome = run_sweep(
            spec, trials, questions, plan.unit_images, context, settings.cluster, progress.start, progress.done
        )
        if outcome.failures:
            raise UnitsFailed(_failure_text(outcome))
    costs = partial(cost_columns, llm=LlmShape.from_config(vlm.model.config), bytes_per_number=vlm.model.dtype.itemsize)
    _write([trial.row() | costs(trial.schedule) for trial in trials], outcome, facts)


def _facts(vlm: LlavaAdapter, trials: list[Trial], examples: pd.DataFrame, features: str, context: str) -> dict:
    """What identifies this sweep, and its size."""
    data = hashlib.sha256("".join(examples["example_id"] + examples["image"]).encode()).hexdigest()
    ids = sorted(trial.trial_id for trial in trials)
    sweep_id = hashlib.sha256(json.dumps([context, data, ids]).encode()).hexdigest()[:16]
    counts = {
        "trials": len(trials),
        "questions": len(examples),
        "images": int(examples["image"].nunique()),
        "benchmarks": ", ".join(sorted(set(examples["benchmark"]))),
    }
    fingerprints = {"model": vlm.fingerprint(), "features": features, "data": data, "code": code_fingerprint()}
    name = f"sweep {sweep_id[:8]}: {counts['trials']} trials, {counts['questions']} questions"
    return {"sweep_id": sweep_id, "name": name, "counts": counts, "fingerprints": fingerprints}


def _failure_text(outcome: SweepOutcome) -> str:
    unit, worst = next(iter(outcome.failures.items()))
    return (
        f"{len(outcome.failures)} work units failed, all others are kept; first {unit} after {worst.attempts} attempts: "
        f"{worst.reason}\n{worst.detail}\nrun the same command again to do just what is missing"
    )


def _write(trials: list[dict], outcome: SweepOutcome, facts: dict) -> None:
    rows = sorted(trials, key=lambda row: row["trial_id"])
    types = {
        "stage1_keep": "int32",
        "seed": "int32",
        "image_tokens": "int32",
        "stage2_layer": "Int32",
        "stage2_keep": "Int32",
    }
    table = pa.Table.from_pandas(pd.DataFrame(rows).astype(types), preserve_index=False)
    for path, content in (
        (TRIALS, table),
        (PREDICTIONS, outcome.predictions),
        (KEPT, outcome.kept),
        (TIMINGS, outcome.timings),
    ):
        with atomic_path(path) as fresh:
            pq.write_table(content, fresh)
    with atomic_path(SWEEP) as fresh:
        fresh.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    began = time.monotonic()
    run_stage(sweep)
    print(f"sweep finished in {time.monotonic() - began:.0f} s")
