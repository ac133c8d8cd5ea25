"""Tables that were pulled → units of the result store, so that a clone computes nothing that its tables hold.

``sweep.json`` says of the tables beside it what they are: their digests, the context of their answers, the answer ids
that each trial's rows were stored under, one digest of all questions, and where the answers came from. Rows are taken
only while all of that agrees with the files and with what is asked now, and they are stored as what they are: under the
code and the versions that made them, which need not be the present ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.settings import Reuse
from pipelines.sweep.collection import CHUNK_ROWS, Origins
from pipelines.sweep.provenance import merged
from pipelines.sweep.results import PARTS, ResultStore, StoredUnit, reuse_key, unit_name
from pipelines.sweep.trials import Trial
from pipelines.sweep.units import UnitExample

SEVERAL = "mixed"  # stands for the versions of a trial whose answers are of several


def table_facts(
    origins: Origins, context: str, examples: Sequence[UnitExample], tables: Mapping[str, Path]
) -> dict[str, Any]:
    """What ``sweep.json`` says of its ``tables`` (part → file), for :meth:`PulledTables.of`."""
    return {
        "context": context,
        "questions": questions_digest(examples),
        "provenance": merged(origins.provenance),
        "code": {trial_id: _one_code(answers) for trial_id, answers in sorted(origins.answers.items())},
        "files": {part: _file_digest(tables[part]) for part in ("predictions", "kept")},
    }


def questions_digest(examples: Iterable[UnitExample]) -> str:
    """One digest of all that decides answers beside trials, whatever the order."""
    return hashlib.sha256("".join(sorted(example.digest for example in examples)).encode()).hexdigest()


def _one_code(answers: Collection[str]) -> str:
    """The code and versions of a trial's answer ids; of those that differ in their versions, no version."""
    codes = {answer.partition(".")[2] for answer in answers}
    if len(codes) == 1:
        return codes.pop()
    (code,) = {one.partition(".")[0] for one in codes}
    return f"{code}.{SEVERAL}"


def _file_digest(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@dataclass(frozen=True)
class PulledTables:
    """Tables whose rows are answers to ``examples``; ``answers``: trial id → answer id."""

    answers: Mapping[str, str]
    examples: tuple[UnitExample, ...]
    provenance: str
    predictions: Path
    kept: Path

    @classmethod
    def of(
        cls,
        facts: Path,
        tables: Mapping[str, Path],
        context: str,
        questions: pd.DataFrame,
        read: Callable[[pd.DataFrame], list[UnitExample]],
    ) -> PulledTables | None:
        """The tables that the file ``facts`` describes; null where they are not there, not whole, or of another context.

        ``questions``: all that are prepared. ``read``: their examples, in the present context.
        """
        try:
            known = json.loads(facts.read_text())["tables"]
            if known["context"] != context or any(
                _file_digest(tables[part]) != held for part, held in known["files"].items()
            ):
                return None
        except (FileNotFoundError, KeyError, ValueError):
            return None

        answered = pq.read_table(tables["predictions"], columns=["example_id"])["example_id"].unique().to_pylist()
        examples = read(questions[questions["example_id"].isin(answered)].reset_index(drop=True))
        if questions_digest(examples) != known["questions"]:
            return None

        answers = {trial_id: f"{trial_id}.{code}" for trial_id, code in known["code"].items()}
        provenance = json.dumps(known["provenance"] | {"context": context, "tables": True}, sort_keys=True)
        return cls(answers, tuple(examples), provenance, tables["predictions"], tables["kept"])

    def as_stored(self) -> StoredUnit:
        """What a store would hold of them."""
        trials = tuple(sorted(self.answers.values()))
        digests = tuple(example.digest for example in self.examples)
        return StoredUnit(unit_name(trials, digests), trials, digests, self.provenance)

    def lacking(
        self, stored: Sequence[StoredUnit], trials: Sequence[Trial], examples: Sequence[UnitExample], reuse: Reuse
    ) -> list[str]:
        """Which of ``trials`` (with their code) lack answers to ``examples`` that these tables hold, beside ``stored``."""
        usable = {
            trial.trial_id
            for trial in trials
            if (answer := self.answers.get(trial.trial_id)) is not None
            and reuse_key(answer, reuse) == reuse_key(trial.answer_id, reuse)
        }
        wanted = {example.digest for example in examples} & {example.digest for example in self.examples}
        known = {reuse_key(trial.answer_id, reuse): trial.trial_id for trial in trials}
        held: dict[str, set[str]] = {trial_id: set() for trial_id in usable}
        for unit in stored if wanted and usable else ():
            here = wanted.intersection(unit.examples)
            for trial_id in (known.get(reuse_key(answer, reuse)) for answer in unit.trials):
                if trial_id in held:
                    held[trial_id] |= here
        return sorted(trial_id for trial_id, digests in held.items() if len(digests) < len(wanted))

    def refill(self, store: ResultStore, trials: Collection[str]) -> int:
        """Store the rows of ``trials`` (ids); returns how many answers that are."""
        wanted = sorted(set(trials) & self.answers.keys())
        digests = tuple(example.digest for example in self.examples)
        step, count = max(1, CHUNK_ROWS // max(len(digests), 1)), 0
        for start in range(0, len(wanted), step):
            chunk = wanted[start : start + step]
            answers = tuple(self.answers[trial_id] for trial_id in chunk)
            tables = self._rows(chunk)
            if len(tables["predictions"]) != len(chunk) * len(digests):
                continue  # a trial without all of its answers
            store.write(StoredUnit(unit_name(answers, digests), answers, digests, self.provenance), tables)
            count += len(tables["predictions"])
        return count

    def _rows(self, trials: Sequence[str]) -> dict[str, pa.Table]:
        ours = pc.field("trial_id").isin(pa.array(trials, pa.string()))
        tables = {
            part: pq.read_table(path, filters=ours)
            for part, path in (("predictions", self.predictions), ("kept", self.kept))
        }
        # How long an answer took is known where it was made.
        timings = [{"trial_id": trial_id, "unit": "tables", "questions": len(self.examples)} for trial_id in trials]
        return tables | {"timings": pa.Table.from_pylist(timings, PARTS["timings"])}
