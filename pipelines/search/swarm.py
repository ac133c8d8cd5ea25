"""Optuna over one method's hyper-parameters at one budget, its trials run as races.

A batch of points is asked at once, so that its trials share features, selections and trunks, and races beside the
preset and the best so far. Who stops early is told as pruned, with its value on the last slice it answered.

A study has no storage of its own. Sampler and races are functions of seed and answers, and answers lie in the result
store: the same command after a kill asks the same points again, finds their answers and goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from pipelines.scores.sampled import Sampled
from pipelines.search.racing import Race, Standing
from pipelines.settings import AxisSettings, SwarmSettings
from pipelines.sweep.trials import Trial

MEAN = "mean"  # the objective that weighs all families alike


@dataclass(frozen=True)
class Tried:
    """A point of the space and how far its trial got; ``standing`` null where its answers cannot be made."""

    number: int
    point: dict[str, Any]
    trial: Trial
    standing: Standing | None
    finished: bool

    def reached(self, objective: str) -> float:
        """The objective on all images; NaN where the trial did not get so far."""
        if self.standing is None or not self.finished:
            return math.nan
        return self.standing.estimates[objective][0]


def objective_of(name: str) -> Callable[[dict[str, Sampled]], dict[str, Sampled]]:
    """What a race is judged by: one family's mean retention, or the mean of all families' under the name ``mean``."""

    def judge(families: dict[str, Sampled]) -> dict[str, Sampled]:
        return {name: families[name] if name != MEAN else Sampled.mean(list(families.values()))}

    return judge


def run_study(
    swarm: SwarmSettings,
    seed: int,
    make: Callable[[dict[str, Any]], Trial],
    preset: Trial,
    run: Callable[[Sequence[Trial], Sequence[Trial]], Race],
    on_batch: Callable[[list[Tried]], None] = lambda tried: None,
) -> tuple[list[Tried], Standing]:
    """Try ``swarm.trials`` points, ``swarm.batch`` at a time: the points in order, and how the preset stands.

    ``make``: point → trial. ``run``: trials and those that must not stop (preset, best so far) → their race, judged by
    ``objective_of(swarm.objective)``. Points that come to one trial share its result.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=TPESampler(seed=seed, constant_liar=True))
    tried: list[Tried] = []
    best: Standing | None = None

    while len(tried) < swarm.trials:
        handles = [study.ask() for _ in range(min(swarm.batch, swarm.trials - len(tried)))]
        points = [_point(swarm, trial) for trial in handles]
        trials = [make(point) for point in points]
        outcome = run(trials, [preset, best.trial] if best else [preset])
        batch = []
        for handle, point, trial in zip(handles, points, trials, strict=True):
            standing = outcome.standings.get(trial.trial_id)
            finished = standing is not None and standing.rung == outcome.rungs
            _tell(study, handle, standing, finished, swarm.objective)
            batch.append(Tried(handle.number, point, trial, standing, finished))
        tried += batch
        best = best_of(tried, swarm.objective)
        on_batch(batch)
    return tried, outcome.standings[preset.trial_id]


def best_of(tried: Sequence[Tried], objective: str) -> Standing | None:
    """The highest objective on all images; of equals, the first tried."""
    ranked = ranking(tried, objective)
    return ranked[0].standing if ranked else None


def ranking(tried: Sequence[Tried], objective: str) -> list[Tried]:
    """Who answered everything, each trial once, by falling objective; of equals, the first tried."""
    finished = [one for one in tried if np.isfinite(one.reached(objective))]
    once = {one.trial.trial_id: one for one in reversed(finished)}
    return sorted(once.values(), key=lambda one: (-one.reached(objective), one.number))


def _tell(
    study: optuna.Study, handle: optuna.trial.Trial, standing: Standing | None, finished: bool, objective: str
) -> None:
    values = [] if standing is None else [row[objective] for row in standing.history]
    for rung, value in enumerate(values, start=1):
        handle.report(value, rung)
    if not values or not np.isfinite(values[-1]):
        study.tell(handle, state=TrialState.FAIL)
    elif finished:
        study.tell(handle, values[-1])
    else:
        study.tell(handle, state=TrialState.PRUNED)


def _point(swarm: SwarmSettings, handle: optuna.trial.Trial) -> dict[str, Any]:
    """A value for every axis; scorer and ratio are left out where there is no stage 2."""
    point: dict[str, Any] = {}
    for name, axis in swarm.space.axes.items():
        if name in ("stage2_scorer", "stage2_ratio") and point.get("stage2_layer") == "off":
            continue
        point[name] = _suggest(handle, name, axis)
    return point


def _suggest(handle: optuna.trial.Trial, name: str, axis: AxisSettings) -> Any:
    if axis.choices is not None:
        return handle.suggest_categorical(name, axis.choices)
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return handle.suggest_int(name, axis.low, axis.high, log=axis.log)
    return handle.suggest_float(name, axis.low, axis.high, log=axis.log)
