"""``search``: race the sweep's trials on growing slices of its images, then search one method's hyper-parameters.

What it found is in git, for the report to show, and the stage is frozen; ``make search`` runs it again. Answers lie
where the sweep's do, so one finds the other's.
"""

from __future__ import annotations

import json
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nuwa import UNPRUNED
from pipelines.atomic import atomic_path
from pipelines.datasets import choose_questions
from pipelines.engine import Engine, check_weights
from pipelines.executor import start_ray
from pipelines.features import Loading
from pipelines.grid import Layouts, Trial, expand
from pipelines.lock import exclusive
from pipelines.plan import image_layouts
from pipelines.racing import check_slices, race, slices
from pipelines.search import Asking, race_grid, search_swarm
from pipelines.search_space import check_space, trial_at
from pipelines.settings import Settings
from pipelines.tracking import Tracker, git_and_dvc_tags
from stages.entry import CACHE, EXAMPLES, SEARCH, places, run_stage


def search(settings: Settings) -> None:
    # DVC ignores Ctrl-C while a command runs and leaves it to the command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan, wanted, model = settings.sweep, settings.search, settings.model
    prepared = pd.read_parquet(EXAMPLES)
    questions = choose_questions(prepared, plan.benchmarks, plan.images, plan.subset_seed).examples
    rungs = slices(questions, wanted.shares, wanted.seed)
    check_slices(rungs, wanted.shares)
    everything = choose_questions(prepared, plan.benchmarks, None, plan.subset_seed).examples
    unseen = everything[~everything["image"].isin(questions["image"])].reset_index(drop=True)
    vlm = Loading.of(model, settings.cluster).here(model.path)
    of_image = image_layouts(vlm, everything)
    layouts = Layouts.of((of_image[image] for image in sorted(set(questions["image"]))), vlm.dynamic)
    anywhere = Layouts.of(of_image.values(), vlm.dynamic)  # the best points are asked on all images
    trials = expand(plan, layouts, vlm.layers)
    if wanted.swarm is not None:
        check_space(wanted.swarm, plan.budget_unit, anywhere, vlm.layers)

    def make(point: dict[str, Any]) -> Trial:
        return trial_at(wanted.swarm, point, plan, layouts, vlm.layers)

    check_weights([*trials, *([make({})] if wanted.swarm is not None else [])], vlm)
    with ExitStack() as stack:
        stack.enter_context(exclusive(CACHE))
        if start_ray(settings.cluster):  # once, not at every rung
            import ray

            stack.callback(ray.shutdown)
        engine = Engine.start(settings, vlm, of_image, places(settings))
        asked = [wanted.model_dump(), settings.evaluate.model_dump()]
        search_id, fingerprints = engine.identify(trials, questions, *asked)
        tracker = Tracker.open(settings.tracking.resolved_uri, settings.tracking.experiment, sweep_id=search_id)
        stack.enter_context(tracker)
        name = f"search {search_id[:8]}: {len(trials)} trials, {len(questions)} questions"
        size = {"trials": len(trials), "questions": len(questions), "shares": wanted.shares}
        tracker.parent(name, size, git_and_dvc_tags(Path()) | fingerprints)
        asking = Asking(engine, tracker, CACHE)
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
