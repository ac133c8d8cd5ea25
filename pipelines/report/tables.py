"""The tables of the page, as rows of finished text: templates place them, nothing is computed there."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from nuwa.methods import RECIPES
from pipelines.report.outcomes import FAMILIES, Estimate, Outcomes, TrialRow
from pipelines.report.published import PublishedRow
from pipelines.report.style import (
    ALIASES,
    POSITIONS,
    benchmark_name,
    benchmark_rank,
    method_rank,
    method_style,
    percent,
    plain_number,
    position_rank,
)

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """A number and its interval as text. ``estimate`` is what they were made of, for the little interval drawings."""

    text: str
    interval: str = ""
    best: bool = False
    estimate: Estimate | None = None


@dataclass(frozen=True)
class TableRow:
    trial_id: str
    name: str
    color: str
    position: str  # PERC, PESP or RPME, and whether the method's authors give these ids
    strategy: str  # the same in a word
    retention: dict[str, Cell]
    scores: dict[str, Cell]
    tokens: tuple[str, ...]  # K1, K2, layer, realised average, GFLOP
    pruned: bool
    own: bool = False  # whether its position ids are its authors'


@dataclass(frozen=True)
class BudgetTable:
    """All main trials of one budget, the unpruned one on top; ``absent`` names series that have no such trial."""

    budget: str
    share: str
    rows: list[TableRow]
    absent: list[str]

    @property
    def shipped(self) -> list[TableRow]:
        """The unpruned row, and those of methods with the position ids of their authors."""
        return [row for row in self.rows if row.own or not row.pruned]

    @property
    def further(self) -> list[TableRow]:
        return [row for row in self.rows if row.pruned and not row.own]


@dataclass(frozen=True)
class PositionRow:
    """One method's selections: retention by family, a cell each strategy; ``own``: which of these its authors have."""

    name: str
    color: str
    cells: dict[str, list[Cell]]
    own: list[bool]


@dataclass(frozen=True)
class PositionTable:
    """``strategies``: name and word of each column."""

    strategies: list[tuple[str, str]]
    rows: list[PositionRow]


def budget_table(outcomes: Outcomes, budget: float) -> BudgetTable:
    trials = outcomes.at_budget(budget)
    best = _best(outcomes, trials)
    return BudgetTable(
        budget=plain_number(budget),
        share=f"{100 * budget / outcomes.unpruned.image_tokens:.0f}",
        rows=[_row(outcomes, trial, best) for trial in (outcomes.unpruned, *trials)],
        absent=_absent(outcomes, trials),
    )


def position_table(outcomes: Outcomes, budget: float) -> PositionTable | None:
    """The same selections under each strategy of position ids, a row a method; null where nothing ran under two."""
    trials = outcomes.at_budget(budget)
    strategies = sorted({trial.position for trial in trials}, key=position_rank)
    by_name: dict[str, dict[str, TrialRow]] = {}
    for trial in sorted(trials, key=lambda trial: method_rank(trial.method)):
        by_name.setdefault(outcomes.name(trial), {})[trial.position] = trial
    several = {name: known for name, known in by_name.items() if len(known) > 1}
    if not several:
        return None

    rows = []
    for name, known in several.items():
        first = next(iter(known.values()))
        shown = [known.get(strategy) for strategy in strategies]
        cells = {
            family: [retention_cell(None if trial is None else outcomes.retention(trial, family)) for trial in shown]
            for family in FAMILIES
        }
        own = [trial is not None and trial.own for trial in shown]
        rows.append(PositionRow(name, method_style(first.method).color, cells, own))
    return PositionTable([(name.upper(), POSITIONS.get(name, "")) for name in strategies], rows)


def _best(outcomes: Outcomes, trials: list[TrialRow]) -> dict[str, float]:
    """The highest value of every column, by family or benchmark; of a column of zeros none."""
    values: dict[str, list[Estimate | None]] = {
        family: [outcomes.retention(trial, family) for trial in trials] for family in FAMILIES
    }
    for column in outcomes.columns:
        values[column.benchmark] = [outcomes.score(trial, column.benchmark) for trial in trials]
    known = {key: [estimate.value for estimate in column if estimate] for key, column in values.items()}
    return {key: max(column) for key, column in known.items() if max(column, default=0) > 0}


