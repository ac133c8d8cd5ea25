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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nuwa import UNPRUNED
from nuwa.methods import RECIPES
from pipelines.scores.evidence import LIMIT_REACHED, Evidence, Resamples
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


@dataclass(frozen=True)
class Asked:
    """Questions of one family and the answers of some trials.

    ``right`` ``(questions, trials)``; ``limited``: of the same shape, null where it is not known; ``image_rows``
    ``(questions,)``: numbers of their images among the resampled ones.
    """

    family: str
    questions: pd.DataFrame
    right: np.ndarray
    limited: np.ndarray | None
    image_rows: np.ndarray


def group_table(
    evidence: Evidence, examples: pd.DataFrame, trials: pd.DataFrame, budget: float, predictions: pd.DataFrame
) -> pd.DataFrame:
    """A row a group and main trial at ``budget``, the unpruned one among them: see docs/results.md for the columns.

    ``examples``, ``predictions``: those that ``evidence`` is of.
    """
    main = main_trials(trials)
    there = np.array([budget in budgets for budgets in main["budgets"]])
    shown = main[there | (main["method"] == UNPRUNED)]
    numbers = [evidence.trial_ids.index(trial) for trial in shown["trial_id"]]
    rows: list[dict[str, Any]] = []

    for asked in _asked(evidence, examples, shown["trial_id"].tolist(), np.array(numbers), predictions):
        groups = [*_groups(asked), *_downsampling(asked, shown)]
        for benchmark, kind, names, masks in groups:
            rows += _rows(asked, evidence.scored[0].resamples, shown, (budget, benchmark, kind), names, masks)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def _asked(
    evidence: Evidence, examples: pd.DataFrame, ids: list[str], numbers: np.ndarray, predictions: pd.DataFrame
) -> Iterator[Asked]:
    """By family, the benchmarks whose answers a rule judges one below the other."""
    by_benchmark = dict(iter(examples.reset_index(drop=True).groupby("benchmark", sort=True)))
    limits = _limits(predictions, ids)
    for family in dict.fromkeys(part.benchmark.family for part in evidence.scored):
        parts = [
            part for part in evidence.scored if part.benchmark.family == family and part.benchmark.right in part.columns
        ]
        if not parts:
            continue
        questions = pd.concat([by_benchmark[part.name] for part in parts], ignore_index=True)
        right = [
            part.values[:, part.columns.index(part.benchmark.right)][part.taken[:, numbers]] >= 0.5 for part in parts
        ]
        limited = None if limits is None else limits.reindex(questions["example_id"]).to_numpy(bool)
        rows = np.concatenate([part.image_rows for part in parts])
        yield Asked(family, questions, np.concatenate(right), limited, rows)


def _limits(predictions: pd.DataFrame, ids: list[str]) -> pd.DataFrame | None:
    """Which answers ran into their limit, a row an example; null where that is not known of all, or none did."""
    if LIMIT_REACHED not in predictions:
        return None
    known = predictions[predictions["trial_id"].isin(ids)]
    if known[LIMIT_REACHED].isna().any() or not known[LIMIT_REACHED].any():
        return None
    known = known.astype({"trial_id": str, "example_id": str})
    return known.pivot(index="example_id", columns="trial_id", values=LIMIT_REACHED)[ids]


Group = tuple[str, str, list[str], np.ndarray]  # benchmark or nothing, kind, names, masks (groups, questions[, trials])


def _groups(asked: Asked) -> Iterator[Group]:
    """What follows from questions alone, and the limit; kinds of one group say nothing and are left out."""
    truths = [json.loads(truth) for truth in asked.questions["truth"]]
    codings = {
        "size": _sizes(truths),
        "place": _places(truths),
        "expression": _expressions(asked.questions["question"], truths),
        "question": _beginnings(asked.questions["question"], truths),
        "answer": _lengths(truths),
    }
    for kind, (codes, names) in codings.items():
        yield from _several("", kind, names, codes)
    for benchmark, of_it in asked.questions.groupby("benchmark", sort=True):
        names = sorted(set(of_it["category"]) - {""})
        place = {name: code for code, name in enumerate(names)}
        here = (asked.questions["benchmark"] == benchmark).to_numpy()
        codes = np.array([place.get(name, -1) for name in asked.questions["category"]])
        yield from _several(str(benchmark), "category", names, np.where(here, codes, -1))
    if asked.limited is not None:
        yield "", "limit", ["ended before", "ran into it"], np.stack([~asked.limited, asked.limited])


def _several(benchmark: str, kind: str, names: list[str], codes: np.ndarray) -> Iterator[Group]:
    """``codes``: each question's group, below zero for none."""
    used = [code for code in range(len(names)) if (codes == code).any()]
    if len(used) > 1:
        yield benchmark, kind, [names[code] for code in used], np.stack([codes == code for code in used])


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


def _downsampling(asked: Asked, shown: pd.DataFrame) -> Iterator[Group]:
    """Hard and easy questions, where downsampling ran at this budget as it is meant."""
    own = (shown["method"] == DOWNSAMPLE) & (shown["position"] == RECIPES[DOWNSAMPLE].position)
    if not own.any():
        return
    whole = asked.right[:, np.flatnonzero(shown["method"] == UNPRUNED)[0]]
    small = asked.right[:, np.flatnonzero(own)[0]]
    masks = np.stack([whole & ~small, whole & small])
    if masks.any(axis=1).all():
        yield "", "downsampling", [HARD, EASY], masks


def _rows(
    asked: Asked,
    resamples: Resamples,
    shown: pd.DataFrame,
    about: tuple[float, str, str],
    names: list[str],
    masks: np.ndarray,
) -> Iterator[dict[str, Any]]:
    budget, benchmark, kind = about
    for place, (name, mask) in enumerate(zip(names, masks, strict=True)):
        for row, (score, low, high, count, images) in enumerate(_shares(asked, resamples, mask)):
            if count:
                yield {
                    "trial_id": shown["trial_id"].iloc[row], "budget": budget, "family": asked.family,
                    "benchmark": benchmark, "kind": kind, "group": name, "place": place, "score": score, "low": low,
                    "high": high, "n": count, "images": images,
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
