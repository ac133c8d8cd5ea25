"""Where it breaks: shares of right answers by what was asked, of the trials at one budget.

A question belongs to a group of every kind that applies to it:

* ``size``: thirds of the boxes by their share of the image's area, of all boxes that were asked for;
* ``place``: where the box's middle lies, of the nine cells of a three by three grid;
* ``expression``: a relation to something else, a place in the picture, or what the thing itself is like;
* ``question``: its first two words, the most frequent ones by themselves;
* ``answer``: how many words the expected answer has;
* ``category``: the benchmark's own;
* ``limit``: whether the trial's answer ran into its limit;
* ``downsampling``: VTC-Bench's (arXiv:2510.07143) groups: right unpruned, and wrong (``hard``) or right (``easy``) after
  downsampling to the same budget. Questions that are wrong unpruned belong to neither, and what is hard changes with the
  budget, so methods compare within one only.

An answer is right where the benchmark's own 0/1 score says so (:attr:`nuwa.benchmarks.Benchmark.right`); benchmarks that
only a judge scores take no part. Questions of one image are not independent: intervals come from the same resamples of
images as all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nuwa import UNPRUNED
from nuwa.methods import RECIPES
from pipelines.scores.evidence import LIMIT_REACHED, Evidence, Resamples, ScoredBenchmark
from pipelines.scores.sampled import Sampled
from pipelines.scores.summary import main_trials

DOWNSAMPLE = "downsample"
HARD, EASY = "hard", "easy"
THIRDS = ("smallest third", "middle third", "largest third")
PLACES = ("corner", "edge", "centre")  # by how many of its two coordinates lie in the middle third
RELATIONS = frozenset((
    "above", "across", "against", "around", "at", "behind", "below", "beneath", "beside", "between", "by", "closest",
    "from", "holding", "in", "inside", "near", "nearest", "next", "of", "on", "onto", "opposite", "over", "riding", "to",
    "touching", "toward", "towards", "under", "underneath", "wearing", "with", "within",
))  # fmt: skip
WHERE = frozenset((
    "back", "bottom", "center", "centre", "corner", "edge", "far", "farthest", "first", "front", "furthest", "last",
    "left", "leftmost", "lower", "lowest", "middle", "right", "rightmost", "second", "third", "top", "topmost", "upper",
    "uppermost",
))  # fmt: skip
EXPRESSIONS = ("what it is like", "where it is", "relation to another")
MOST_QUESTIONS, FEWEST = 5, 20  # kinds of question shown by themselves; questions that make one
COLUMNS = {
    "trial_id": "str",
    "budget": "float64",
    "family": "str",
    "benchmark": "str",
    "kind": "str",
    "group": "str",
    "place": "int32",
    "score": "float64",
    "low": "float64",
    "high": "float64",
    "n": "int32",
    "images": "int32",
}
ORDER = ["at_family", "at_group", "place", "at_trial"]  # of its rows
ROW = [*dict.fromkeys((*COLUMNS, *ORDER))]
LIMITS = ["ended before", "ran into it"]
LIMIT_PLACE = 10**6  # among the groups: behind every benchmark's categories


@dataclass(frozen=True)
class Asked:
    """The answers of some trials to the questions of one family.

    ``right`` ``(questions, trials)``; ``image_rows`` ``(questions,)``: numbers of their images among the resampled ones.
    """

    family: str
    right: np.ndarray
    image_rows: np.ndarray


def group_table(
    evidence: Evidence, examples: pd.DataFrame, trials: pd.DataFrame, budget: float, predictions: pd.DataFrame
) -> pd.DataFrame:
    """A row a group and main trial at ``budget``, the unpruned one among them: see docs/results.md for the columns.

    ``examples``, ``predictions``: those that ``evidence`` is of.
    """
    groups = Groups(evidence, examples, trials, budget)
    known = predictions[predictions["trial_id"].isin(groups.shown["trial_id"])]
    # Of a few alone it says nothing, and where none ran into a limit there is nothing to tell apart.
    told = LIMIT_REACHED in known and known[LIMIT_REACHED].notna().all() and known[LIMIT_REACHED].any()
    return in_order([groups.rows(evidence, known if told else None)])


def in_order(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows of :meth:`Groups.rows` as the one table that they make, whatever blocks of trials they come from."""
    rows = pd.concat([pd.DataFrame(columns=ROW), *(table for table in tables if len(table))])
    return rows.sort_values(ORDER, ignore_index=True).astype(COLUMNS)[list(COLUMNS)]


