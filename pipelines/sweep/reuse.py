"""Why answers are to come: what of a trial, its code, its model or its questions is new to the store."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.features.identity import Described
from pipelines.settings import Reuse
from pipelines.sweep.identity import code_key, context_key
from pipelines.sweep.results import ResultStore, StoredUnit, reuse_key
from pipelines.sweep.trials import Trial
from pipelines.sweep.units import UnitExample, WorkUnit

NEW_TRIAL, NEW_QUESTIONS = "new trial", "new questions"
MOST_NAMES = 3  # changes that a reason lists


@dataclass(frozen=True)
class Missing:
    """The answers a trial lacks, and why."""

    trial: Trial
    answers: int
    reason: str


def explain(
    trials: Iterable[Trial],
    units: Iterable[WorkUnit],
    stored: Sequence[StoredUnit],
    changes: Changes,
    reuse: Reuse = "any",
) -> list[Missing]:
    """Every one of ``trials`` (with their code) that lacks answers; ``units`` are those to come."""
    lacking, batches = Counter[str](), dict[str, list[tuple[UnitExample, ...]]]()
    for unit in units:
        for trial in unit.trials:
            lacking[trial.trial_id] += len(unit.examples)
            batches.setdefault(trial.trial_id, []).append(unit.examples)
    known = _known_answers(stored, batches, changes.context)
    return [
        Missing(trial, lacking[trial.trial_id], changes.reason(trial, known.get(trial.trial_id, {}), reuse))
        for trial in trials
        if lacking[trial.trial_id]
    ]


def summary(missing: Sequence[Missing]) -> list[str]:
    """One line a reason, the largest first."""
    answers, trials = Counter[str](), Counter[str]()
    for one in missing:
        answers[one.reason] += one.answers
        trials[one.reason] += 1
    return [
        f"why: {reason}: {answers[reason]:,} answers of {trials[reason]} trial{'s' if trials[reason] > 1 else ''}"
        for reason in sorted(answers, key=lambda reason: (-answers[reason], reason))
    ]


class Known(NamedTuple):
    """Answers that a trial has: under which id and context, and whether to the very questions that it lacks."""

    answer: str
    context: str
    same_questions: bool


def _known_answers(
    stored: Sequence[StoredUnit], lacking: Mapping[str, Sequence[tuple[UnitExample, ...]]], present: str
) -> dict[str, dict[Known, None]]:
    """Trial id → what it has; ``lacking``: trial id → the examples of units to come, ``present``: the context now."""
    context_of = functools.cache(lambda provenance: json.loads(provenance).get("context", "") if provenance else "")
    digests: dict[tuple[int, ...], frozenset[str]] = {}  # few sets of batches, of very many trials
    wanted: dict[str, tuple[int, ...]] = {}
    for trial_id, batches in lacking.items():
        wanted[trial_id] = key = tuple(map(id, batches))
        if key not in digests:
            digests[key] = frozenset(example.digest for batch in batches for example in batch)

    known: dict[str, dict[Known, None]] = {}
    for unit in stored:
        context = context_of(unit.provenance)
        # In another context a question has another digest.
        overlaps = functools.cache(lambda key, held=unit.examples: not digests[key].isdisjoint(held))
        for answer in unit.trials:
            trial_id = answer.partition(".")[0]
            if trial_id in wanted:
                same = context == present and overlaps(wanted[trial_id])
                known.setdefault(trial_id, {})[Known(answer, context, same)] = None
    return known


class Changes:
    """What differs between the present and what a store explains; nothing is written.

    ``codes``, ``contexts``: digest → its parts; ``context``: the present one's digest, as units record it.
    """

    def __init__(
        self, codes: Mapping[str, Mapping[str, str]], contexts: Mapping[str, Mapping[str, str]], context: str
    ) -> None:
        self.codes, self.contexts, self.context = codes, contexts, context
        self.differences = functools.cache(self._differences)

    @classmethod
    def since(cls, store: ResultStore, context: Described, codes: Iterable[Described]) -> Changes:
        """Since the answers of ``store``; ``context`` and ``codes`` are the present's."""
        known_codes = store.described("code") | {code_key(code): code.parts for code in codes}
        known_contexts = store.described("context") | {context_key(context): context.parts}
        return cls(known_codes, known_contexts, context_key(context))

    def reason(self, trial: Trial, known: Iterable[Known], reuse: Reuse) -> str:
        """``known``: what the trial has; answers that it lacks and has otherwise are told from questions that are new."""
        key, known = reuse_key(trial.answer_id, reuse), list(known)
        if not known:
            return NEW_TRIAL
        otherwise = [one for one in known if one.same_questions and reuse_key(one.answer, reuse) != key]
        if not otherwise and any(reuse_key(one.answer, reuse) == key and one.context == self.context for one in known):
            return NEW_QUESTIONS
        code = trial.code.partition(".")[0]
        ways = {
            self.differences(code, one.answer.split(".")[1] if "." in one.answer else "", one.context)
            for one in otherwise or known
        }
        changed = min(ways, key=lambda names: (len(names), names))
        if not changed:
            return "other versions or device"
        more = f" and {len(changed) - MOST_NAMES} more" if len(changed) > MOST_NAMES else ""
        return f"{', '.join(changed[:MOST_NAMES])}{more} changed"

    def _differences(self, code: str, other_code: str, other_context: str) -> tuple[str, ...]:
        """The names of what changed from another code and context to the present ones."""
        names = _differing(self.codes.get(other_code), self.codes.get(code), code != other_code, "code")
        now, before = self.contexts.get(self.context), self.contexts.get(other_context)
        return names + _differing(before, now, other_context != self.context, "model")


def _differing(
    before: Mapping[str, str] | None, now: Mapping[str, str] | None, different: bool, whole: str
) -> tuple[str, ...]:
    """Which parts differ; ``whole``: what to say where the store cannot explain it."""
    if not different:
        return ()
    if before is None or now is None:
        return (whole,)
    return tuple(sorted(name for name in {*before, *now} if before.get(name) != now.get(name)))
