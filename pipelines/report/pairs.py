"""Which trials differ from a named one, and which are as good as the unpruned model, as rows of finished text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nuwa import UNPRUNED
from pipelines.report.finding import p_text
from pipelines.report.outcomes import FAMILIES, Difference, Outcomes, TrialRow
from pipelines.report.style import FAMILIES as FAMILY_NAMES
from pipelines.report.style import method_style, percent, plain_number
from pipelines.report.tables import DASH
from pipelines.scores.comparisons import AGAINST, AHEAD, BEHIND, EQUIVALENT, PLANNED
from pipelines.scores.seeds import ONE_SEED, SEVERAL

OTHER_IDS = "With other position ids than their authors’"


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
    own: bool


@dataclass(frozen=True)
class PairTable:
    """All main trials of a budget beside ``reference``."""

    budget: str
    reference: str
    together: int
    rows: list[PairRow]
    none_equivalent: bool
    planned: list[str]
    seeds: str

    @property
    def parts(self) -> list[tuple[str, list[PairRow]]]:
        """Methods as their authors ship them, then with other position ids; whichever there are."""
        parts = [("", [row for row in self.rows if row.own]), (OTHER_IDS, [row for row in self.rows if not row.own])]
        return [(title, rows) for title, rows in parts if rows]


def pair_table(outcomes: Outcomes, budget: float) -> PairTable | None:
    """Null where nothing was compared at ``budget``; controls of another grid are not among what is."""
    reference = outcomes.held_against(budget)
    if reference is None:
        return None
    compared = {
        trial: known
        for trial in outcomes.at_budget(budget)
        if (known := [one for family in FAMILIES if (one := _lead(outcomes, trial, reference, budget, family))])
    }
    if not compared:  # what was compared are trials of ablations, which are no rows here
        return None

    rows = [_row(outcomes, trial, reference, budget) for trial in compared]
    return PairTable(
        budget=plain_number(budget),
        reference=f"{outcomes.name(reference)} ({reference.position.upper()})",
        together=max(one.together for known in compared.values() for one in known),
        rows=rows,
        none_equivalent=not any(flag for row in rows for flag in row.equivalent.values()),
        planned=_planned(outcomes, budget),
        seeds=_seeds(outcomes, compared),
    )


def _seeds(outcomes: Outcomes, compared: Mapping[TrialRow, Sequence[Difference]]) -> str:
    """Whether the spread over seeds is part of these differences, and of which it is known."""
    known: dict[str, float] = {}
    unknown = []
    for trial, differences in compared.items():
        name = f"{outcomes.name(trial)} ({trial.position.upper()})"
        if any(one.seeds == ONE_SEED for one in differences):
            unknown.append(name)
        elif any(one.seeds == SEVERAL for one in differences):
            known[name] = max(one.over_seeds for one in differences if one.seeds == SEVERAL)

    if not known and not unknown:
        return "No trial here hangs on a seed."
    parts = ["Intervals and p are over images; the spread over seeds is not included."]
    if known:
        told = ", ".join(f"{name} {percent(deviation)}" for name, deviation in known.items())
        parts.append(f"Standard deviation of the difference over seeds, in points: {told}.")
    if unknown:
        parts.append(f"Of one seed, or of one training, whose spread is not known: {', '.join(unknown)}.")
    return " ".join([*parts, "The others hang on no seed."])


def _planned(outcomes: Outcomes, budget: float) -> list[str]:
    """A sentence for each pair that was named before the run."""
    trials = outcomes.at_budget(budget)
    sentences = []
    for trial, other in itertools.permutations(trials, 2):
        found = {family: outcomes.difference(PLANNED, budget, trial, other, family) for family in FAMILIES}
        parts = [
            f"{FAMILY_NAMES[family]} {_signed(one.value)} points [{_signed(one.low)}, {_signed(one.high)}], "
            f"{p_text(one.p)}, {one.verdict}"
            for family, one in found.items()
            if one is not None
        ]
        if parts:
            together = max(one.together for one in found.values() if one is not None)
            pair = " less ".join(f"{outcomes.name(one)} ({one.position.upper()})" for one in (trial, other))
            sentences.append(
                f"Named before the run: {pair}: {'; '.join(parts)}; p corrected for these {together} alone{_of_one_seed(found.values())}."
            )
    return sentences


def _of_one_seed(differences: Iterable[Difference | None]) -> str:
    """Added to a sentence about a pair."""
    seeds = {one.seeds for one in differences if one is not None}
    if ONE_SEED in seeds:
        return "; of one seed or training, whose spread is not included"
    return "; the spread over seeds is not included" if SEVERAL in seeds else ""


def _lead(outcomes: Outcomes, trial: TrialRow, reference: TrialRow, budget: float, family: str) -> Difference | None:
    return outcomes.difference(AGAINST, budget, trial, reference, family)


def _row(outcomes: Outcomes, trial: TrialRow, reference: TrialRow, budget: float) -> PairRow:
    against, equivalent = {}, {}
    for family in FAMILIES:
        against[family] = _cell(_lead(outcomes, trial, reference, budget, family))
        whole = outcomes.difference(UNPRUNED, budget, trial, outcomes.unpruned, family)
        equivalent[family] = whole is not None and whole.verdict == EQUIVALENT
    position = f"{trial.position.upper()}{' own' if trial.own else ''}"
    return PairRow(outcomes.name(trial), method_style(trial.method).color, position, against, equivalent, trial.own)


def _cell(difference: Difference | None) -> PairCell:
    if difference is None:
        return PairCell(DASH, "", "", "", "")
    side = difference.verdict if difference.verdict in (AHEAD, BEHIND) else ""
    interval = f"{_signed(difference.low)} … {_signed(difference.high)}"
    return PairCell(_signed(difference.value), interval, p_text(difference.p), difference.verdict, side)


def _signed(value: float) -> str:
    text = percent(abs(value))
    return text if value >= 0 or float(text) == 0 else f"−{text}"