def _row(outcomes: Outcomes, trial: TrialRow, best: dict[str, float]) -> TableRow:
    def is_best(key: str, estimate: Estimate | None) -> bool:
        return trial.pruned and estimate is not None and estimate.value == best.get(key)

    scores = {}
    for column in outcomes.columns:
        estimate = outcomes.score(trial, column.benchmark)
        scores[column.benchmark] = (
            Cell(DASH)
            if estimate is None
            else Cell(
                column.text(estimate.value),
                f"{column.text(estimate.low)}–{column.text(estimate.high)}",
                is_best(column.benchmark, estimate),
                estimate,
            )
        )
    retention = {family: outcomes.retention(trial, family) for family in FAMILIES}
    return TableRow(
        trial_id=trial.trial_id,
        name=outcomes.name(trial),
        color=method_style(trial.method).color,
        position=f"{trial.position.upper()}{' own' if trial.own else ''}" if trial.pruned else "all tokens",
        strategy=POSITIONS.get(trial.position, "") if trial.pruned else "",
        retention={
            family: retention_cell(estimate, is_best(family, estimate))
            if trial.pruned or estimate is None
            else Cell("100")
            for family, estimate in retention.items()
        },
        scores=scores,
        tokens=token_columns(trial),
        pruned=trial.pruned,
        own=trial.pruned and trial.own,
    )


def retention_cell(estimate: Estimate | None, best: bool = False) -> Cell:
    if estimate is None:
        return Cell(DASH)
    return Cell(percent(estimate.value), f"{percent(estimate.low)}–{percent(estimate.high)}", best, estimate)


def token_columns(trial: TrialRow) -> tuple[str, ...]:
    """K1, K2, stage-2 layer, realised average tokens and GFLOP; one K2 and layer a cut, a dash where there is none."""
    layers, keeps = ("/".join(str(cut[at]) for cut in trial.cuts) or DASH for at in (0, 1))
    average = plain_number(round(trial.average_tokens, 1))
    return (str(trial.stage1_keep), keeps, layers, average, f"{trial.flops / 1e9:.3g}")


def _absent(outcomes: Outcomes, trials: list[TrialRow]) -> list[str]:
    """Series with main trials, but none here: ``FastV (PESP, PERC), run at 32, 48``."""
    here = {(outcomes.name(trial), trial.position) for trial in trials}
    budgets: dict[tuple[str, str], list[float]] = {}
    for trial in outcomes.main:
        if (outcomes.name(trial), trial.position) not in here:
            budgets.setdefault((outcomes.name(trial), trial.position), []).extend(trial.budgets)
    positions: dict[tuple[str, str], list[str]] = {}
    for (name, position), known in budgets.items():
        positions.setdefault((name, ", ".join(map(plain_number, known))), []).append(position.upper())
    return [f"{name} ({', '.join(names)}), run at {known}" for (name, known), names in positions.items()]


@dataclass(frozen=True)
class FailureTable:
    """Share of answers that could not be read, or that ran into their limit, in per cent. ``worst`` is a sentence, empty
    where there is none."""

    benchmarks: list[str]
    rows: list[tuple[str, list[str]]]
    worst: str


def failure_table(outcomes: Outcomes, scores: pd.DataFrame, metric: str = "parse_failure") -> FailureTable | None:
    """All trials by all benchmarks that report ``metric``; ``None`` where none does."""
    failures = scores[scores["metric"] == metric]
    if failures.empty:
        return None
    rates = {(row.trial_id, row.benchmark): row.score for row in failures.itertuples()}
    benchmarks = sorted(set(failures["benchmark"]), key=benchmark_rank)
    rows = [
        (trial.label, [percent(rates.get((trial.trial_id, benchmark))) for benchmark in benchmarks])
        for trial in (outcomes.unpruned, *outcomes.trials)
    ]
    labels = {trial.trial_id: trial.label for trial in (outcomes.unpruned, *outcomes.trials)}
    # max keeps the first of equals: iterate in the order of rows
    trial_id, benchmark = max(
        ((trial_id, name) for trial_id in labels for name in benchmarks if (trial_id, name) in rates),
        key=lambda place: rates[place],
    )
    highest = rates[trial_id, benchmark]
    worst = f"{percent(highest)} % on {benchmark_name(benchmark)}, {labels[trial_id]}" if highest > 0 else ""
    return FailureTable([benchmark_name(name) for name in benchmarks], rows, worst)


