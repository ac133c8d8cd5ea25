"""Which answers changed between two trials, or between the trials that two runs share, and what that did to scores.

Compared are questions that both sides answered and that say the same on both: question and truth alike. Scores come from
the evaluation's own rules, differences and their intervals from resamples of the images that the compared questions are of
(:mod:`pipelines.scores.sampled`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nuwa.errors import UserError
from pipelines.scores.evidence import Evidence, ScoredBenchmark
from pipelines.scores.grades import Grades
from pipelines.scores.sampled import Sampled

COLUMNS = (
    "trial", "benchmark", "n", "changed", "lost", "gained", "score_a", "score_b", "difference", "low", "high", "p",
)  # fmt: skip


class NothingToCompare(UserError, ValueError):
    """The two sides share no trial or no question."""


@dataclass(frozen=True)
class Side:
    """``examples``: id, benchmark, family, image, question, truth and category; ``answers`` ``(examples, trials)``: texts
    by example id and trial id; ``name``: how it is spoken of."""

    name: str
    examples: pd.DataFrame
    answers: pd.DataFrame


@dataclass(frozen=True)
class Lost:
    """A question that A answers right and B wrong in ``trials`` trials, with both answers in the first of these."""

    example_id: str
    benchmark: str
    question: str
    truth: str
    trials: int
    first: str
    answer_a: str
    answer_b: str


@dataclass(frozen=True)
class Changes:
    """``table``: a row a trial and benchmark, ``COLUMNS``; ``questions``: compared; ``left_out``: those of both sides that
    do not say the same; ``lost``: all questions that any trial lost, the worst first."""

    table: pd.DataFrame
    questions: int
    left_out: int
    lost: list[Lost]


def changes(
    a: Side,
    b: Side,
    pairs: Sequence[tuple[str, str, str]],
    *,
    resamples: int = 1000,
    seed: int = 0,
    grades: Grades | None = None,
) -> Changes:
    """``pairs``: what each comparison is called, and the trial ids on both sides.

    The worst question is the one that most trials lost; among equals the one whose box lost most overlap, then the first
    id. Raises :class:`NothingToCompare`.
    """
    examples, left_out = _shared(a, b)
    if examples.empty or not pairs:
        what = "trial" if not pairs else "question that both answered and that says the same on both"
        raise NothingToCompare(f"{a.name} and {b.name} share no {what}")
    evidence = _evidence(examples, a, b, pairs, resamples, seed, grades)
    rows, lost = [], _Losses(examples.set_index("example_id"), a, b, pairs)
    itself = np.array([a is b and one == other for _, one, other in pairs])

    for part in evidence.scored:
        ids = examples.loc[examples["benchmark"] == part.name, "example_id"]
        texts = [side.answers.loc[ids, [pair[at] for pair in pairs]].to_numpy() for side, at in ((a, 1), (b, 2))]
        changed = (texts[0] != texts[1]).sum(axis=0)
        right, better, worse = _right(part, len(pairs)), np.zeros(len(pairs), int), np.zeros(len(pairs), int)
        if right is not None:
            better, worse = (right[1] & ~right[0]).sum(axis=0), (right[0] & ~right[1]).sum(axis=0)
            lost.add(ids.tolist(), right[0] & ~right[1], _overlap_lost(part, len(pairs)))
        rows += _rows(part, pairs, itself, changed, worse, better)
    order = {name: place for place, (name, _, _) in enumerate(pairs)}
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table = table.sort_values(
        ["trial", "benchmark"], key=lambda column: column.map(order) if column.name == "trial" else column
    )
    return Changes(table.reset_index(drop=True), len(examples), left_out, lost.ordered())


def _shared(a: Side, b: Side) -> tuple[pd.DataFrame, int]:
    """The examples that both answered and that are the same, and how many are not."""
    common = a.examples[a.examples["example_id"].isin(a.answers.index)].merge(
        b.examples.loc[b.examples["example_id"].isin(b.answers.index), ["example_id", "question", "truth", "image"]],
        on="example_id", suffixes=("", " of b"),
    )  # fmt: skip
    alike = np.ones(len(common), bool)
    for name in ("question", "truth", "image"):
        alike &= (common[name] == common[f"{name} of b"]).to_numpy()
    shared = common[alike].sort_values(["benchmark", "example_id"], ignore_index=True)
    return shared.drop(columns=[name for name in shared if name.endswith(" of b")]), int((~alike).sum())


def _evidence(
    examples: pd.DataFrame,
    a: Side,
    b: Side,
    pairs: Sequence[tuple[str, str, str]],
    resamples: int,
    seed: int,
    grades: Grades | None,
) -> Evidence:
    """Both sides' trials in one: first A's, then B's, in the order of ``pairs``."""
    columns = []
    # A pair's trials are known by side and place: both sides may call theirs alike.
    for side, at in ((a, 1), (b, 2)):
        for number, pair in enumerate(pairs):
            texts = side.answers.loc[examples["example_id"], pair[at]]
            if texts.isna().any():
                raise NothingToCompare(
                    f"trial {pair[at]} of {side.name} lacks {int(texts.isna().sum())} of {len(texts)} answers; "
                    "`dvc repro sweep` there computes them"
                )

            columns.append(
                pd.DataFrame({
                    "trial_id": f"{at}:{number}", "example_id": examples["example_id"], "prediction": texts.to_numpy(),
                })
            )  # fmt: skip

    predictions = pd.concat(columns, ignore_index=True).astype("category")
    names = [f"{at}:{number}" for at in (1, 2) for number in range(len(pairs))]
    return Evidence.of(names, names[0], examples, predictions, resamples=resamples, seed=seed, grades=grades)


