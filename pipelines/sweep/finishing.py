"""What a sweep ends with where answers are missing: in full, without some trials, without some questions, or not at all.

Scores compare trials on the same questions. So of what is missing, trials and questions are left out until every trial
that stays has answered every question that stays.
"""

from __future__ import annotations

import collections
import functools
import json
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from nuwa import UNPRUNED
from pipelines.settings import Reuse
from pipelines.sweep.answers import SweepOutcome
from pipelines.sweep.askable import scored_together
from pipelines.sweep.results import StoredUnit
from pipelines.sweep.trials import Trial
from pipelines.sweep.units import UnitExample, answers_there
from pipelines.workers import UnitsFailed

AGAIN = "Run the same command again to try just these"


class LimitReached(UnitsFailed):
    """The run has used what it was allowed; nothing failed."""


@dataclass(frozen=True)
class Finished:
    """What is compared: ``trials`` on all questions but those ``left_out`` (example id → why).

    ``incomplete``: trials that are not compared (trial id → why); ``told``: in a line, empty where nothing is missing.
    """

    trials: list[Trial]
    left_out: dict[str, str] = field(default_factory=dict)
    incomplete: dict[str, str] = field(default_factory=dict)
    told: str = ""


def finish(
    trials: Sequence[Trial],
    questions: pd.DataFrame,
    outcome: SweepOutcome,
    *,
    quarantine: str,
    finish_with: float | None,
    listed: str,
) -> Finished:
    """What a run that ended with ``outcome`` can be compared on; ``quarantine``, ``finish_with``: as in the settings.

    ``listed``: where what failed is listed. Raises :class:`LimitReached` where units were left at a limit, and
    :class:`UnitsFailed` where more is missing than is allowed.
    """
    lacking = outcome.lacking
    if not lacking:
        return Finished(list(trials))
    everything = len(trials) * len(questions)
    count = sum(map(len, lacking.values()))
    reference = next(trial.trial_id for trial in trials if trial.spec.method == UNPRUNED)

    if finish_with is not None and count / everything <= finish_with:  # as the share that is told
        return _finish_with_what_is_there(trials, questions, lacking, reference)
    more = f"sweep.finish_with: {_above(count / everything):g} to end with what is there"
    if outcome.left is not None:
        raise LimitReached(
            f"{outcome.left}: {everything - count:,} of {everything:,} answers are made and kept; run the same command "
            f"again to go on, or set {more}"
        )
    if quarantine == "allow" and reference not in lacking:
        incomplete = {trial_id: next(iter(lacking[trial_id].values())) for trial_id in sorted(lacking)}
        kept = [trial for trial in trials if trial.trial_id not in incomplete]
        return Finished(
            kept, {}, incomplete, f"{len(incomplete)} of {len(trials)} trials lack answers and are left out"
        )
    trial_id, reasons = next(iter(lacking.items()))
    example_id, reason = next(iter(reasons.items()))
    raise UnitsFailed(
        f"{len(lacking)} of {len(trials)} trials lack answers, all others are kept; first {example_id} under {trial_id}: "
        f"{reason}; {listed} lists all. {AGAIN}, or set sweep.quarantine: allow to go on without these trials, or {more}"
    )