def shown_trials(trials: pd.DataFrame, budget: float) -> pd.DataFrame:
    """The main trials at ``budget``, and the unpruned one."""
    main = main_trials(trials)
    there = np.array([budget in budgets for budgets in main["budgets"]])
    return main[there | (main["method"] == UNPRUNED)]


def grouping_trials(trials: pd.DataFrame, budget: float) -> list[str]:
    """The trials whose answers decide groups: the unpruned one, and where it ran, downsampling as it is meant."""
    shown = shown_trials(trials, budget)
    own = (shown["method"] == DOWNSAMPLE) & (shown["position"] == RECIPES[DOWNSAMPLE].position)
    return [*shown.loc[shown["method"] == UNPRUNED, "trial_id"], *shown.loc[own, "trial_id"][:1]]


class Groups:
    """Questions by family and group; answers to them come a block of trials at a time.

    ``evidence``: of those trials at least whose answers decide groups (:func:`grouping_trials`).
    """

    def __init__(self, evidence: Evidence, examples: pd.DataFrame, trials: pd.DataFrame, budget: float) -> None:
        self.shown, self.budget = shown_trials(trials, budget).reset_index(drop=True), budget
        by_benchmark = dict(iter(examples.reset_index(drop=True).groupby("benchmark", sort=True)))
        deciding = [evidence.trial_ids.index(trial) for trial in grouping_trials(trials, budget)]
        self.families: list[tuple[str, pd.DataFrame, list[Group]]] = []

        for family in dict.fromkeys(part.benchmark.family for part in evidence.scored):
            if parts := _judged(evidence, family):
                questions = pd.concat([by_benchmark[part.name] for part in parts], ignore_index=True)
                groups = [*_groups(questions), *_downsampling(_right(parts, deciding))]
                self.families.append((family, questions, groups))

    def rows(self, evidence: Evidence, limits: pd.DataFrame | None) -> pd.DataFrame:
        """Of the shown trials among those of ``evidence``; ``limits``: predictions that hold theirs, where they are known.

        Columns beside the table's own tell where its rows belong.
        """
        here = self.shown["trial_id"].isin(evidence.trial_ids)
        shown = self.shown[here]
        ids = shown["trial_id"].tolist()
        numbers = [evidence.trial_ids.index(trial) for trial in ids]
        reached = _limits(limits, ids) if limits is not None and ids else None
        rows: list[dict[str, Any]] = []

        for place, (family, questions, groups) in enumerate(self.families if ids else []):
            parts = _judged(evidence, family)
            image_rows = np.concatenate([part.image_rows for part in parts])
            asked = Asked(family, _right(parts, numbers), image_rows)
            if reached is not None:
                limited = reached.reindex(questions["example_id"]).to_numpy(bool)
                groups = [*groups, (LIMIT_PLACE, "", "limit", LIMITS, np.stack([~limited, limited]))]
            for at, benchmark, kind, names, masks in groups:
                about: dict[str, Any] = {"at_family": place, "at_group": at, "budget": self.budget}
                about |= {"benchmark": benchmark, "kind": kind}
                rows += _rows(asked, evidence.scored[0].resamples, shown, about, names, masks)
        return pd.DataFrame(rows, columns=ROW)


def _judged(evidence: Evidence, family: str) -> list[ScoredBenchmark]:
    """The benchmarks of a family whose answers a rule judges."""
    return [
        part for part in evidence.scored if part.benchmark.family == family and part.benchmark.right in part.columns
    ]


def _right(parts: Sequence[ScoredBenchmark], numbers: list[int]) -> np.ndarray:
    """``(questions, trials)`` of some trials, the benchmarks one below the other."""
    columns = [part.values[:, part.columns.index(part.benchmark.right)][part.taken[:, numbers]] for part in parts]
    return np.concatenate(columns) >= 0.5


