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
from nuwa.vlm import Adapter
from pipelines.data.datasets import choose_questions
from pipelines.features.identity import ModelIdentity
from pipelines.features.layouts import image_layouts
from pipelines.features.loading import Loading
from pipelines.files.atomic import atomic_path
from pipelines.files.lock import exclusive
from pipelines.scores.submissions import check_scored
from pipelines.search.racing import check_slices, race, slices
from pipelines.search.run import Asking, race_grid, search_swarm
from pipelines.search.space import check_space, trial_at
from pipelines.settings import Settings, SwarmSettings, SweepSettings
from pipelines.sweep.askable import askable
from pipelines.sweep.engine import Engine, with_weights
from pipelines.sweep.trials import Layouts, Trial, expand
from pipelines.tracking.revision import git_and_dvc_tags
from pipelines.tracking.tracker import Tracker
from pipelines.workers import start_ray
from stages.entry import CACHE, EXAMPLES, SEARCH, places, run_stage, shared_cache


def search(settings: Settings) -> None:
    # DVC ignores Ctrl-C while a command runs and leaves it to the command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan, wanted, model = settings.sweep, settings.search, settings.model
    check_scored(plan.benchmarks)
    loading = Loading.of(model, settings.cluster)
    vlm = loading.here(model.path)
    questions, everything = _questions(plan, vlm)
    rungs = slices(questions, wanted.shares, wanted.seed)
    check_slices(rungs, wanted.shares)

    unseen = everything[~everything["image"].isin(questions["image"])].reset_index(drop=True)
    of_image = image_layouts(vlm, everything)
    layouts = Layouts.of((of_image[image] for image in sorted(set(questions["image"]))), vlm.dynamic)
    anywhere = Layouts.of(of_image.values(), vlm.dynamic)  # the best points are asked on all images

    def make(swarm: SwarmSettings, point: dict[str, Any]) -> Trial:
        return with_weights([trial_at(swarm, point, plan, layouts, vlm.layers)], encoder, model.path)[0]

    encoder = ModelIdentity.of(model.path, loading, vlm).fingerprint
    trials = with_weights(expand(plan, layouts, vlm.layers), encoder, model.path)
    if wanted.swarm is not None:
        check_space(wanted.swarm, plan.budget_unit, anywhere, vlm.layers)
        make(wanted.swarm, {})  # refused before any work

    with ExitStack() as stack:
        stack.enter_context(exclusive(shared_cache()))
        if start_ray(settings.cluster):  # once, not at every rung
            import ray

            stack.callback(ray.shutdown)
        engine = Engine.start(settings, vlm, of_image, places(settings))
        tracker, fingerprints = _tracked(stack, engine, trials, questions)

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
            tables["swarm.csv"], summary["swarm"] = search_swarm(
                wanted.swarm,
                wanted.seed,
                partial(make, wanted.swarm),
                rungs=rungs,
                unseen=unseen,
                contest=contest,
                tracker=tracker,
                tags=fingerprints,
            )
        _write(tables, summary | {"fingerprints": fingerprints})
        tracker.artifacts(SEARCH, "search")
    print(f"{asking.answered} answers were new; the race asked {summary['answers']} of {summary['full_answers']}")


def _tracked(
    stack: ExitStack, engine: Engine, trials: list[Trial], questions: pd.DataFrame
) -> tuple[Tracker, dict[str, str]]:
    """The search's MLflow run, closed with ``stack``, and the fingerprints of what it searches."""
    wanted, tracking = engine.settings.search, engine.settings.tracking
    further = [wanted.model_dump(), engine.settings.evaluate.model_dump()]
    search_id, fingerprints = engine.identify(trials, questions, *further)

    tracker = stack.enter_context(Tracker.open(tracking.resolved_uri, tracking.experiment, sweep_id=search_id))
    name = f"search {search_id[:8]}: {len(trials)} trials, {len(questions)} questions"
    size = {"trials": len(trials), "questions": len(questions), "shares": wanted.shares}
    tracker.parent(name, size, git_and_dvc_tags(Path()) | fingerprints)
    return tracker, fingerprints


def _questions(plan: SweepSettings, vlm: Adapter) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The sweep's questions, and all that are prepared of its benchmarks, of any image."""
    prepared = pd.read_parquet(EXAMPLES)
    questions, everything = (
        choose_questions(prepared, plan.benchmarks, images, plan.subset_seed).examples for images in (plan.images, None)
    )
    questions, _ = askable(vlm, questions, allowed=plan.quarantine == "allow")
    everything, _ = askable(vlm, everything, allowed=True)
    return questions, everything


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
