"""A search through the sweep's own engine: the race of a grid, then one method's hyper-parameters.

Both ask through :class:`Asking`, which runs what is missing and stores it where a sweep finds it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nuwa import UNPRUNED
from nuwa.budget import budget_on
from nuwa.cost import LlmShape, cost_columns
from nuwa.vlm import Adapter
from pipelines.search.racing import FEWEST_IMAGES, Race
from pipelines.search.space import preset_point
from pipelines.search.swarm import Tried, objective_of, ranking, run_study
from pipelines.search.tables import race_table, study_runs, study_table
from pipelines.settings import SearchSettings, SwarmSettings
from pipelines.sweep.engine import Engine
from pipelines.sweep.finishing import LimitReached
from pipelines.sweep.trials import Layouts, Trial
from pipelines.tracking.tracker import Tracker
from pipelines.workers import UnitsFailed

CONFIRMED = 5  # best points that are also asked on images the search has not seen
ROUNDED = 0.5 + 1e-9  # tokens by which whole numbers of them may miss a budget

Contest = Callable[
    ..., Race
]  # :func:`pipelines.search.racing.race` with reference, ask, confidence and bootstrap filled in


@dataclass
class Asking:
    """Trials and questions → their answers. ``answered`` counts those that were not stored yet.

    ``scratch``: a folder for tables under way.
    """

    engine: Engine
    tracker: Tracker
    scratch: Path
    answered: int = 0
    began: float = field(default_factory=time.monotonic)

    def __call__(self, trials: Sequence[Trial], questions: pd.DataFrame) -> pd.DataFrame:
        """Raises :class:`LimitReached` at ``sweep.gpu_hours``, and :class:`UnitsFailed` where answers cannot be made and ``sweep.quarantine`` does not let them go."""
        since = int(1000 * (time.monotonic() - self.began))
        outcome, made = self.engine.run(
            trials, questions, lambda step, figures: self.tracker.progress(since + step, figures)
        )
        self.answered += made
        lacking = outcome.incomplete
        unpruned = any(trial.spec.method == UNPRUNED for trial in trials if trial.trial_id in lacking)

        if outcome.left is not None:
            raise LimitReached(f"{outcome.left}: what is answered is kept; run the same command again to go on")
        if lacking and (self.engine.settings.sweep.quarantine != "allow" or unpruned):
            first, failure = next(iter(sorted(lacking.items())))
            raise UnitsFailed(
                f"{len(lacking)} of {len(trials)} trials lack answers, all others are kept; first {first}: "
                f"{failure.reason}. Run the same command again to try just these, or set sweep.quarantine: allow to go "
                "on without these trials"
            )
        whole = [trial for trial in trials if trial.trial_id not in lacking]
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            predictions = Path(folder) / "predictions.parquet"
            self.engine.collect(whole, questions, {"predictions": predictions}, Path(folder) / "runs")
            return pd.read_parquet(predictions, columns=["trial_id", "example_id", "prediction"])


def race_cost(trial: Trial, row: Mapping[str, Any], layouts: Layouts, cost: str) -> float:
    """What a trial costs in a race, from its row of ``trials.parquet``: the mean over images of ``layouts``.

    Schedules miss their budget by up to half a token, which is no advantage: such a trial's average is its budget.
    """
    value = float(row[cost])
    if cost != "average_tokens":
        return value
    budgets = [
        layouts.mean(partial(budget_on, budget=budget, unit=trial.unit, dynamic=trial.dynamic))
        for budget in trial.budgets
    ]
    met = [budget for budget in budgets if abs(budget - value) <= ROUNDED]
    return min(met, key=lambda budget: abs(budget - value), default=value)


def race_grid(
    wanted: SearchSettings,
    vlm: Adapter,
    trials: list[Trial],
    layouts: Layouts,
    rungs: list[pd.DataFrame],
    contest: Contest,
    tracker: Tracker,
) -> tuple[pd.DataFrame, dict]:
    """Race the sweep's trials: the table of trials, and the race in figures."""
    costs = partial(cost_columns, llm=LlmShape.from_config(vlm.model.config), bytes_per_number=vlm.model.dtype.itemsize)
    rows = {trial.trial_id: trial.row(layouts, costs) for trial in trials}
    figures: list[dict[str, float]] = []

    def on_rung(rung: int, numbers: dict[str, int]) -> None:
        figures.append({"rung": rung, **numbers})
        tracker.progress(rung, {f"race/{key}": value for key, value in numbers.items()})
        print("rung {rung}: {trials} trials on {images} images, {stopped} stop".format(**figures[-1]), flush=True)

    cost = {trial.trial_id: race_cost(trial, rows[trial.trial_id], layouts, wanted.cost) for trial in trials}
    raced = contest(trials, rungs=rungs, cost=cost, on_rung=on_rung)
    return race_table(raced, rows), {
        "confidence": wanted.confidence,
        "cost": wanted.cost,
        "rungs": figures,
        "answers": raced.answers,
        "full_answers": len(trials) * len(rungs[-1]),
    }


def search_swarm(
    swarm: SwarmSettings,
    seed: int,
    make: Callable[[dict[str, Any]], Trial],
    *,
    rungs: list[pd.DataFrame],
    unseen: pd.DataFrame,
    contest: Contest,
    tracker: Tracker,
    tags: dict[str, str],
) -> tuple[pd.DataFrame, dict]:
    """Search the hyper-parameters: the table of points, and the study in figures. ``make``: point → trial.

    The best points were chosen on the images they are reported on. So they and the preset are asked once more on
    ``unseen`` ones, where there are enough.
    """
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
    return study_table(tried, standing, preset_point(swarm, preset), confirmed, swarm.objective), {
        **swarm.model_dump(include={"method", "position", "budget", "objective"}),
        "preset": preset.spec.preset,
        "points": len(tried),
        "trials": len(answers),
        "answers": sum(answers.values()),
        "full_answers": len(answers) * len(rungs[-1]),
        "unseen_images": int(unseen["image"].nunique()) if confirmed else 0,
    }