def _limits(predictions: pd.DataFrame, ids: list[str]) -> pd.DataFrame:
    """Which answers ran into their limit, a row an example."""
    known = predictions.loc[predictions["trial_id"].isin(ids), ["example_id", "trial_id", LIMIT_REACHED]]
    known = known.astype({"trial_id": str, "example_id": str})
    return known.pivot(index="example_id", columns="trial_id", values=LIMIT_REACHED)[ids]


# Its place among the groups, benchmark or nothing, kind, names, masks (groups, questions[, trials]).
Group = tuple[int, str, str, list[str], np.ndarray]


def _groups(questions: pd.DataFrame) -> Iterator[Group]:
    """What follows from questions alone; kinds of one group say nothing and are left out."""
    truths = [json.loads(truth) for truth in questions["truth"]]
    codings = [
        ("", "size", *_sizes(truths)),
        ("", "place", *_places(truths)),
        ("", "expression", *_expressions(questions["question"], truths)),
        ("", "question", *_beginnings(questions["question"], truths)),
        ("", "answer", *_lengths(truths)),
    ]
    for benchmark, of_it in questions.groupby("benchmark", sort=True):
        names = sorted(set(of_it["category"]) - {""})
        place = {name: code for code, name in enumerate(names)}
        here = (questions["benchmark"] == benchmark).to_numpy()
        codes = np.array([place.get(name, -1) for name in questions["category"]])
        codings.append((str(benchmark), "category", np.where(here, codes, -1), names))

    for at, (benchmark, kind, codes, names) in enumerate(codings):
        used = [code for code in range(len(names)) if (codes == code).any()]
        if len(used) > 1:
            yield at, benchmark, kind, [names[code] for code in used], np.stack([codes == code for code in used])


def _boxes(truths: list[dict]) -> np.ndarray:
    """``(questions, 4)`` in shares of the image, NaN where none is asked for."""
    return np.array([truth.get("box") or [np.nan] * 4 for truth in truths], float).reshape(-1, 4)


def _sizes(truths: list[dict]) -> tuple[np.ndarray, list[str]]:
    left, top, right, bottom = _boxes(truths).T
    areas = (right - left) * (bottom - top)
    known = np.isfinite(areas)
    if not known.any():
        return np.full(len(truths), -1), []
    first, second = np.quantile(areas[known], [1 / 3, 2 / 3])
    codes = np.where(known, (areas > first).astype(int) + (areas > second), -1)
    bounds = (f"up to {100 * first:.1f} %", f"up to {100 * second:.1f} %", "above")
    return codes, [f"{name}, {bound}" for name, bound in zip(THIRDS, bounds, strict=True)]


def _places(truths: list[dict]) -> tuple[np.ndarray, list[str]]:
    left, top, right, bottom = _boxes(truths).T
    middles = np.stack([(left + right) / 2, (top + bottom) / 2])
    inner = ((middles >= 1 / 3) & (middles <= 2 / 3)).sum(axis=0)
    return np.where(np.isfinite(middles).all(axis=0), inner, -1), list(PLACES)


def _expressions(questions: pd.Series, truths: list[dict]) -> tuple[np.ndarray, list[str]]:
    """A relation holds between two things, so words follow its word that say more than where in the picture."""

    def code(text: str) -> int:
        words = text.lower().strip("?. ").split()
        rest = [words[at + 1 :] for at, word in enumerate(words) if word in RELATIONS]
        if any(set(behind) - WHERE - RELATIONS - {"the", "a", "side", "hand", "picture", "image"} for behind in rest):
            return 2
        return int(bool(WHERE & set(words)))

    codes = [code(text) if "box" in truth else -1 for text, truth in zip(questions, truths, strict=True)]
    return np.array(codes, int), list(EXPRESSIONS)


def _beginnings(questions: pd.Series, truths: list[dict]) -> tuple[np.ndarray, list[str]]:
    begins = [" ".join(text.lower().split()[:2]) for text in questions]
    asked = pd.Series([start for start, truth in zip(begins, truths, strict=True) if "box" not in truth], dtype=object)
    counts = asked.value_counts()
    ordered = sorted(counts.index, key=lambda start: (-counts[start], start))
    names = [start for start in ordered[:MOST_QUESTIONS] if counts[start] >= FEWEST]
    place = {name: code for code, name in enumerate(names)}
    codes = [
        -1 if "box" in truth else place.get(start, len(names)) for start, truth in zip(begins, truths, strict=True)
    ]
    return np.array(codes, int), [*names, "others"]


