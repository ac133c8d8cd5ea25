"""Why answers are to come: what of a trial, its code, its model or its questions is new to the store."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.features.identity import Described
from pipelines.settings import Reuse
from pipelines.sweep.identity import code_key, context_key
from pipelines.sweep.results import ResultStore, StoredUnit, reuse_key
from pipelines.sweep.trials import Trial
from pipelines.sweep.units import WorkUnit

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
    lacking: Counter[str] = Counter()
    for unit in units:
        lacking.update({trial.trial_id: len(unit.examples) for trial in unit.trials})
    known = _known_answers(stored, set(lacking))
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


def _known_answers(stored: Sequence[StoredUnit], wanted: set[str]) -> dict[str, dict[tuple[str, str], None]]:
    """Trial id → the answer ids and contexts it has answers under."""
    context_of = functools.cache(lambda provenance: json.loads(provenance).get("context", "") if provenance else "")
    known: dict[str, dict[tuple[str, str], None]] = {}
    for unit in stored:
        context = context_of(unit.provenance)
        for answer in unit.trials:
            trial_id = answer.partition(".")[0]
            if trial_id in wanted:
                known.setdefault(trial_id, {})[answer, context] = None
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

    def reason(self, trial: Trial, known: Mapping[tuple[str, str], None], reuse: Reuse) -> str:
        key = reuse_key(trial.answer_id, reuse)
        if not known:
            return NEW_TRIAL
        if any(reuse_key(answer, reuse) == key and context == self.context for answer, context in known):
            return NEW_QUESTIONS
        code = trial.code.partition(".")[0]
        ways = {self.differences(code, answer.split(".")[1] if "." in answer else "", of) for answer, of in known}
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
