"""Where it breaks: shares of right answers by what was asked, as rows of finished text."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from pipelines.report.finding import describe, named
from pipelines.report.outcomes import FAMILIES, Estimate, Outcomes, TrialRow
from pipelines.report.style import FAMILIES as FAMILY_NAMES
from pipelines.report.style import benchmark_name, method_style
from pipelines.report.tables import DASH, Cell, retention_cell
from pipelines.scores.groups import FEWEST

KINDS = {  # in the order of columns
    "size": "Size of the box",
    "place": "Middle of the box",
    "expression": "Expression says",
    "question": "Question begins",
    "answer": "Answer has",
    "category": "{benchmark}, category",
    "limit": "Answer’s limit",
    "downsampling": "Downsampled",
}
BY_TRIAL = ("limit", "downsampling")  # groups that follow from answers, not from questions alone


@dataclass(frozen=True)
class GroupColumn:
    """``n``: questions; nothing where it differs between trials."""

    kind: str
    benchmark: str
    name: str
    n: str


@dataclass(frozen=True)
class GroupRow:
    name: str
    color: str
    position: str
    cells: list[Cell]
    pruned: bool


@dataclass(frozen=True)
class GroupTable:
    """One family. ``heads``: title and width of each kind's columns; ``sentence``: the widest gap of the first trial of the
    answer, empty where there is none."""

    family: str
    heads: list[tuple[str, int]]
    columns: list[GroupColumn]
    rows: list[GroupRow]
    sentence: str


def group_tables(outcomes: Outcomes, groups: pd.DataFrame, budget: float) -> list[GroupTable]:
    """A table a family: the unpruned trial, methods as their authors ship them and what the answer names."""
    groups = groups[groups["budget"] == budget]
    told = named(outcomes, budget)
    shown = [trial for trial in outcomes.at_budget(budget) if trial.own or trial in told]
    tables = []
    for family in FAMILIES:
        of_family = groups[groups["family"] == family]
        if not of_family.empty:
            tables.append(_table(outcomes, family, of_family, [outcomes.unpruned, *shown], told[:1]))
    return tables


def _table(
    outcomes: Outcomes, family: str, groups: pd.DataFrame, trials: list[TrialRow], first: list[TrialRow]
) -> GroupTable:
    known = {
        (row.trial_id, row.kind, row.benchmark, row.group): Estimate(row.score, row.low, row.high, row.n)
        for row in groups.itertuples()
    }
    columns = _columns(groups)
    heads: dict[str, int] = {}
    for column in columns:
        title = KINDS[column.kind].format(benchmark=benchmark_name(column.benchmark) if column.benchmark else "")
        heads[title] = heads.get(title, 0) + 1

    def row(trial: TrialRow) -> GroupRow:
        found = [known.get((trial.trial_id, column.kind, column.benchmark, column.name)) for column in columns]
        position = f"{trial.position.upper()}{' own' if trial.own else ''}" if trial.pruned else "all tokens"
        cells = [Cell(DASH) if one is None else retention_cell(one) for one in found]
        return GroupRow(outcomes.name(trial), method_style(trial.method).color, position, cells, trial.pruned)

    sentence = _widest(outcomes, columns, known, first[0]) if first else ""
    return GroupTable(FAMILY_NAMES[family], list(heads.items()), columns, [row(trial) for trial in trials], sentence)


def _columns(groups: pd.DataFrame) -> list[GroupColumn]:
    rank = {kind: at for at, kind in enumerate(KINDS)}
    seen = groups.groupby(["kind", "benchmark", "group", "place"], as_index=False)["n"].max()
    rows = sorted(seen.itertuples(), key=lambda row: (rank[row.kind], row.benchmark, row.place))
    return [
        GroupColumn(row.kind, row.benchmark, row.group, "" if row.kind == "limit" else f"{row.n:,}") for row in rows
    ]


def _widest(
    outcomes: Outcomes,
    columns: list[GroupColumn],
    known: dict[tuple[str, str, str, str], Estimate],
    trial: TrialRow,
) -> str:
    """Of the kinds that follow from questions, the one whose groups of ``FEWEST`` questions or more lie furthest apart."""
    by_kind: dict[tuple[str, str], list[tuple[Estimate, GroupColumn]]] = {}
    for column in columns:
        one = known.get((trial.trial_id, column.kind, column.benchmark, column.name))
        if one is not None and column.kind not in BY_TRIAL and one.n >= FEWEST:
            by_kind.setdefault((column.kind, column.benchmark), []).append((one, column))

    # A kind of one group has no span.
    spans = {
        kind: (min(found, key=lambda one: one[0].value), max(found, key=lambda one: one[0].value))
        for kind, found in by_kind.items()
        if len(found) > 1
    }
    if not spans:
        return ""

    (low, worst), (high, best) = max(spans.values(), key=lambda span: span[1][0].value - span[0][0].value)
    title = KINDS[worst.kind].format(benchmark=benchmark_name(worst.benchmark) if worst.benchmark else "")
    return (
        f"{outcomes.name(trial)} differs most by “{title.lower()}”: right on {describe(low)} of “{worst.name}” and on "
        f"{describe(high)} of “{best.name}”."
    )
