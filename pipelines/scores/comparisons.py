"""Which trials differ: paired differences of retention, from the same images and resamples.

Two trials may have intervals that overlap and still differ clearly, because most of what moves one moves the other too.
So a pair is judged by its own difference, and verdicts stand corrected for how many were looked at together. What is
compared with what follows from the trials, at every budget of the main grid, and from ``evaluate.against``:

* ``against``: every other trial less the named one;
* ``position``: a method's trial less its own with compressed ids, which keep the same tokens;
* ``control``: LearnPruner less random tokens behind the same stage 2;
* ``planned``: pairs that ``evaluate.planned`` names before the run, corrected with one another alone;
* ``unpruned``: every trial less the unpruned model, and whether it lies within a margin of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from nuwa import UNPRUNED
from nuwa.methods import RECIPES
from nuwa.positions import SYNONYMS, PositionName
from pipelines.scores.evidence import Evidence
from pipelines.scores.sampled import Sampled, holm
from pipelines.scores.summary import main_trials

SURE = 0.05  # p-values below are differences, all of a family of pairs together
MEAN = "mean"  # stands for a benchmark where a pair differs in its family's mean retention
AHEAD, BEHIND, NOT_TOLD_APART, EQUIVALENT = "ahead", "behind", "not told apart", "equivalent"
AGAINST, PLANNED, POSITION, CONTROL = "against", "planned", "position", "control"
COMPRESSED, OWN = "perc", "own"
SAME_STAGE2 = ("position", "stage1_keep", "stage2_cuts", "stage2_scorer")
COLUMNS = {
    "question": "str",
    "budget": "float64",
    "trial_id": "str",
    "reference": "str",
    "family": "str",
    "benchmark": "str",
    "difference": "float64",
    "low": "float64",
    "high": "float64",
    "images": "int32",
    "p": "float64",
    "p_corrected": "float64",
    "p_margin": "float64",
    "p_margin_corrected": "float64",
    "together": "int32",
    "verdict": "str",
}
MEASURED = [name for name in COLUMNS if name not in ("p_corrected", "p_margin_corrected", "together", "verdict")]


class Named(Protocol):
    """A main trial of every budget: its method, preset (null: the first there is) and position ids."""

    method: str
    preset: str | None
    position: PositionName


class Planned(Protocol):
    """A pair that was named before the run: ``trial`` less ``less``."""

    @property
    def trial(self) -> Named: ...

    @property
    def less(self) -> Named: ...


@dataclass(frozen=True)
class Pair:
    """``trial`` less ``reference``, both trial ids, as an answer to one of the questions above at one budget."""

    question: str
    budget: float
    trial: str
    reference: str


def pairs_of(trials: pd.DataFrame, against: Named, planned: Sequence[Planned] = ()) -> list[Pair]:
    """What is compared with what.

    ``trials``: rows of ``data/trials.parquet``.
    """
    unpruned = trials.loc[trials["method"] == UNPRUNED, "trial_id"].item()
    main = main_trials(trials)
    main = main[main["method"] != UNPRUNED].sort_values("label")
    pairs = []

    for budget in sorted({float(budget) for budgets in main["budgets"] for budget in budgets}):
        there = main[[budget in budgets for budgets in main["budgets"]]]
        reference = _named(there, against)
        if reference is not None:
            others = there.loc[there["trial_id"] != reference, "trial_id"]
            pairs += [Pair(AGAINST, budget, trial, reference) for trial in others]
        ends = [(_named(there, pair.trial), _named(there, pair.less)) for pair in planned]
        pairs += [Pair(PLANNED, budget, one, other) for one, other in ends if one and other and one != other]
        pairs += [Pair(POSITION, budget, *pair) for pair in _by_position(there)]
        pairs += [Pair(CONTROL, budget, *pair) for pair in _controls(there, trials)]
        pairs += [Pair(UNPRUNED, budget, trial, unpruned) for trial in there["trial_id"]]
    return pairs


def never_met(trials: pd.DataFrame, planned: Sequence[Planned]) -> list[str]:
    """A line for each planned pair that no budget has both trials of: a name that is not there would pass unseen."""

    def told(one: Named) -> str:
        return f"{one.method} ({one.preset or 'any preset'}, {one.position} ids)"

    return [
        f"evaluate.planned: no budget of the main grid has both {told(pair.trial)} and {told(pair.less)}; nothing is compared"
        for pair in planned
        if not any(one.question == PLANNED for one in pairs_of(trials, pair.less, [pair]))
    ]


def _named(trials: pd.DataFrame, against: Named) -> str | None:
    """The trial that all others of a budget are held against, where that budget has it."""
    method, preset, position = against.method, against.preset, against.position
    strategy = RECIPES[method].position if position == OWN else SYNONYMS.get(position, position)
    chosen = trials[(trials["method"] == method) & (trials["position"] == strategy)]
    chosen = chosen[chosen["preset"] == preset] if preset else chosen
    return None if chosen.empty else chosen["trial_id"].iloc[0]


def _by_position(trials: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Trials of one method and preset: each with other ids, and the one with compressed ids."""
    for _, same in trials.groupby(["method", "preset"], sort=False):
        compressed = same.loc[same["position"] == COMPRESSED, "trial_id"]
        if len(compressed) == 1:
            others = same.loc[same["position"] != COMPRESSED, "trial_id"]
            yield from ((trial, compressed.item()) for trial in others)