def _lengths(truths: list[dict]) -> tuple[np.ndarray, list[str]]:
    """Of the answer that most annotators gave, where the truth is words."""

    def words(truth: dict) -> int:
        known = truth.get("answers") or [truth.get("answer")]
        texts = [str(answer) for answer in known if answer is not None]
        return 0 if "box" in truth or not texts else len(max(texts, key=texts.count).split())

    counts = np.array([words(truth) for truth in truths], int)
    return np.minimum(counts, 3) - 1, ["one word", "two words", "three or more"]


def _downsampling(right: np.ndarray) -> Iterator[Group]:
    """Hard and easy questions. ``right`` ``(questions, 1 or 2)``: unpruned, and where it ran, after downsampling."""
    if right.shape[1] < 2:
        return
    whole, small = right.T
    masks = np.stack([whole & ~small, whole & small])
    if masks.any(axis=1).all():
        yield LIMIT_PLACE + 1, "", "downsampling", [HARD, EASY], masks


def _rows(
    asked: Asked,
    resamples: Resamples,
    shown: pd.DataFrame,
    about: Mapping[str, Any],
    names: list[str],
    masks: np.ndarray,
) -> Iterator[dict[str, Any]]:
    """``about``: what the rows have in common; ``shown``: the trials, by their places among all that are shown."""
    for place, (name, mask) in enumerate(zip(names, masks, strict=True)):
        for row, (score, low, high, count, images) in enumerate(_shares(asked, resamples, mask)):
            if count:
                yield {
                    **about, "trial_id": shown["trial_id"].iloc[row], "at_trial": shown.index[row],
                    "family": asked.family, "group": name, "place": place, "score": score, "low": low, "high": high,
                    "n": count, "images": images,
                }  # fmt: skip


def _shares(asked: Asked, resamples: Resamples, mask: np.ndarray) -> Iterator[tuple[float, float, float, int, int]]:
    """Of every trial the share of right answers among questions of ``mask`` ``(questions,)`` or ``(questions, trials)``,
    its interval, how many questions these are, and of how many images."""
    trials = asked.right.shape[1]
    shared = mask.ndim == 1
    for chosen in [np.arange(trials)] if shared else [np.array([trial]) for trial in range(trials)]:
        rows = np.flatnonzero(mask if shared else mask[:, chosen[0]])
        if len(rows) == 0:
            yield from [(np.nan, np.nan, np.nan, 0, 0)] * len(chosen)
            continue
        share = _share(asked.right[np.ix_(rows, chosen)], asked.image_rows[rows], resamples)
        low, high = share.intervals()
        for at in range(len(chosen)):
            yield float(share.point[at]), float(low[at]), float(high[at]), len(rows), share.images


def _share(right: np.ndarray, image_rows: np.ndarray, resamples: Resamples) -> Sampled:
    """Of ``right`` ``(questions, trials)``; ``image_rows`` ``(questions,)``: numbers of their images."""
    present, place = np.unique(image_rows, return_inverse=True)
    sums = np.zeros((len(present), right.shape[1]))
    np.add.at(sums, place, right)
    count = np.bincount(place).astype(float)

    drawn = resamples.sums(sums.T[..., None], present)[..., 0]
    asked = resamples.sums(count[None, :, None], present)[..., 0]
    point = right.mean(axis=0)
    left_out = np.broadcast_to(point[:, None], (len(point), len(resamples.images))).copy()
    left_out[:, present] = _ratio(sums.sum(axis=0)[:, None] - sums.T, np.broadcast_to(len(right) - count, sums.T.shape))
    return Sampled(
        point,
        _ratio(drawn, np.broadcast_to(asked, drawn.shape)),
        left_out,
        np.isin(np.arange(len(resamples.images)), present),
        full=1.0,
    )


def _ratio(part: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.divide(part, of, out=np.full_like(part, np.nan), where=of > 0)
