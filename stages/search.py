"""``search``: race the sweep's trials on growing slices of its images, then search one method's hyper-parameters.

What it found is in git, for the report to show, and the stage is frozen; ``make search`` runs it again. Answers lie
where the sweep's do, so one finds the other's.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from nuwa import UNPRUNED
from nuwa.cost import LlmShape, cost_columns
from nuwa.source import code_fingerprint
from nuwa.stage1 import get_method
from nuwa.vlm import LlavaAdapter
from pipelines.atomic import atomic_path
from pipelines.datasets import choose_questions
from pipelines.executor import UnitsFailed, start_ray
from pipelines.features import encode_missing, load_fixed_grid
from pipelines.grid import Trial, expand
from pipelines.lock import exclusive
from pipelines.plan import read_examples, sweep_costs
from pipelines.progress import SweepProgress, worker_speed
from pipelines.racing import FEWEST_IMAGES, Race, check_slices, race, slices
from pipelines.search_space import trial_at
from pipelines.search_tables import race_table, study_runs, study_table
from pipelines.settings import Settings, SwarmSettings
from pipelines.storage import is_uri
from pipelines.swarm_search import Tried, objective_of, ranking, run_study
from pipelines.sweep import SweepSpec, answer_context, run_sweep
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

CONFIRMED = 5  # best points that are also asked on images the search has not seen


def search(settings: Settings) -> None:
    # DVC ignores Ctrl-C while a command runs and leaves it to the command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plan, wanted, cluster = settings.sweep, settings.search, settings.cluster
    place = settings.features.store or FEATURE_STORE
    prepared = pd.read_parquet(EXAMPLES)
    questions = choose_questions(prepared, plan.benchmarks, plan.images, plan.subset_seed).examples
    rungs = slices(questions, wanted.shares, wanted.seed)
    check_slices(rungs, wanted.shares)
    everything = choose_questions(prepared, plan.benchmarks, None, plan.subset_seed).examples
    unseen = everything[~everything["image"].isin(questions["image"])].reset_index(drop=True)
    vlm = load_fixed_grid(settings.model.path)
    trials = expand(plan, vlm.grid, vlm.layers)
    for trial in trials:
        if (check := get_method(trial.spec.stage1).check) is not None:
            check(trial.spec.config, vlm.encoder_identity)
    with ExitStack() as stack:
        stack.enter_context(exclusive(CACHE))
        if start_ray(cluster):  # once, not at every rung
            import ray

            stack.callback(ray.shutdown)
        store, _ = encode_missing(settings.model.path, IMAGES, place, settings.features, cluster)
        context = answer_context(vlm, store.identity)
        data = hashlib.sha256("".join(questions["example_id"] + questions["image"]).encode()).hexdigest()
        content = [context, data, sorted(trial.trial_id for trial in trials), wanted.model_dump()]
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
            str(place if is_uri(place) else Path(place).resolve()),
            store.identity,
            str(RESULT_STORE.resolve()),
            str(IMAGES.resolve()),
            cluster.cpus,
            cluster.device,
        )
        asking = Asking(settings, vlm, spec, context, tracker)
        contest = partial(
            race,
            reference=next(trial for trial in trials if trial.spec.method == UNPRUNED),
            ask=asking,
            confidence=wanted.confidence,
            resamples=settings.evaluate.resamples,
            seed=settings.evaluate.seed,
        )
        table, summary = _race_grid(settings, vlm, trials, rungs, contest, tracker)
        tables = {"trials.csv": table}
        if wanted.swarm is not None:
            found = _search_swarm(wanted.swarm, wanted.seed, vlm, rungs, unseen, contest, tracker, fingerprints)
            tables["swarm.csv"], summary["swarm"] = found
        _write(tables, summary | {"fingerprints": fingerprints})
        tracker.artifacts(SEARCH, "search")
    print(f"{asking.answered} answers were new; the race asked {summary['answers']} of {summary['full_answers']}")


def _race_grid(
    settings: Settings,
    vlm: LlavaAdapter,
    trials: list[Trial],
    rungs: list[pd.DataFrame],
    contest: Callable[..., Race],
    tracker: Tracker,
) -> tuple[pd.DataFrame, dict]:
    """Race the sweep's trials: the table of trials, and the race in figures."""
    wanted = settings.search
    costs = partial(cost_columns, llm=LlmShape.from_config(vlm.model.config), bytes_per_number=vlm.model.dtype.itemsize)
    rows = {trial.trial_id: trial.row() | costs(trial.schedule) for trial in trials}
    figures: list[dict[str, float]] = []

    def on_rung(rung: int, numbers: dict[str, int]) -> None:
        figures.append({"rung": rung, **numbers})
        tracker.progress(rung, {f"race/{key}": value for key, value in numbers.items()})
        print("rung {rung}: {trials} trials on {images} images, {stopped} stop".format(**figures[-1]), flush=True)

    # Schedules of one budget differ by up to half a token; that is no advantage.
    cost = {trial_id: round(row[wanted.cost]) for trial_id, row in rows.items()}
    raced = contest(trials, rungs=rungs, cost=cost, on_rung=on_rung)
    return race_table(raced, rows), {
        "confidence": wanted.confidence,
        "cost": wanted.cost,
        "rungs": figures,
        "answers": raced.answers,
        "full_answers": len(trials) * len(rungs[-1]),
    }


