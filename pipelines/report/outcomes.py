"""Trials and their scores, ordered and named as every table and chart shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from nuwa.methods import RECIPES, preset_values
from pipelines.addresses import BenchmarkName
from pipelines.report.inputs import ReportInputs
from pipelines.report.style import (
    benchmark_rank,
    method_rank,
    method_style,
    parameter_name,
    position_rank,
    setting_text,
)
from pipelines.scores.comparisons import AGAINST

COMPARED = ("method", "preset", "position", "budget")  # what the main grids may vary
STAGE2 = ("stage2_layer", "stage2_scorer", "stage2_recycling")
DERIVED = ("seed", "stage1_keep")  # of interest only where nothing else explains them (K1: the ratio K2 / K1)
FAMILIES = ("grounding", "vqa")
MEAN = "mean"  # stands for a benchmark in the rows of a family's mean retention


@dataclass(frozen=True)
class Estimate:
    """A score or retention with its 95 % interval, over ``n`` examples."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A trial's retention less another's, from the same images: :mod:`pipelines.scores.comparisons`.

    ``p``: corrected for all ``together`` pairs of its kind. ``verdict``: in the words of that module. ``seeds``: what seeds
    have to do with it, ``over_seeds``: its standard deviation over them where that is known, else NaN
    (:mod:`pipelines.scores.seeds`).
    """

    value: float
    low: float
    high: float
    p: float
    together: int
    verdict: str
    seeds: str
    over_seeds: float


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One row of ``trials.parquet``; what does not apply is ``None``, ``params`` is decoded.

    ``budgets``: every budget that comes to this schedule; ``budget`` is the first that asked for it. ``cuts``: layer
    and keep of every cut. ``flops``: of the prefill, by ``flops_convention``.
    """

    trial_id: str
    label: str
    grids: tuple[str, ...]
    method: str
    preset: str
    position: str
    budget: float | None
    budgets: tuple[float, ...]
    average_tokens: float
    image_tokens: int
    stage1_keep: int
    stage2_layer: int | None
    stage2_keep: int | None
    cuts: tuple[tuple[int, int], ...]
    stage2_scorer: str | None
    stage2_recycling: bool
    flops: float
    flops_convention: str
    seed: int
    params: dict[str, Any] = field(hash=False)

    @property
    def pruned(self) -> bool:
        return self.method != "unpruned"

    @property
    def own(self) -> bool:
        """Whether kept tokens have the position ids that the method's authors give them (``position: own``)."""
        return self.method in RECIPES and RECIPES[self.method].position == self.position

    def setting(self, name: str) -> Any:
        """The value of a column, or of a hyper-parameter: the trial's own, else its preset's, else ``"preset"``."""
        if name in (*COMPARED, *STAGE2, *DERIVED):
            return getattr(self, name)
        if name in self.params or self.method not in RECIPES:
            return self.params.get(name, "preset")
        return preset_values(self.method, self.preset).get(name, "preset")


@dataclass(frozen=True)
class BenchmarkColumn:
    """A benchmark's headline score. ``scale`` is 100 for shares (shown in per cent) and 1 for sums of points."""

    benchmark: str
    family: str
    metric: str
    scale: int
    n: int

    def text(self, value: float) -> str:
        return f"{self.scale * value:.1f}"


class Outcomes:
    """What the run's trials scored.

    Attributes:
        trials: pruned trials in the order of rows: method, preset (``released`` first), position, budget.
        unpruned: the trial every retention is measured against.
        columns: headline scores, grounding benchmarks first.
        dynamic: whether images have layouts of their own; token counts are then means over images.
        main: the trials of the unpruned one's grid, and of grids that vary method, preset, position or budget only.
        ablations: the names of the other grids, in alphabetical order.
    """

    def __init__(self, inputs: ReportInputs) -> None:
        trials = [_trial(row) for row in inputs.trials.to_dict("records")]
        self.unpruned = next(trial for trial in trials if not trial.pruned)
        self.trials = sorted((trial for trial in trials if trial.pruned), key=_rank)
        self.dynamic = bool(inputs.trials["image_grid"].isna().any())
        self._scores: dict[tuple[str, str], Estimate] = {}
        self._retention: dict[tuple[str, str], Estimate] = {}
        self._read_scores(inputs.scores)
        self._differences = _differences(inputs.comparisons)
        self.columns = _columns(inputs.scores)
        grids = sorted({name for trial in self.trials for name in trial.grids})
        others = [name for name in grids if name not in self.unpruned.grids]
        self.ablations = [name for name in others if set(varying(self.grid(name))) - set(COMPARED)]
        self.main = [trial for trial in self.trials if set(trial.grids) - set(self.ablations)]
        self._names = _names(self.main)

    def _read_scores(self, scores: pd.DataFrame) -> None:
        for row in _headlines(scores).itertuples():
            self._scores[row.trial_id, row.benchmark] = Estimate(row.score, row.low, row.high, int(row.n))
        for row in scores[scores["benchmark"] == MEAN].itertuples():
            self._retention[row.trial_id, row.family] = Estimate(row.score, row.low, row.high, int(row.n))

    def grid(self, name: str) -> list[TrialRow]:
        """The pruned trials of a grid, in order."""
        return [trial for trial in self.trials if name in trial.grids]

    def budgets(self) -> list[float]:
        """Budgets of the main trials, ascending, in average tokens."""
        return sorted({budget for trial in self.main for budget in trial.budgets})

    def at_budget(self, budget: float) -> list[TrialRow]:
        """Those whose position ids are their authors' own first."""
        return sorted((trial for trial in self.main if budget in trial.budgets), key=lambda trial: not trial.own)

    def name(self, trial: TrialRow) -> str:
        """``Nüwa``, with whatever else but position ids and budget tells the trial from the run's other main trials."""
        return self._names.get(trial.trial_id, method_style(trial.method).name)

    def score(self, trial: TrialRow, benchmark: str) -> Estimate | None:
        """The headline score of a benchmark."""
        return _known(self._scores.get((trial.trial_id, benchmark)))

    def retention(self, trial: TrialRow, family: str) -> Estimate | None:
        """Unweighted mean retention over the benchmarks of ``grounding`` or ``vqa``."""
        return _known(self._retention.get((trial.trial_id, family)))

    def difference(
        self, question: str, budget: float, trial: TrialRow, reference: TrialRow, family: str
    ) -> Difference | None:
        """In mean retention, where the pair was compared and both have one."""
        known = self._differences.get((question, budget, trial.trial_id, reference.trial_id, family))
        return None if known is None or math.isnan(known.value) else known

    def held_against(self, budget: float) -> TrialRow | None:
        """The trial that all others of a budget are compared with."""
        known = {key[3] for key in self._differences if key[:2] == (AGAINST, budget)}
        return next((trial for trial in self.trials if trial.trial_id in known), None)


