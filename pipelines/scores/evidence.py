"""Predictions → scores, retention against the unpruned model, and how sure one can be of them.

Intervals are bootstraps over *images* (:mod:`pipelines.scores.sampled`): questions of one image are not independent.
Every trial is resampled with the same draws, so a retention is a paired ratio. An aggregate interval (mean retention of
a family) comes from the same draws again.

Answers repeat between trials, so each distinct (example, answer) is scored once; trials are taken in blocks, so memory
follows the table, not the number of trials.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from nuwa import UNPRUNED
from nuwa.benchmarks import Benchmark, Sums
from nuwa.errors import UserError
from pipelines.data.datasets import parse_name
from pipelines.scores.grades import REMEDY, Grades, GradesError
from pipelines.scores.sampled import Sampled

LIMIT_REACHED = "limit_reached"  # column of predictions, metric of scores
BLOCK_BYTES = 64 * 1024**2  # what the resamples of one block of trials may take
IMAGE_BLOCK = 4096  # images whose draws are multiplied at once
KNOWN_BYTES = 32 * 1024**2  # of a benchmark's scored answers that are remembered beyond a block of trials
SCORED_BYTES = 400  # about what one takes beside its text
COLUMNS = {
    "trial_id": "str",
    "benchmark": "str",
    "family": "str",
    "metric": "str",
    "score": "float64",
    "low": "float64",
    "high": "float64",
    "n": "int32",
    "headline": "bool",
    "retention": "float64",
    "retention_low": "float64",
    "retention_high": "float64",
}


class Unscorable(UserError, ValueError):
    """Answers that cannot be scored as they are; the line says what to change or run again."""


class IncompleteTrials(UserError, ValueError):
    """Predictions are missing for some examples; scoring them would compare unequal question sets."""


@dataclass(frozen=True)
class Resamples:
    """``weights`` ``(resamples, images)``: how often each draw takes each image."""

    images: tuple[str, ...]
    weights: np.ndarray

    @classmethod
    def draw(cls, images: list[str], count: int, seed: int) -> Resamples:
        rng = np.random.default_rng(seed)
        share = np.full(len(images), 1 / len(images))
        weights = np.empty((count, len(images)), np.uint16)
        for row in weights:
            row[:] = rng.multinomial(len(images), share)
        return cls(tuple(images), weights)

    def sums(self, per_image: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Weighted sums ``(trials, resamples, columns)`` of ``per_image`` ``(trials, present images, columns)``.

        ``present``: numbers of these images. One trial's sums do not depend on which others are asked for.
        """
        total = np.zeros((len(per_image), len(self.weights), per_image.shape[2]))
        for start in range(0, len(present), IMAGE_BLOCK):
            block = slice(start, start + IMAGE_BLOCK)
            total += np.matmul(self.weights[:, present[block]].astype(np.float64), per_image[:, block])
        return total