def _right(part: ScoredBenchmark, pairs: int) -> np.ndarray | None:
    """``(2, questions, pairs)``: which answers are right; null where only a judge knows."""
    marks = _column(part, part.benchmark.right, pairs)
    return None if marks is None else marks >= 0.5


def _overlap_lost(part: ScoredBenchmark, pairs: int) -> np.ndarray:
    """``(questions, pairs)``: overlap with the true box, A's less B's; zero where there is no box."""
    overlap = _column(part, "iou", pairs)
    return np.zeros((part.examples, pairs)) if overlap is None else overlap[0] - overlap[1]


def _column(part: ScoredBenchmark, name: str, pairs: int) -> np.ndarray | None:
    if name not in part.columns:
        return None
    values = part.values[:, part.columns.index(name)][part.taken]
    return np.stack([values[:, :pairs], values[:, pairs:]])


def _rows(
    part: ScoredBenchmark,
    pairs: Sequence[tuple[str, str, str]],
    itself: np.ndarray,
    changed: np.ndarray,
    lost: np.ndarray,
    gained: np.ndarray,
) -> list[tuple]:
    """Headline scores, and the second less the first; of a trial compared with ``itself`` nothing is to be estimated.

    Two runs that answer alike on these questions may differ on others: their interval is no point.
    """
    count = len(pairs)
    # The part holds the first side of every pair, then the second of every pair.
    one, other = (part.metrics(np.arange(start, start + count))[part.benchmark.headline] for start in (0, count))
    difference: Sampled = other.minus(one, itself=itself)
    low, high = difference.intervals()
    p = difference.p_zero()
    return [
        (
            name, part.name, part.examples, int(changed[row]), int(lost[row]), int(gained[row]), one.point[row],
            other.point[row], difference.point[row], low[row], high[row], p[row],
        )
        for row, (name, _, _) in enumerate(pairs)
    ]  # fmt: skip


class _Losses:
    """Collects questions that trials lost."""

    def __init__(self, examples: pd.DataFrame, a: Side, b: Side, pairs: Sequence[tuple[str, str, str]]) -> None:
        self.examples, self.a, self.b, self.pairs = examples, a, b, pairs
        self.found: list[tuple[int, float, str, int]] = []  # trials, overlap, example, the first pair

    def add(self, ids: list[str], lost: np.ndarray, overlap: np.ndarray) -> None:
        for row in np.flatnonzero(lost.any(axis=1)):
            where = np.flatnonzero(lost[row])
            self.found.append((len(where), float(overlap[row, where].max()), ids[row], int(where[0])))

    def ordered(self) -> list[Lost]:
        worst = sorted(self.found, key=lambda found: (-found[0], -found[1], found[2]))
        return [self._lost(trials, example, first) for trials, _, example, first in worst]

    def _lost(self, trials: int, example_id: str, first: int) -> Lost:
        example, (name, in_a, in_b) = self.examples.loc[example_id], self.pairs[first]
        return Lost(
            example_id, example["benchmark"], example["question"], _told(example["truth"]), trials, name,
            str(self.a.answers.at[example_id, in_a]), str(self.b.answers.at[example_id, in_b]),
        )  # fmt: skip


def _told(truth: str) -> str:
    """The truth in few words."""
    known = json.loads(truth)
    if "box" in known:
        return "[" + ", ".join(f"{value:.2f}" for value in known["box"]) + "]"
    answers = [str(answer) for answer in known.get("answers") or [known.get("answer", "")]]
    return max(answers, key=answers.count)