def _differences(comparisons: pd.DataFrame) -> dict[tuple[str, float, str, str, str], Difference]:
    """By question, budget, trial, reference and family, of family means."""
    rows = comparisons[comparisons["benchmark"] == MEAN]
    return {
        (row.question, row.budget, row.trial_id, row.reference, row.family): Difference(
            row.difference,
            row.low,
            row.high,
            row.p_corrected,
            int(row.together),
            row.verdict,
            row.seeds,
            row.seed_deviation,
        )
        for row in rows.itertuples()
    }


def varying(trials: Iterable[TrialRow]) -> list[str]:
    """Columns and hyper-parameters in which ``trials`` differ.

    What follows from a parameter listed before it is left out: the stage-2 layer where it is the method's own, K1 and
    K2 mostly. Columns come before hyper-parameters, seed and K1 last.
    """
    trials = list(trials)
    keys = sorted({key for trial in trials for key in trial.params} - {*COMPARED, *STAGE2, *DERIVED})
    names: list[str] = []
    for name in (*COMPARED, *STAGE2, *keys, *DERIVED):
        groups: dict[tuple, set[str]] = {}
        for trial in trials:
            groups.setdefault(tuple(str(trial.setting(other)) for other in names), set()).add(str(trial.setting(name)))
        if any(len(values) > 1 for values in groups.values()):
            names.append(name)
    return names


def _cut(text: str) -> tuple[int, int]:
    layer, keep = text.split(":")
    return int(layer), int(keep)


def _trial(row: dict[str, Any]) -> TrialRow:
    def number(name: str, kind: type) -> Any:
        value = row[name]
        return None if value is None or pd.isna(value) else kind(value)

    return TrialRow(
        trial_id=row["trial_id"],
        label=row["label"],
        grids=tuple(row["grids"]),
        method=row["method"],
        preset=row["preset"],
        position=row["position"],
        budget=number("budget", float),
        budgets=tuple(map(float, row["budgets"])),
        average_tokens=float(row["average_tokens"]),
        image_tokens=int(row["image_tokens"]),
        stage1_keep=int(row["stage1_keep"]),
        stage2_layer=number("stage2_layer", int),
        stage2_keep=number("stage2_keep", int),
        cuts=tuple(map(_cut, (number("stage2_cuts", str) or "").split())),
        stage2_scorer=number("stage2_scorer", str),
        stage2_recycling=bool(row["stage2_recycling"]),
        flops=float(row["flops"]),
        flops_convention=row["flops_convention"],
        seed=int(row["seed"]),
        params=json.loads(row["params"] or "{}"),
    )


def _rank(trial: TrialRow) -> tuple:
    preset = (trial.preset != "released", trial.preset)
    return (method_rank(trial.method), preset, position_rank(trial.position), trial.budget or 0.0, trial.label)


def _headlines(scores: pd.DataFrame) -> pd.DataFrame:
    return scores[scores["headline"] & (scores["benchmark"] != MEAN)]


def _columns(scores: pd.DataFrame) -> list[BenchmarkColumn]:
    columns = []
    for benchmark, rows in _headlines(scores).groupby("benchmark"):
        scale = 1 if BenchmarkName.parse(benchmark).benchmark().points else 100
        first = rows.iloc[0]
        columns.append(BenchmarkColumn(benchmark, first["family"], first["metric"], scale, int(rows["n"].max())))
    return sorted(columns, key=lambda column: (FAMILIES.index(column.family), benchmark_rank(column.benchmark)))


def _names(main: list[TrialRow]) -> dict[str, str]:
    """The method, its preset where several ran, and whatever else parts its trials.

    A selection has one name under all position ids, so that what stands beside each other is the same selection.
    """
    series: dict[tuple[str, str], list[TrialRow]] = {}
    presets: dict[str, set[str]] = {}
    for trial in main:
        series.setdefault((trial.method, trial.preset), []).append(trial)
        presets.setdefault(trial.method, set()).add(trial.preset)

    names = {}
    for trials in series.values():
        unexplained = [name for name in varying(trials) if name not in COMPARED]
        for trial in trials:
            details = [trial.preset] if len(presets[trial.method]) > 1 else []
            details += [
                f"{parameter_name(name)} {setting_text(name, trial.setting(name))}"
                for name in dict.fromkeys((*sorted(trial.params), *unexplained))
            ]
            name = method_style(trial.method).name
            names[trial.trial_id] = f"{name} ({', '.join(details)})" if details else name
    return names


def _known(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None or math.isnan(estimate.value) else estimate
