"""``search``: race the sweep's trials on growing slices of its images, then search one method's hyper-parameters.

What it found is in git, for the report to show, and the stage is frozen; ``make search`` runs it again. Answers lie
where the sweep's do, so one finds the other's.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nuwa import UNPRUNED
from nuwa.source import code_fingerprint
from nuwa.stage1 import get_method
from pipelines.atomic import atomic_path
from pipelines.datasets import choose_questions
from pipelines.executor import start_ray
from pipelines.features import Loading, encode_missing
from pipelines.grid import Layouts, Trial, expand
from pipelines.lock import exclusive
from pipelines.plan import image_layouts
from pipelines.racing import check_slices, race, slices
from pipelines.search import Asking, race_grid, search_swarm
from pipelines.search_space import check_space, trial_at
from pipelines.settings import Settings
from pipelines.storage import everywhere
from pipelines.sweep import SweepSpec, answer_context
from pipelines.tracking import Tracker, git_and_dvc_tags
from stages.entry import (
    CACHE,
    EXAMPLES,
    FEATURE_STORE,
    IMAGES,
    PROGRESS,
    RESULT_STORE,
    SEARCH,
    UNITS_LOG,
    run_stage,
)


def search(settings: Settings) -> None:
    # DVC ignores Ctrl-C while a command runs and leaves it to the command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan, wanted, cluster = settings.sweep, settings.search, settings.cluster
    loading = Loading.of(settings.model, cluster)
    place, results = settings.features.store or FEATURE_STORE, plan.store or RESULT_STORE
    prepared = pd.read_parquet(EXAMPLES)
    questions = choose_questions(prepared, plan.benchmarks, plan.images, plan.subset_seed).examples
    rungs = slices(questions, wanted.shares, wanted.seed)
    check_slices(rungs, wanted.shares)
    everything = choose_questions(prepared, plan.benchmarks, None, plan.subset_seed).examples
    unseen = everything[~everything["image"].isin(questions["image"])].reset_index(drop=True)
    vlm = loading.here(settings.model.path)
    of_image = image_layouts(vlm, everything)
    layouts = Layouts.of((of_image[image] for image in sorted(set(questions["image"]))), vlm.dynamic)
    anywhere = Layouts.of(of_image.values(), vlm.dynamic)  # the best points are asked on all images
    trials = expand(plan, layouts, vlm.layers)
    if wanted.swarm is not None:
        check_space(wanted.swarm, plan.budget_unit, anywhere, vlm.layers)

    def make(point: dict[str, Any]) -> Trial:
        return trial_at(wanted.swarm, point, plan, layouts, vlm.layers)

    for trial in (*trials, *([make({})] if wanted.swarm is not None else [])):
        if (check := get_method(trial.spec.stage1).check) is not None:
            check(trial.spec.config, vlm.encoder_identity)
    with ExitStack() as stack:
        stack.enter_context(exclusive(CACHE))
        if start_ray(cluster):  # once, not at every rung
            import ray

            stack.callback(ray.shutdown)
        store, _ = encode_missing(settings.model.path, IMAGES, place, settings.features, cluster, loading=loading)
        context = answer_context(vlm.fingerprint(), store.identity, settings.model.attention)
        data = hashlib.sha256("".join(questions["example_id"] + questions["image"]).encode()).hexdigest()
        asked = [wanted.model_dump(), settings.evaluate.model_dump()]
        content = [context, data, sorted(trial.trial_id for trial in trials), *asked]
        search_id = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        fingerprints = {
            "model": vlm.fingerprint(),
            "features": store.identity,
            "data": data,
            "code": code_fingerprint(),
        }
        tracker = Tracker.open(settings.tracking.resolved_uri, settings.tracking.experiment, sweep_id=search_id)
        stack.enter_context(tracker)
        name = f"search {search_id[:8]}: {len(trials)} trials, {len(questions)} questions"
        size = {"trials": len(trials), "questions": len(questions), "shares": wanted.shares}
        tracker.parent(name, size, git_and_dvc_tags(Path()) | fingerprints)
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
        asking = Asking(settings, vlm, spec, context, of_image, PROGRESS, UNITS_LOG, tracker, CACHE)
        contest = partial(
            race,
            reference=next(trial for trial in trials if trial.spec.method == UNPRUNED),
            ask=asking,
            confidence=wanted.confidence,
            resamples=settings.evaluate.resamples,
            seed=settings.evaluate.seed,
        )
        table, summary = race_grid(wanted, vlm, trials, layouts, rungs, contest, tracker)
        tables = {"trials.csv": table}
        if wanted.swarm is not None:
            found = search_swarm(wanted.swarm, wanted.seed, make, rungs, unseen, contest, tracker, fingerprints)
            tables["swarm.csv"], summary["swarm"] = found
        _write(tables, summary | {"fingerprints": fingerprints})
        tracker.artifacts(SEARCH, "search")
    print(f"{asking.answered} answers were new; the race asked {summary['answers']} of {summary['full_answers']}")


def _write(tables: dict[str, pd.DataFrame], summary: dict) -> None:
    (SEARCH / "swarm.csv").unlink(missing_ok=True)  # of an earlier search
    for name, table in tables.items():
        with atomic_path(SEARCH / name) as fresh:
            table.to_csv(fresh, index=False)
    with atomic_path(SEARCH / "search.json") as fresh:
        fresh.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    began = time.monotonic()
    run_stage(search)
    print(f"search finished in {time.monotonic() - began:.0f} s")