@dataclass(frozen=True)
class SideRow:
    """``cells``: published and this run's, by family and share; a published one's ``interval`` holds the number of tasks."""

    name: str
    position: str
    cells: list[tuple[Cell, Cell]]


@dataclass(frozen=True)
class SideBySide:
    """Published retention and this run's at like token shares, row by row."""

    shares: list[str]
    rows: list[SideRow]
    unanchored: list[str]


def side_by_side(
    outcomes: Outcomes, published: list[PublishedRow], unanchored: list[str], tokens: int | None = None
) -> SideBySide | None:
    """Budgets within one point of a published share of tokens; ``None`` where no budget is.

    A row holds a published series and this run's of the same method and position ids, where there is one; of several presets
    the first. What nobody published stands in the other tables. ``tokens``: of a run of the very model whose shares these are,
    what they are shares of; there budgets in tokens are compared, because images of other sizes have other numbers of tokens.
    """
    total = tokens or outcomes.unpruned.image_tokens
    pairs = [
        (share, budget)
        for share in sorted({row.share for row in published})
        for budget in outcomes.budgets()
        if abs(budget / total - share) < 0.01
    ]
    if not pairs:
        return None

    theirs = _published_side(published, [share for share, _ in pairs])
    ours = _our_side(outcomes, [budget for _, budget in pairs])
    nothing = ("", [Cell(DASH)] * (len(FAMILIES) * len(pairs)))
    rows = [(place, ours.get(place, nothing), cells) for place, cells in theirs.items()]
    rows.sort(key=lambda row: (method_rank(row[0][0]), position_rank(row[0][1])))
    return SideBySide(
        shares=[f"{100 * share:.0f}" for share, _ in pairs],
        rows=[
            SideRow(
                name or method_style(place[0]).name,
                f"{place[1].upper()}{' own' if _is_own(*place) else ''}",
                list(zip(left, right, strict=True)),
            )
            for place, (name, right), left in rows
        ],
        unanchored=[method_style(method).name for method in sorted(unanchored, key=method_rank)],
    )


Place = tuple[str, str]  # method and position strategy


def _is_own(method: str, position: str) -> bool:
    return method in RECIPES and RECIPES[method].position == position


def _published_side(published: list[PublishedRow], shares: list[float]) -> dict[Place, list[Cell]]:
    """A method whose ids the source does not name has its authors' own."""
    known: dict[Place, dict[tuple[str, float], PublishedRow]] = {}
    for row in published:
        method = ALIASES.get(row.method, row.method)
        own = RECIPES[method].position if method in RECIPES else "own"
        known.setdefault((method, row.position or own), {})[row.family, row.share] = row
    found = {}
    for place, rows in known.items():
        cells = [rows.get((family, share)) for family in FAMILIES for share in shares]
        if any(cells):
            found[place] = [
                Cell(DASH) if one is None else Cell(percent(one.retention), f"({one.tasks})") for one in cells
            ]
    return found


def _our_side(outcomes: Outcomes, budgets: list[float]) -> dict[Place, tuple[str, list[Cell]]]:
    """By method and position ids, the name and cells of a method's first preset."""
    by_place = {
        (outcomes.name(trial), trial.position, budget): trial for trial in outcomes.main for budget in trial.budgets
    }
    found: dict[Place, tuple[str, list[Cell]]] = {}
    for series in outcomes.main:
        name, place = outcomes.name(series), (series.method, series.position)
        if not set(series.budgets) & set(budgets) or place in found:
            continue
        trials = [by_place.get((name, series.position, budget)) for budget in budgets]
        estimates = [
            None if trial is None else outcomes.retention(trial, family) for family in FAMILIES for trial in trials
        ]
        found[place] = (name, [Cell(DASH if one is None else percent(one.value)) for one in estimates])
    return found
