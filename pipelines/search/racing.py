"""Successive halving over images: trials race on growing slices, and those that are beaten stop early.

The slices are nested, seeded shares of the images. After each but the last, a trial stops when it is *dominated* in
every family: another that costs no more retains more, with confidence. What runs is what the sweep would run, so the
answers count towards a full grid and a full grid's towards a race.

What is promised: a trial which in some family no cheaper one truly beats is stopped with a probability of at most
``1 - confidence`` in the whole race, however many rivals it has, up to the bootstrap's own approximation. The promise is
for a trial, not for one of its hundred comparisons, because what a user can lose is a trial of the front.

How it is kept. Images are the unit: each rung draws images with replacement, the same draws for all trials
(:class:`pipelines.scores.evidence.Resamples`). For a trial and a family the bounds on all its rivals' leads hold at once: the
critical value is the quantile over draws of the largest excess of a drawn lead over the lead in the sample, each in its
own standard deviations (max-t; Romano and Wolf, 2005), and never below the normal one. Of the rungs after which trials
can stop, each takes an equal part of ``1 - confidence``. A lead is judged by its deviation around *no* lead (McNemar's
way), since around itself few images that agree would look like certainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import pandas as pd

from pipelines.data.datasets import image_line
from pipelines.scores.evidence import Evidence
from pipelines.scores.front import pareto_front
from pipelines.scores.sampled import Sampled
from pipelines.settings import SettingsError
from pipelines.sweep.trials import Trial

FEWEST_IMAGES = 10  # of the first slice; fewer say too little about how images vary
STILL = 1e-12  # standard deviations below are rounding
MOST_UNDEFINED = 0.5  # share of draws without a value (the unpruned model right nowhere) up to which a rung decides

# Answers of trials to the questions of a table: columns trial_id, example_id and prediction. A trial whose answers
# cannot all be made has none.
Ask = Callable[[Sequence[Trial], pd.DataFrame], pd.DataFrame]


def slices(examples: pd.DataFrame, shares: Sequence[float], seed: int) -> list[pd.DataFrame]:
    """The questions about the first ``⌈share · images⌉`` images, one table a share, rows in the order of ``examples``.

    An image's place in line is the digest of ``seed`` and its name: slices are nested, and neither the order of rows nor
    other images change who comes first.
    """
    line = image_line(examples["image"], seed)
    counts = [math.ceil(share * len(line)) for share in shares]
    return [examples[examples["image"].isin(line[:count])].reset_index(drop=True) for count in counts]


def check_slices(rungs: Sequence[pd.DataFrame], shares: Sequence[float]) -> None:
    """Raises :class:`SettingsError` when the first slice is too small to judge by."""
    first, everything = rungs[0], rungs[-1]
    images, total = first["image"].nunique(), everything["image"].nunique()
    if images < FEWEST_IMAGES:
        raise SettingsError(
            f"search.shares.0 = {shares[0]:g}: the first slice has {images} of {total} images; "
            f"an interval over images needs at least {FEWEST_IMAGES}"
        )
    for name in sorted(set(everything["benchmark"]) - set(first["benchmark"])):
        raise SettingsError(
            f"search.shares.0 = {shares[0]:g}: the first slice asks nothing of {name!r}; use a larger share"
        )


@dataclass(frozen=True)
class Measure:
    """Mean retention of all trials: in the sample ``(trials,)``, its interval, and in every resample
    ``(trials, resamples)``."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    draws: np.ndarray

    @classmethod
    def of(cls, retention: Sampled) -> Measure:
        low, high = retention.intervals()
        return cls(retention.point, low, high, retention.draws)


def dominators(measure: Measure, cost: np.ndarray, images: int, confidence: float) -> np.ndarray:
    """For each trial the place of the rival that beats it most clearly, ``(trials,)``; -1 where none does.

    A rival costs no more (``cost`` ``(trials,)``) and leads by more than the bound that holds for all rivals at once
    with ``confidence``, on ``images`` images; see the top of this module.
    """
    rivals_of = np.full(len(cost), -1)
    draws = measure.draws[:, np.isfinite(measure.draws).all(axis=0)]
    if draws.shape[1] < (1 - MOST_UNDEFINED) * measure.draws.shape[1] or not np.isfinite(measure.value).all():
        return rivals_of
    normal = NormalDist().inv_cdf(confidence)

    for trial in range(len(cost)):
        rivals = np.flatnonzero(cost <= cost[trial])
        lead = measure.value[rivals] - measure.value[trial]
        if not (lead > 0).any():
            continue
        excess = draws[rivals] - draws[trial] - lead[:, None]
        deviation = excess.std(axis=1)
        moved = deviation > STILL
        largest = np.max(excess[moved] / deviation[moved, None], axis=0, initial=0.0)
        critical = max(normal, np.quantile(largest, confidence, method="higher"))
        standard = lead / np.sqrt(deviation**2 + lead**2 / images + STILL**2)
        if standard.max() > critical:
            rivals_of[trial] = rivals[standard.argmax()]
    return rivals_of