def _above(share: float) -> float:
    """The next share in whole per mille."""
    return -(-share * 1000 // 1) / 1000


def _finish_with_what_is_there(
    trials: Sequence[Trial], questions: pd.DataFrame, lacking: Mapping[str, Mapping[str, str]], reference: str
) -> Finished:
    without_trials, without_questions = common_ground(
        {trial_id: set(reasons) for trial_id, reasons in lacking.items()}, len(trials), len(questions), reference
    )

    left_out = {}
    for row in questions[questions["example_id"].isin(list(without_questions))].itertuples():
        name = str(row.example_id)
        lacking_it = [trial_id for trial_id in lacking if trial_id not in without_trials and name in lacking[trial_id]]
        left_out[name] = (
            f"{len(lacking_it)} of {len(trials) - len(without_trials)} compared trials have no answer to it: {lacking[lacking_it[0]][name]}"
        )
        for fellow, why in scored_together(questions, row, "has no answer under some trial").items():
            left_out.setdefault(fellow, why)

    if len(left_out) == len(questions):
        raise UnitsFailed(f"no question has an answer of the unpruned trial and of another; {AGAIN}")
    incomplete = {
        trial_id: f"{len(lacking[trial_id]):,} answers are missing: {next(iter(lacking[trial_id].values()))}"
        for trial_id in sorted(without_trials)
    }

    count, everything = sum(map(len, lacking.values())), len(trials) * len(questions)
    told = (
        f"{count:,} of {everything:,} answers are missing (sweep.finish_with): {len(incomplete)} of {len(trials)} trials "
        f"and {len(left_out):,} of {len(questions):,} questions are left out; all compared trials have answered the others"
    )
    kept = [trial for trial in trials if trial.trial_id not in incomplete]
    return Finished(kept, dict(sorted(left_out.items())), incomplete, told)


def answered_by_all(
    trials: Sequence[Trial],
    examples: Sequence[UnitExample],
    questions: pd.DataFrame,
    stored: Sequence[StoredUnit],
    reuse: Reuse = "any",
) -> tuple[set[str], int]:
    """The questions (ids) that every one of ``trials`` (with their code) has answered in what is ``stored``, without those
    whose score needs one that is not among them; and how many answers of all are there.

    ``examples``: what ``questions`` are as workers are asked them.
    """
    held = ((unit.trials, unit.examples) for unit in stored)
    there = answers_there(trials, examples, held, reuse)
    shared = functools.reduce(operator.and_, (there.get(trial.trial_id, 0) for trial in trials))
    answered = {example.example_id for place, example in enumerate(examples) if shared >> place & 1}

    grouped = questions[questions["truth"].str.contains('"group"', regex=False)]
    groups = [
        (row.benchmark, json.dumps(json.loads(str(row.truth)).get("group")), str(row.example_id))
        for row in grouped.itertuples()
    ]
    broken = {(benchmark, group) for benchmark, group, name in groups if group != "null" and name not in answered}
    answered -= {name for benchmark, group, name in groups if (benchmark, group) in broken}
    return answered, sum(present.bit_count() for present in there.values())


def common_ground(
    lacking: Mapping[str, Collection[str]], trials: int, questions: int, reference: str
) -> tuple[set[str], set[str]]:
    """Trials and questions to leave out, so that nothing is missing of the rest; the ``reference`` trial stays.

    ``lacking``: trial id → the questions it has no answer to; ``trials``, ``questions``: how many there are. What the
    reference lacks goes first. Then whatever lacks the larger share goes, a trial of its questions or a question of its
    trials, again and again: that costs the fewest answers that are there for each that is not. Of equals a question goes.
    """
    out_trials: set[str] = set()
    out_questions = set(lacking.get(reference, ()))
    of_trial = {trial: set(unanswered) - out_questions for trial, unanswered in lacking.items() if trial != reference}
    of_question: dict[str, set[str]] = collections.defaultdict(set)
    for trial, unanswered in of_trial.items():
        for question in unanswered:
            of_question[question].add(trial)

    while of_question:
        worst_trial = max(sorted(of_trial), key=lambda trial: len(of_trial[trial]))
        worst_question = max(sorted(of_question), key=lambda question: len(of_question[question]))
        share_of_trial = len(of_trial[worst_trial]) / (questions - len(out_questions))
        share_of_question = len(of_question[worst_question]) / (trials - len(out_trials))
        if share_of_trial > share_of_question:
            out_trials.add(worst_trial)
            for question in of_trial.pop(worst_trial):
                of_question[question].discard(worst_trial)
                if not of_question[question]:
                    del of_question[question]
        else:
            out_questions.add(worst_question)
            for trial in of_question.pop(worst_question):
                of_trial[trial].discard(worst_question)
    # A question that only such trials lack that went after it can stay.
    needed = set().union(*(unanswered for trial, unanswered in lacking.items() if trial not in out_trials))
    return out_trials, out_questions & needed