def _by_image(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums ``(trials, present images, columns)`` of ``values`` ``(trials, examples, columns)``, and the images' numbers.

    ``rows`` ``(examples,)``: each example's image.
    """
    order = np.argsort(rows, kind="stable")
    present, starts = np.unique(rows[order], return_index=True)
    return np.add.reduceat(values[:, order], starts, axis=1), present


@dataclass(frozen=True)
class ScoredBenchmark:
    """Every trial's answers to one benchmark, scored.

    ``values`` ``(distinct answers, columns)``; ``taken`` ``(examples, trials)``: the row of each answer in it.
    """

    benchmark: Benchmark
    name: str
    columns: tuple[str, ...]
    values: np.ndarray
    taken: np.ndarray
    labels: pd.DataFrame  # what aggregates read beside numbers: category and group
    image_rows: np.ndarray
    resamples: Resamples

    @property
    def examples(self) -> int:
        return len(self.taken)

    def metrics(self, trials: slice | np.ndarray) -> dict[str, Sampled]:
        """Every metric of some trials, given by their numbers."""
        # Laid out by trial whatever the trials are, so that no sum depends on which others are asked for.
        values, columns = np.ascontiguousarray(self.values[self.taken[:, trials].T]), self.columns
        if self.benchmark.summands is not None:
            further = self.benchmark.summands(self._table(values))
            values = np.concatenate([values, further.to_numpy(np.float64).reshape(*values.shape[:2], -1)], axis=2)
            columns = (*columns, *further.columns)
        per_image, present = _by_image(values, self.image_rows)
        questions, _ = _by_image(np.ones((1, self.examples, 1)), self.image_rows)

        whole = values.sum(axis=1)
        points = self._named(whole, columns, np.full(len(whole), float(self.examples)))
        draws = self._counted(
            self.resamples.sums(per_image, present), columns, self.resamples.sums(questions, present)[..., 0]
        )
        rest = self._counted(whole[:, None] - per_image, columns, self.examples - questions[..., 0])
        of, full = np.isin(np.arange(len(self.resamples.images)), present), None if self.benchmark.points else 1.0
        metrics = {}
        for name, point in points.items():
            left_out = np.broadcast_to(point[:, None], (len(point), len(self.resamples.images))).copy()
            left_out[:, present] = rest[name]
            metrics[name] = Sampled(point, draws[name], left_out, of, full)

        if (headline := self.benchmark.headline) in metrics:  # the one that is compared
            answers = np.zeros_like(metrics[headline].left_out)
            # Weights, so that columns which change to either side do not look alike.
            answers[:, present] = (per_image * np.random.default_rng(0).random(len(columns))).sum(axis=2)
            step = None if full is None else questions.max() / self.examples
            metrics[headline] = replace(metrics[headline], answers=answers, step=step)
        return metrics

    def _counted(self, sums: np.ndarray, columns: tuple[str, ...], count: np.ndarray) -> Sums:
        """Metrics of ``sums`` ``(trials, samples, columns)``; a sample without any question has none."""
        count = np.broadcast_to(count, sums.shape[:2])
        named = self._named(sums, columns, count)
        return {name: np.where(count > 0, values, np.nan) for name, values in named.items()}

    def _named(self, sums: np.ndarray, columns: tuple[str, ...], count: np.ndarray) -> Sums:
        return self.benchmark.metrics(dict(zip(columns, np.moveaxis(sums, -1, 0), strict=True)) | {"n": count})

    def _table(self, values: np.ndarray) -> pd.DataFrame:
        """``values`` ``(trials, examples, columns)`` with categories and groups, trials one below the other."""
        trials = len(values)
        table = pd.DataFrame(values.reshape(-1, len(self.columns)), columns=list(self.columns))
        table["category"] = np.tile(self.labels["category"].to_numpy(object), trials)
        groups = self.labels["group"].tolist()
        table["group"] = [f"{group} #{trial}" for trial in range(trials) for group in groups]
        return table


class BenchmarkScorer:
    """Scores answers to the questions of one benchmark.

    A distinct answer is scored once in a block of trials, and not again in the next ones while it is remembered.
    """

    def __init__(self, name: str, examples: pd.DataFrame, resamples: Resamples, grades: Grades) -> None:
        self.benchmark, self.name, self.resamples, self.grades = parse_name(name), name, resamples, grades
        self.ids = examples["example_id"].tolist()
        self.truths = [json.loads(truth) for truth in examples["truth"]]
        groups = [str(truth.get("group", f"row {number}")) for number, truth in enumerate(self.truths)]
        self.labels = pd.DataFrame({"category": examples["category"].tolist(), "group": groups})
        place = {image: row for row, image in enumerate(resamples.images)}
        self.image_rows = np.array([place[image] for image in examples["image"]])
        self.columns: tuple[str, ...] = ()
        self.known: dict[tuple[int, str], tuple[float, ...]] = {}
        self.known_bytes = 0

    def score(self, answers: np.ndarray, texts: np.ndarray) -> ScoredBenchmark:
        """``answers`` ``(examples, trials)``: place of each answer in ``texts``.

        Raises :class:`pipelines.scores.grades.GradesError` where answers need grades and there are none of them.
        """
        keys = answers.astype(np.int64) + np.arange(len(self.ids))[:, None] * len(texts)
        distinct, taken = np.unique(keys, return_inverse=True)
        pairs = [(example, texts[text]) for example, text in (divmod(key, len(texts)) for key in distinct.tolist())]
        self._check_grades(pairs)
        found = [self._scored(*pair) for pair in pairs]

        # Answers that few trials give would fill any memory: past a bound only those of the last block are remembered.
        if self.known_bytes > KNOWN_BYTES:
            self.known = dict(zip(pairs, found, strict=True))
            self.known_bytes = sum(SCORED_BYTES + len(text) for _, text in pairs)
        values = np.array(found, float).reshape(len(found), len(self.columns))
        shaped = taken.reshape(answers.shape).astype(np.int32)
        return ScoredBenchmark(
            self.benchmark, self.name, self.columns, values, shaped, self.labels, self.image_rows, self.resamples
        )

    def _scored(self, example: int, text: str) -> tuple[float, ...]:
        known = self.known.get((example, text))
        if known is not None:
            return known
        truth = self.truths[example]
        if self._needs_grade(example, text):
            truth = truth | {"grade": self.grades[self.ids[example], text]}
        scores = self.benchmark.score(text, truth)
        self.columns = self.columns or tuple(scores)
        known = self.known[example, text] = tuple(scores[column] for column in self.columns)
        self.known_bytes += SCORED_BYTES + len(text)
        return known

    def _needs_grade(self, example: int, text: str) -> bool:
        return self.benchmark.graded is not None and self.benchmark.graded(text, self.truths[example])

    def _check_grades(self, pairs: list[tuple[int, str]]) -> None:
        """Raises :class:`GradesError` where one of ``pairs`` of example and text needs a grade and has none."""
        if self.benchmark.graded is None:
            return
        wanted = [(self.ids[example], text) for example, text in pairs if self._needs_grade(example, text)]
        lacking = [example_id for example_id, text in wanted if (example_id, text) not in self.grades]
        if lacking:
            raise GradesError(
                f"evaluate.grades: {self.name} lacks {len(lacking):,} of {len(wanted):,} grades, first of {lacking[0]}; "
                f"{REMEDY}"
            )


class Scoring:
    """The questions of a sweep and what answers to them are scored with: the same for every block of its trials."""

    def __init__(self, examples: pd.DataFrame, resamples: Resamples, grades: Grades | None = None) -> None:
        self.examples, self.resamples = examples.reset_index(drop=True), resamples
        self.scorers = [
            (of_it.index.to_numpy(), BenchmarkScorer(str(name), of_it, resamples, grades or {}))
            for name, of_it in self.examples.groupby("benchmark", sort=True)
        ]

    def score(self, trial_ids: list[str], predictions: pd.DataFrame) -> list[ScoredBenchmark]:
        """Some trials' ``predictions``, among which others' rows do no harm; see :func:`evaluate` for what is raised."""
        answers, texts = _answer_matrix(trial_ids, self.examples, predictions)
        return [scorer.score(answers[rows], texts) for rows, scorer in self.scorers]


def headlines(scored: list[ScoredBenchmark], trial: int) -> dict[str, Sampled]:
    """Benchmark → headline of the trial of that number; raises :class:`Unscorable` where there is none."""
    whole = {}
    for part in scored:
        metrics, headline = part.metrics(slice(trial, trial + 1)), part.benchmark.headline
        if headline not in metrics:
            raise Unscorable(f"{part.name} has no {headline!r} without a judge; leave it out of sweep.benchmarks")
        whole[part.name] = metrics[headline]
    return whole


@dataclass(frozen=True)
class Evidence:
    """The scored answers of some trials; ``whole``: the headline per benchmark of ``reference``, the unpruned trial."""

    trial_ids: list[str]
    scored: list[ScoredBenchmark]
    whole: Mapping[str, Sampled]
    reference: str

    @classmethod
    def of(
        cls,
        trial_ids: list[str],
        reference: str,
        examples: pd.DataFrame,
        predictions: pd.DataFrame,
        *,
        resamples: int,
        seed: int,
        grades: Grades | None = None,
    ) -> Evidence:
        """Score ``predictions``; ``reference``: the unpruned trial. See :func:`evaluate` for what is raised."""
        draws = Resamples.draw(sorted(set(examples["image"])), resamples, seed)
        scored = Scoring(examples, draws, grades).score(trial_ids, predictions)
        return cls(trial_ids, scored, headlines(scored, trial_ids.index(reference)), reference)

    def blocks(self) -> Iterator[slice]:
        """The trials in blocks whose resamples fit into ``BLOCK_BYTES``."""
        block = self.block_size
        for start in range(0, len(self.trial_ids), block):
            yield slice(start, start + block)

    @property
    def block_size(self) -> int:
        widest = max(
            (len(part.columns) + 1) * max(*part.resamples.weights.shape, part.examples) for part in self.scored
        )
        return max(1, BLOCK_BYTES // (8 * widest))

    def retention(self, part: ScoredBenchmark, metrics: Mapping[str, Sampled], trials: slice | np.ndarray) -> Sampled:
        """Headline of ``trials``, which ``metrics`` are of, over the unpruned one's."""
        itself = np.array(self.trial_ids, object)[trials] == self.reference
        return metrics[part.benchmark.headline].share_of(self.whole[part.name], itself)

    def retentions(self, trials: slice | np.ndarray) -> dict[str, Sampled]:
        """Retention of some trials by benchmark."""
        return {part.name: self.retention(part, part.metrics(trials), trials) for part in self.scored}

    def family_means(self, retentions: Mapping[str, Sampled]) -> dict[str, Sampled]:
        """Unweighted mean retention over each family's benchmarks, as the papers average."""
        families: dict[str, list[Sampled]] = {}
        for part in self.scored:
            families.setdefault(part.benchmark.family, []).append(retentions[part.name])
        return {family: Sampled.mean(members) for family, members in families.items()}

    def families(self) -> dict[str, Sampled]:
        """Family → mean retention of all trials."""
        pieces: dict[str, list[Sampled]] = {}
        for block in self.blocks():
            for family, piece in self.family_means(self.retentions(block)).items():
                pieces.setdefault(family, []).append(piece)
        return {family: Sampled.one_below_the_other(parts) for family, parts in pieces.items()}


def evaluate(
    trials: pd.DataFrame,
    examples: pd.DataFrame,
    predictions: pd.DataFrame,
    resamples: int,
    seed: int,
    grades: Grades | None = None,
) -> pd.DataFrame:
    """The tidy table of scores: see docs/results.md for its columns.

    ``predictions``: ``trial_id``, ``example_id`` and ``prediction``, plain or categorical, in any order. ``grades``: of
    answers that need one. With ``limit_reached``, whether each ran into its limit, the table says how many did.
    Raises :class:`IncompleteTrials` when a trial lacks an answer to one of ``examples``, and ``ValueError`` when it
    has two.
    """
    return score_table(gather(trials, examples, predictions, resamples, seed, grades), examples, predictions)


def gather(
    trials: pd.DataFrame,
    examples: pd.DataFrame,
    predictions: pd.DataFrame,
    resamples: int,
    seed: int,
    grades: Grades | None = None,
) -> Evidence:
    """What scores and comparisons are made of; arguments and errors as of :func:`evaluate`."""
    reference = trials.loc[trials["method"] == UNPRUNED, "trial_id"].item()
    trial_ids = trials["trial_id"].tolist()
    return Evidence.of(trial_ids, reference, examples, predictions, resamples=resamples, seed=seed, grades=grades)


def score_table(evidence: Evidence, examples: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`evaluate`, from evidence of these examples and predictions."""
    tables = [table for block in evidence.blocks() for table in score_block(evidence, block)[0]]
    if LIMIT_REACHED in predictions and not predictions[LIMIT_REACHED].isna().any():
        tables += limit_rows(evidence.trial_ids, examples, predictions)
    return in_order(tables)


def in_order(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Rows of scores as the one table that they make, whatever blocks they come from."""
    scores = pd.concat(tables, ignore_index=True).sort_values(
        ["trial_id", "benchmark", "family", "metric"], ignore_index=True
    )
    return scores.astype(COLUMNS)[list(COLUMNS)]


def score_block(evidence: Evidence, block: slice) -> tuple[list[pd.DataFrame], dict[str, Sampled]]:
    """Rows of the trials of ``block``: every metric of every benchmark, then each family's mean retention.

    And their retentions by benchmark.
    """
    trials, tables = evidence.trial_ids[block], []
    retentions: dict[str, Sampled] = {}
    questions: dict[str, int] = {}
    for part in evidence.scored:
        benchmark = part.benchmark
        metrics = part.metrics(block)
        kept = retentions[part.name] = evidence.retention(part, metrics, block)
        kept_low, kept_high = kept.intervals()
        questions[benchmark.family] = questions.get(benchmark.family, 0) + part.examples

        for metric, values in metrics.items():
            low, high = values.intervals()
            # Retention is of the headline alone: shares of other metrics would invite a choice among them.
            headline = metric == benchmark.headline
            rows: dict[str, Any] = {
                "trial_id": trials,
                "metric": metric,
                "score": values.point,
                "low": low,
                "high": high,
            }
            rows |= {"benchmark": part.name, "family": benchmark.family, "n": part.examples, "headline": headline}
            rows |= {"retention": kept.point if headline else np.nan}
            rows |= {"retention_low": kept_low if headline else np.nan}
            rows |= {"retention_high": kept_high if headline else np.nan}
            tables.append(pd.DataFrame(rows))
    for family, mean in evidence.family_means(retentions).items():
        tables.append(_family_rows(trials, family, questions[family], mean))
    return tables, retentions


def limit_rows(trials: list[str], examples: pd.DataFrame, predictions: pd.DataFrame) -> list[pd.DataFrame]:
    """The share of answers that ran into their limit, by trial and benchmark; it must be known of all: a harness allows
    more than a model needs, so what runs into it is a model that talks on."""
    known = predictions.set_index("example_id")[[LIMIT_REACHED, "trial_id"]]
    known.index = known.index.astype(str)
    joined = known.join(examples.set_index("example_id")[["benchmark", "family"]], how="inner")
    joined = joined[joined["trial_id"].isin(trials)].astype({LIMIT_REACHED: float, "trial_id": str})
    rows = joined.groupby(["trial_id", "benchmark", "family"], as_index=False)[LIMIT_REACHED].agg(["mean", "size"])
    rows = rows.rename(columns={"mean": "score", "size": "n"})
    empty = dict.fromkeys(("low", "high", "retention", "retention_low", "retention_high"), np.nan)
    return [rows.assign(metric=LIMIT_REACHED, headline=False, **empty)]


def _family_rows(trials: list[str], family: str, questions: int, mean: Sampled) -> pd.DataFrame:
    low, high = mean.intervals()
    rows: dict[str, Any] = {"trial_id": trials, "benchmark": "mean", "family": family, "metric": "retention"}
    rows |= {"n": questions, "score": mean.point, "low": low, "high": high, "headline": True}
    return pd.DataFrame(rows | {"retention": mean.point, "retention_low": low, "retention_high": high})


def _answer_matrix(
    trial_ids: list[str], examples: pd.DataFrame, predictions: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray]:
    """``(examples, trials)`` places in the texts, and the distinct texts."""
    trial, known_trials = _codes(predictions["trial_id"], trial_ids)
    example, _ = _codes(predictions["example_id"], examples["example_id"].tolist())
    text = predictions["prediction"].astype("category").cat
    given = text.codes.to_numpy()
    rows = np.flatnonzero((trial >= 0) & (example >= 0) & (given >= 0))
    answers = np.full((len(examples), len(trial_ids)), -1, np.int32)
    answers[example[rows], trial[rows]] = given[rows]
    lacking = (answers < 0).sum(axis=0)

    for number in np.flatnonzero(lacking):
        name = trial_ids[number]
        if not known_trials[number]:
            raise IncompleteTrials(f"trial {name} has no predictions; `dvc repro sweep` computes them")
        raise IncompleteTrials(
            f"trial {name} lacks {lacking[number]} of {len(examples)} predictions; `dvc repro sweep` computes them"
        )
    if len(rows) > answers.size:
        raise Unscorable(f"predictions hold {len(rows) - answers.size} answers twice; `dvc repro -f sweep` mends it")
    return answers, text.categories.to_numpy(object)


def _codes(column: pd.Series, wanted: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Each value's place in ``wanted`` (-1: not there), and which of ``wanted`` occur."""
    values = column.astype("category").cat
    place = pd.Index(values.categories).map({name: number for number, name in enumerate(wanted)})
    table = np.append(pd.array(place, "Int64").to_numpy(np.int64, na_value=-1), -1)
    codes = table[values.codes.to_numpy()]
    occur = np.zeros(len(wanted), bool)
    occur[np.unique(codes[codes >= 0])] = True
    return codes, occur