@dataclass
class Standing:
    """How far a trial got: its last ``rung`` (from 1), the images and answers of it, ``estimates`` there as ``(value,
    low, high)`` a measure, and ``beaten_by``: measure → the trial that stopped it."""

    trial: Trial
    cost: float
    rung: int = 0
    images: int = 0
    answers: int = 0
    estimates: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)  # values by measure, rung by rung
    beaten_by: dict[str, str] = field(default_factory=dict)
    front: set[str] = field(default_factory=set)  # measures on whose final front it is


@dataclass(frozen=True)
class Race:
    """``standings`` by trial id in the order of the trials; ``rungs`` is how many there were."""

    standings: dict[str, Standing]
    rungs: int

    @property
    def answers(self) -> int:
        return sum(standing.answers for standing in self.standings.values())

    def finished(self) -> list[Standing]:
        return [standing for standing in self.standings.values() if standing.rung == self.rungs]


# Mean retention a family → what a race is judged by.
Judge = Callable[[dict[str, Sampled]], dict[str, Sampled]]


def race(
    trials: Sequence[Trial],
    reference: Trial,
    rungs: Sequence[pd.DataFrame],
    ask: Ask,
    cost: Mapping[str, float],
    *,
    confidence: float,
    resamples: int,
    seed: int,
    stay: Sequence[Trial] = (),
    judge: Judge = lambda families: families,
    on_rung: Callable[[int, dict[str, int]], None] = lambda rung, figures: None,
) -> Race:
    """Race ``trials`` over ``rungs``, tables of questions each within the next; ``reference``, unpruned, always stays.

    ``cost``: by trial id; who has none there costs more than anything. ``stay``: further trials that never stop. ``resamples``, ``seed``: as of
    :func:`pipelines.scores.evidence.evaluate`, with which the estimates of who finishes agree bit for bit. A trial stops when
    it is dominated in all that ``judge`` makes of the families. ``on_rung`` gets the rung (from 1) and its figures. A
    trial that ``ask`` leaves out leaves the race.
    """
    runners = list({trial.trial_id: trial for trial in (reference, *stay, *trials)}.values())
    safe = {reference.trial_id, *(trial.trial_id for trial in stay)}
    standings = {trial.trial_id: Standing(trial, cost.get(trial.trial_id, math.inf)) for trial in runners}
    level = 1 - (1 - confidence) / max(len(rungs) - 1, 1)

    for number, questions in enumerate(rungs, start=1):
        answers = ask(runners, questions)
        answered = set(answers["trial_id"].unique())
        for trial in runners:
            if trial.trial_id not in answered:
                del standings[trial.trial_id]
        runners = [trial for trial in runners if trial.trial_id in answered]
        ids = [trial.trial_id for trial in runners]

        evidence = Evidence.of(ids, reference.trial_id, questions, answers, resamples=resamples, seed=seed)
        families = evidence.families()
        judged = judge(families)
        measures = {name: Measure.of(values) for name, values in (families | judged).items()}
        costs = np.array([standings[trial_id].cost for trial_id in ids])
        _note([standings[trial_id] for trial_id in ids], number, questions, measures)

        # Who has answered everything is not stopped any more: it is on the front, or it is not.
        stopped: set[str] = set()
        if number == len(rungs):
            _note_front(ids, {name: measures[name] for name in judged}, costs, standings)
        else:
            images = questions["image"].nunique()
            beaten = {name: dominators(measures[name], costs, images, level) for name in judged}
            stopped = _stop(ids, beaten, safe, standings)
        runners = [trial for trial in runners if trial.trial_id not in stopped]
        figures = {"images": questions["image"].nunique(), "trials": len(ids), "stopped": len(stopped)}
        on_rung(number, figures | {"answers": sum(standing.answers for standing in standings.values())})
    return Race(standings, len(rungs))


def _note(standings: list[Standing], rung: int, questions: pd.DataFrame, measures: Mapping[str, Measure]) -> None:
    """How trials stand behind a rung; ``measures`` are of them, in their order."""
    images = questions["image"].nunique()
    for row, standing in enumerate(standings):
        standing.rung, standing.images, standing.answers = rung, images, len(questions)
        standing.estimates = {
            name: (float(measure.value[row]), float(measure.low[row]), float(measure.high[row]))
            for name, measure in measures.items()
        }
        standing.history.append({name: values[0] for name, values in standing.estimates.items()})


def _note_front(
    ids: list[str], measures: Mapping[str, Measure], costs: np.ndarray, standings: dict[str, Standing]
) -> None:
    """Note by which measures a trial is on the final front; measures and costs are in the order of ``ids``."""
    for name, measure in measures.items():
        for place in np.flatnonzero(pareto_front(measure.value, costs)).tolist():
            standings[ids[place]].front.add(name)


def _stop(ids: list[str], beaten: dict[str, np.ndarray], safe: set[str], standings: dict[str, Standing]) -> set[str]:
    """The trials dominated in every measure; who beat them is noted."""
    stopped = {
        trial_id
        for row, trial_id in enumerate(ids)
        if trial_id not in safe and all(rivals[row] >= 0 for rivals in beaten.values())
    }
    for row, trial_id in enumerate(ids):
        if trial_id in stopped:
            standings[trial_id].beaten_by = {name: ids[rivals[row]] for name, rivals in beaten.items()}
    return stopped