def _controls(there: pd.DataFrame, trials: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """LearnPruner's trials, and random ones that keep as many tokens behind the same stage 2, of any grid."""
    random = trials[trials["method"] == "random"]
    for learned in there[there["method"] == "learnpruner"].to_dict("records"):
        alike = random
        for name in SAME_STAGE2:
            alike = alike[alike[name].isna() if pd.isna(learned[name]) else alike[name] == learned[name]]
        yield from ((learned["trial_id"], control) for control in alike["trial_id"][:1])


Retentions = Mapping[tuple[str, str], Sampled]  # family and benchmark, or MEAN → of some trials


def compare(evidence: Evidence, pairs: Sequence[Pair], margin: float) -> pd.DataFrame:
    """A row for each pair, and benchmark or family's mean: see docs/results.md for the columns.

    ``margin``: of retention, within which a trial counts as equivalent to the unpruned model.
    """
    numbers = {trial: number for number, trial in enumerate(evidence.trial_ids)}

    def of(trials: list[str]) -> Retentions:
        chosen = np.array([numbers[trial] for trial in trials])
        return with_means(evidence, evidence.retentions(chosen))

    references = {one: of([one]) for one in {pair.reference for pair in pairs}}
    trials = sorted({pair.trial for pair in pairs}, key=numbers.__getitem__)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(trials), evidence.block_size):
        block = trials[start : start + evidence.block_size]
        rows += pair_rows(block, of(block), pairs, references.__getitem__, margin)
    return with_verdicts(pd.DataFrame(rows, columns=MEASURED))


def with_means(evidence: Evidence, by_benchmark: Mapping[str, Sampled]) -> Retentions:
    """Retentions of some trials, and each family's mean of them."""
    family_of = {part.name: part.benchmark.family for part in evidence.scored}
    means = {(family, MEAN): mean for family, mean in evidence.family_means(by_benchmark).items()}
    return {(family_of[name], name): retention for name, retention in by_benchmark.items()} | means


def pair_rows(
    trials: Sequence[str],
    retentions: Retentions,
    pairs: Sequence[Pair],
    reference: Callable[[str], Retentions],
    margin: float,
) -> list[dict[str, Any]]:
    """Rows of those ``pairs`` whose trial is among ``trials``, which ``retentions`` are of; see :data:`MEASURED`.

    ``reference``: trial id → that one's retentions.
    """
    place = {trial: row for row, trial in enumerate(trials)}
    here = [pair for pair in pairs if pair.trial in place]
    rows: list[dict[str, Any]] = []

    for name in dict.fromkeys(pair.reference for pair in here):
        held = [pair for pair in here if pair.reference == name]
        chosen, whole = np.array([place[pair.trial] for pair in held]), reference(name)
        for (family, benchmark), retention in retentions.items():
            difference = retention.of(chosen).minus(whole[family, benchmark])
            rows += _rows(held, family, benchmark, difference, margin)
    return rows


def _rows(
    pairs: Sequence[Pair], family: str, benchmark: str, difference: Sampled, margin: float
) -> list[dict[str, Any]]:
    low, high = difference.intervals()
    p, p_margin = difference.p_zero(), difference.p_beyond(margin)

    return [
        {
            "question": pair.question,
            "budget": pair.budget,
            "trial_id": pair.trial,
            "reference": pair.reference,
            "family": family,
            "benchmark": benchmark,
            "difference": difference.point[row],
            "low": low[row],
            "high": high[row],
            "images": difference.images,
            "p": p[row],
            "p_margin": p_margin[row] if pair.question == UNPRUNED else np.nan,
        }
        for row, pair in enumerate(pairs)
    ]


def with_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Columns ``MEASURED`` and what follows: p-values corrected over all pairs of a question and budget, and verdicts.

    Family means are corrected together, and benchmarks together.
    """
    table = table.astype({name: COLUMNS[name] for name in MEASURED})
    table = table.sort_values(["question", "budget", "trial_id", "reference", "family", "benchmark"], ignore_index=True)
    together = [table["question"], table["budget"], table["benchmark"] == MEAN]
    for name in ("p", "p_margin"):
        table[f"{name}_corrected"] = table.groupby(together)[name].transform(lambda p: holm(p.to_numpy()))
    table["together"] = table.groupby(together)["p"].transform("size")
    differs, within = table["p_corrected"] < SURE, table["p_margin_corrected"] < SURE
    verdicts = np.where(table["difference"] > 0, AHEAD, BEHIND)
    verdicts = np.where(differs, verdicts, NOT_TOLD_APART)
    # A small sure difference may lie within the margin too; equivalence is what was asked.
    table["verdict"] = np.where(within, EQUIVALENT, verdicts)
    return table.astype(COLUMNS)[list(COLUMNS)]