def _search_swarm(
    swarm: SwarmSettings,
    seed: int,
    vlm: LlavaAdapter,
    rungs: list[pd.DataFrame],
    unseen: pd.DataFrame,
    contest: Callable[..., Race],
    tracker: Tracker,
    tags: dict[str, str],
) -> tuple[pd.DataFrame, dict]:
    """Search the hyper-parameters: the table of points, and the study in figures.

    The best points were chosen on the images they are reported on. So they and the preset are asked once more on
    ``unseen`` ones, where there are enough.
    """
    make = partial(trial_at, swarm, grid=vlm.grid, layers=vlm.layers)
    preset, judge = make({}), objective_of(swarm.objective)

    def run(batch: Sequence[Trial], stay: Sequence[Trial], on: list[pd.DataFrame] = rungs) -> Race:
        # One budget is one cost: what rounding leaves between its schedules is no advantage.
        cost = {trial.trial_id: swarm.budget for trial in (*batch, *stay)}
        return contest(batch, rungs=on, cost=cost, stay=stay, judge=judge)

    def on_batch(batch: list[Tried]) -> None:
        tracker.trials(study_runs(batch, swarm.objective, tags))
        print(f"swarm search: {batch[-1].number + 1} of {swarm.trials} points tried", flush=True)

    tried, standing = run_study(swarm, seed, make, preset, run, on_batch)
    confirmed = {}
    if unseen["image"].nunique() >= FEWEST_IMAGES:
        best = [one.trial for one in ranking(tried, swarm.objective)[:CONFIRMED]]
        confirmed = run([], [preset, *best], [unseen]).standings
    answers = {one.trial.trial_id: one.standing.answers for one in tried if one.standing is not None}
    return study_table(tried, standing, confirmed, swarm.objective), {
        **swarm.model_dump(include={"method", "position", "budget", "objective"}),
        "preset": preset.spec.preset,
        "points": len(tried),
        "trials": len(answers),
        "answers": sum(answers.values()),
        "full_answers": len(answers) * len(rungs[-1]),
        "unseen_images": int(unseen["image"].nunique()) if confirmed else 0,
    }


@dataclass
class Asking:
    """Trials and questions through the sweep's own engine; ``answered`` counts the answers that were not stored yet."""

    settings: Settings
    vlm: LlavaAdapter
    spec: SweepSpec
    context: str
    tracker: Tracker
    answered: int = 0
    began: float = field(default_factory=time.monotonic)

    def __call__(self, trials: Sequence[Trial], questions: pd.DataFrame) -> pd.DataFrame:
        """Raises :class:`UnitsFailed` where answers cannot be made and ``sweep.quarantine`` does not let them go."""
        plan, cluster = self.settings.sweep, self.settings.cluster
        since = int(1000 * (time.monotonic() - self.began))
        with SweepProgress(PROGRESS, UNITS_LOG, lambda step, log: self.tracker.progress(since + step, log)) as progress:
            outcome = run_sweep(
                self.spec,
                trials,
                read_examples(questions, self.context),
                sweep_costs(self.vlm, questions),
                worker_speed(UNITS_LOG, cluster),
                plan.unit_images,
                cluster,
                progress.start,
                progress.done,
            )
        self.answered += progress.finished
        lacking = outcome.incomplete
        unpruned = any(trial.spec.method == UNPRUNED for trial in trials if trial.trial_id in lacking)
        if lacking and (plan.quarantine != "allow" or unpruned):
            first, failure = next(iter(sorted(lacking.items())))
            raise UnitsFailed(
                f"{len(lacking)} of {len(trials)} trials lack answers, all others are kept; first {first}: "
                f"{failure.reason}. Run the same command again to try just these, or set sweep.quarantine: allow to go "
                "on without these trials"
            )
        whole = [trial.trial_id for trial in trials if trial.trial_id not in lacking]
        answers = outcome.predictions.filter(pc.is_in(outcome.predictions["trial_id"], pa.array(whole, pa.string())))
        return answers.select(["trial_id", "example_id", "prediction"]).to_pandas()


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
