"""Which trials differ from a named one, and which are as good as the unpruned model, as rows of finished text."""

from __future__ import annotations

from dataclasses import dataclass

from nuwa import UNPRUNED
from pipelines.report.finding import p_text
from pipelines.report.outcomes import FAMILIES, Difference, Outcomes, TrialRow
from pipelines.report.style import method_style, percent, plain_number
from pipelines.report.tables import DASH
from pipelines.scores.comparisons import AGAINST, AHEAD, BEHIND, EQUIVALENT


@dataclass(frozen=True)
class PairCell:
    """One family: the difference in points and its interval, the corrected p-value, and the verdict in a word."""

    difference: str
    interval: str
    p: str
    verdict: str
    side: str  # ahead, behind or nothing, for the colour


@dataclass(frozen=True)
class PairRow:
    name: str
    color: str
    position: str
    against: dict[str, PairCell]
    equivalent: dict[str, bool]


@dataclass(frozen=True)
class PairTable:
    """All main trials of a budget beside ``reference``, which is none where that budget has no such trial."""

    budget: str
    reference: str
    together: int
    rows: list[PairRow]
    none_equivalent: bool


def pair_table(outcomes: Outcomes, budget: float) -> PairTable | None:
    """Null where nothing was compared at ``budget``."""
    reference, trials = outcomes.held_against(budget), outcomes.at_budget(budget)
    rows = [_row(outcomes, trial, reference, budget) for trial in trials if trial is not reference]
    if not rows or reference is None:
        return None
    known = [
        difference
        for trial in trials
        for family in FAMILIES
        if (difference := outcomes.difference(AGAINST, budget, trial, reference, family))
    ]
    return PairTable(
        budget=plain_number(budget),
        reference=f"{outcomes.name(reference)} ({reference.position.upper()})",
        together=max((one.together for one in known), default=0),
        rows=rows,
        none_equivalent=not any(flag for row in rows for flag in row.equivalent.values()),
    )


def _row(outcomes: Outcomes, trial: TrialRow, reference: TrialRow | None, budget: float) -> PairRow:
    against, equivalent = {}, {}
    for family in FAMILIES:
        difference = outcomes.difference(AGAINST, budget, trial, reference, family) if reference else None
        against[family] = _cell(difference)
        whole = outcomes.difference(UNPRUNED, budget, trial, outcomes.unpruned, family)
        equivalent[family] = whole is not None and whole.verdict == EQUIVALENT
    position = f"{trial.position.upper()}{' own' if trial.own else ''}"
    return PairRow(outcomes.name(trial), method_style(trial.method).color, position, against, equivalent)


def _cell(difference: Difference | None) -> PairCell:
    if difference is None:
        return PairCell(DASH, "", "", "", "")
    side = difference.verdict if difference.verdict in (AHEAD, BEHIND) else ""
    interval = f"{_signed(difference.low)} … {_signed(difference.high)}"
    return PairCell(_signed(difference.value), interval, p_text(difference.p), difference.verdict, side)


def _signed(value: float) -> str:
    text = percent(abs(value))
    return text if value >= 0 or float(text) == 0 else f"−{text}"
