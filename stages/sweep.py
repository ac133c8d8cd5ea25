"""``sweep``: answer every question under every trial, on Ray; an interrupted sweep continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nuwa import UNPRUNED
from nuwa.cost import LlmShape, cost_columns
from nuwa.source import code_fingerprint
from nuwa.stage1 import get_method
from pipelines.atomic import atomic_path
from pipelines.collection import collect
from pipelines.datasets import choose_questions
from pipelines.executor import UnitsFailed
from pipelines.features import Loading, encode_missing
from pipelines.grid import Layouts, Trial, expand
from pipelines.identity import ModelIdentity, folder_stamp, remember
from pipelines.lock import exclusive
from pipelines.plan import image_layouts, read_examples, sweep_costs
from pipelines.progress import SweepProgress, worker_speed
from pipelines.results import ResultStore
from pipelines.settings import Settings
from pipelines.storage import everywhere
from pipelines.sweep import SweepOutcome, SweepSpec, answer_context, run_sweep
from pipelines.tracking import Tracker, git_and_dvc_tags
from stages.entry import (
    CACHE,
    COLLECTING,
    EXAMPLES,
    FEATURE_STORE,
    IMAGES,
    KEPT,
    MODEL,
    PREDICTIONS,
    PROGRESS,
    QUARANTINE,
    RESULT_STORE,
    SWEEP,
    TIMINGS,
    TRIALS,
    UNITS_LOG,
    run_stage,
)


def sweep(settings: Settings) -> None:
    # DVC ignores Ctrl-C while a command runs and leaves it to the command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan, cluster = settings.sweep, settings.cluster
    loading = Loading.of(settings.model, cluster)
    place, results = settings.features.store or FEATURE_STORE, plan.store or RESULT_STORE
    questions = choose_questions(pd.read_parquet(EXAMPLES), plan.benchmarks, plan.images, plan.subset_seed)
    stamp, vlm = folder_stamp(Path(settings.model.path), loading.dtype), loading.here(settings.model.path)
    of_image = image_layouts(vlm, questions.examples)
    layouts = Layouts.of(of_image.values(), vlm.dynamic)
    trials = expand(plan, layouts, vlm.layers)
    for trial in trials:
        if (check := get_method(trial.spec.stage1).check) is not None:
            check(trial.spec.config, vlm.encoder_identity)
    with exclusive(CACHE):
        # Normally finds everything; after the cache was thrown away it encodes again instead of failing.
        store, _ = encode_missing(settings.model.path, IMAGES, place, settings.features, cluster, loading=loading)
        model = ModelIdentity(vlm.fingerprint(), vlm.encoder_identity)
        remember(MODEL, stamp, model)
        context = answer_context(model.model, store.identity, settings.model.attention)
        examples = read_examples(questions.examples, context, of_image)
        facts = _facts(model.model, trials, questions.examples, store.identity, context)
        spec = SweepSpec(
            settings.model.path,
            everywhere(place),
            store.identity,
            everywhere(results),
            str(IMAGES.resolve()),
            cluster.cpus,
            cluster.device,
            loading,
        )
        tracking = settings.tracking
        with Tracker.open(tracking.resolved_uri, tracking.experiment, sweep_id=facts["sweep_id"]) as tracker:
            tracker.parent(facts["name"], facts["counts"], git_and_dvc_tags(Path()) | facts["fingerprints"])
            with SweepProgress(PROGRESS, UNITS_LOG, tracker.progress) as progress:
                outcome = run_sweep(
                    spec,
                    trials,
                    examples,
                    sweep_costs(vlm, questions.examples),
                    worker_speed(UNITS_LOG, cluster),
                    plan.unit_images,
                    cluster,
                    progress.start,
                    progress.done,
                )
        trials = _without_incomplete(trials, outcome, facts, allowed=plan.quarantine == "allow")
        targets = {"predictions": PREDICTIONS, "kept": KEPT, "timings": TIMINGS}
        collect(ResultStore(results), [trial.trial_id for trial in trials], examples, targets, COLLECTING)
        shape, number = LlmShape.from_config(vlm.model.config), vlm.model.dtype.itemsize
        costs = partial(cost_columns, llm=shape, bytes_per_number=number)
        _write_trials([trial.row(layouts, costs) for trial in trials])
        with atomic_path(SWEEP) as fresh:
            fresh.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


def _without_incomplete(trials: list[Trial], outcome: SweepOutcome, facts: dict, *, allowed: bool) -> list[Trial]:
    """The trials that have all their answers; the others are listed in ``QUARANTINE``, and in ``facts``.

    Raises :class:`UnitsFailed` where leaving trials out is not allowed, or the unpruned one would be.
    """
    QUARANTINE.unlink(missing_ok=True)
    incomplete = outcome.incomplete
    if not incomplete:
        return trials
    rows = [
        {
            "trials": [trial.trial_id for trial in unit.trials],
            "examples": [example.example_id for example in unit.examples],
            "images": list(unit.images),
            "reason": failure.reason,
            "attempts": failure.attempts,
            "detail": failure.detail,
        }
        for unit, failure in outcome.failures.values()
    ]
    with atomic_path(QUARANTINE) as path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    reference = next(trial for trial in trials if trial.spec.method == UNPRUNED)
    if not allowed or reference.trial_id in incomplete:
        first = rows[0]
        raise UnitsFailed(
            f"{len(incomplete)} of {len(trials)} trials lack answers, all others are kept; first {first['examples'][0]} "
            f"under {first['trials'][0]}: {first['reason']}; {QUARANTINE} lists all. Run the same command again to try "
            "just these, or set sweep.quarantine: allow to go on without these trials"
        )
    facts["incomplete"] = {trial_id: failure.reason for trial_id, failure in sorted(incomplete.items())}
    return [trial for trial in trials if trial.trial_id not in incomplete]


def _facts(model: str, trials: list[Trial], examples: pd.DataFrame, features: str, context: str) -> dict:
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
    fingerprints = {"model": model, "features": features, "data": data, "code": code_fingerprint()}
    name = f"sweep {sweep_id[:8]}: {counts['trials']} trials, {counts['questions']} questions"
    return {"sweep_id": sweep_id, "name": name, "counts": counts, "fingerprints": fingerprints}


def _write_trials(trials: list[dict]) -> None:
    rows = sorted(trials, key=lambda row: row["trial_id"])
    types = {
        "stage1_keep": "int32",
        "seed": "int32",
        "image_tokens": "int32",
        "stage2_layer": "Int32",
        "stage2_keep": "Int32",
    }
    table = pa.Table.from_pandas(pd.DataFrame(rows).astype(types), preserve_index=False)
    with atomic_path(TRIALS) as fresh:
        pq.write_table(table, fresh)


if __name__ == "__main__":
    began = time.monotonic()
    run_stage(sweep)
    print(f"sweep finished in {time.monotonic() - began:.0f} s")
