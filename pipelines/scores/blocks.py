"""Scores, comparisons and groups of a sweep of any size: a block of its trials at a time, in one process or several.

What is held at once is a block's answers, what the questions come to, and the tables that are made. A trial that others
are compared with is scored before them; what it came to waits on disk, so that no answer is scored twice and every
process finds it. No number depends on blocks or processes.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nuwa import UNPRUNED
from pipelines.files.storage import room_in
from pipelines.scores import evidence as scores_of
from pipelines.scores import groups as groups_of
from pipelines.scores.comparisons import MEASURED, Pair, Retentions, pair_rows, with_means, with_verdicts
from pipelines.scores.evidence import (
    Evidence,
    Resamples,
    ScoredBenchmark,
    Scoring,
    headlines,
    limit_rows,
    score_block,
)
from pipelines.scores.grades import Grades
from pipelines.scores.groups import Groups, grouping_trials, shown_trials
from pipelines.scores.predictions import PredictionFile

BLOCK_ANSWERS = 2**17  # scored at once, unless one trial has more
REFERENCE_BYTES = 128 * 1024**2  # of what other trials came to, kept in memory by each process
WEIGHTS = "weights.npy"


@dataclass(frozen=True)
class Work:
    """``trials``, ``examples``: rows of their tables; ``pairs``, ``margin``: see :func:`compare`; ``budget``: of groups, null
    for none; ``grades``, ``resamples``, ``seed``: see :func:`evaluate`; ``plugins``: modules that every process needs."""

    trials: pd.DataFrame
    examples: pd.DataFrame
    predictions: Path
    resamples: int
    seed: int
    grades: Grades | None = None
    pairs: Sequence[Pair] = ()
    margin: float = 0.0
    budget: float | None = None
    plugins: Sequence[str] = ()

    @property
    def reference(self) -> str:
        """The unpruned trial."""
        return self.trials.loc[self.trials["method"] == UNPRUNED, "trial_id"].item()


@dataclass
class Tables:
    """See docs/results.md for their columns."""

    scores: pd.DataFrame
    comparisons: pd.DataFrame
    groups: pd.DataFrame


class Part(NamedTuple):
    """Rows of some trials, on their way into :class:`Tables`; null for none."""

    scores: pd.DataFrame | None = None
    comparisons: pd.DataFrame | None = None
    groups: pd.DataFrame | None = None


def score_sweep(work: Work, scratch: Path, processes: int = 1) -> Tables:
    """Score, compare and group. ``scratch``: a folder for what is under way; it is removed in the end.

    Raises what :func:`pipelines.scores.evidence.evaluate` raises, and :class:`StorageFull`.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with room_in(scratch):
            scratch.mkdir(parents=True)
            images = sorted(set(work.examples["image"]))
            np.save(scratch / WEIGHTS, Resamples.draw(images, work.resamples, work.seed).weights)
            parts = list(_parts(work, scratch, processes))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    of_pairs = [part.comparisons for part in parts if part.comparisons is not None]
    grouped = [part.groups for part in parts if part.groups is not None]
    return Tables(
        scores_of.in_order([part.scores for part in parts if part.scores is not None]),
        with_verdicts(pd.concat([pd.DataFrame(columns=MEASURED), *of_pairs], ignore_index=True)),
        groups_of.in_order(grouped),
    )


def _parts(work: Work, scratch: Path, processes: int) -> Iterator[Part]:
    """First those that others are compared with, then all others, then the former among each other."""
    ids = sorted(work.trials["trial_id"])
    held_against = {pair.reference for pair in work.pairs}
    first = [trial for trial in ids if trial in held_against]
    rest = [trial for trial in ids if trial not in held_against]
    size = max(1, BLOCK_ANSWERS // max(len(work.examples), 1))

    shown = [] if work.budget is None else shown_trials(work.trials, work.budget)["trial_id"].tolist()
    limits = Limits(*PredictionFile(work.predictions).limits(shown))
    with _workers(work, scratch, limits, processes) as run:
        yield from run([("keep", block) for block in _blocks(first, size)])
        yield from run([("score", block) for block in _blocks(rest, size)])
        yield from run([("compare", block) for block in _blocks(first, size)])


def _blocks(trials: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(trials), size):
        yield list(trials[start : start + size])


class Limits(NamedTuple):
    """Whether it is known of all answers if they ran into their limit; whether groups of the shown trials tell."""

    of_all: bool
    of_shown: bool


class BlockScorer:
    """Scores blocks of trials, in one process."""

    def __init__(self, work: Work, scratch: Path, limits: Limits) -> None:
        self.work, self.limits, self.kept = work, limits, References(scratch)
        self.file = PredictionFile(work.predictions)
        images = tuple(sorted(set(work.examples["image"])))
        # Mapped: processes of one machine share what they read of it.
        self.scoring = Scoring(
            work.examples, Resamples(images, np.asarray(np.load(scratch / WEIGHTS, mmap_mode="r"))), work.grades
        )
        self.whole = headlines(self._scored([work.reference]), 0)
        self.groups: Groups | None = None
        self.pairs = collections.defaultdict[str, list[Pair]](list)
        for pair in work.pairs:
            self.pairs[pair.trial].append(pair)

        if work.budget is not None:
            deciding = grouping_trials(work.trials, work.budget)
            evidence = Evidence(deciding, self._scored(deciding), self.whole, work.reference)
            self.groups = Groups(evidence, work.examples, work.trials, work.budget)

    def _scored(self, trials: list[str]) -> list[ScoredBenchmark]:
        return self.scoring.score(trials, self.file.of(trials))

    def run(self, action: str, block: list[str]) -> Part:
        """``score`` trials, ``keep`` what they came to for others beside it, or ``compare`` what was kept."""
        if action == "compare":
            return Part(comparisons=pd.concat([self._pairs([trial], self.kept.of(trial)) for trial in block]))
        predictions = self.file.of(block)
        evidence = Evidence(block, self.scoring.score(block, predictions), self.whole, self.work.reference)
        scores, pairs = [], []

        for some in evidence.blocks():
            tables, by_benchmark = score_block(evidence, some)
            scores += tables
            retentions = with_means(evidence, by_benchmark)
            if action == "keep":
                self.kept.keep(block[some], retentions)
            else:
                pairs.append(self._pairs(block[some], retentions))

        if self.limits.of_all:
            scores += limit_rows(block, self.scoring.examples, predictions)
        groups = self.groups.rows(evidence, predictions if self.limits.of_shown else None) if self.groups else None
        return Part(pd.concat(scores, ignore_index=True), pd.concat(pairs) if pairs else None, groups)

    def _pairs(self, trials: list[str], retentions: Retentions) -> pd.DataFrame:
        pairs = [pair for trial in trials for pair in self.pairs.get(trial, ())]
        return pd.DataFrame(pair_rows(trials, retentions, pairs, self.kept.of, self.work.margin), columns=MEASURED)


class References:
    """What trials came to that others are compared with: files in ``folder``, of which the last ones used stay in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: collections.OrderedDict[str, tuple[int, Retentions]] = collections.OrderedDict()

    def keep(self, trials: list[str], retentions: Retentions) -> None:
        for row, trial in enumerate(trials):
            own = {key: value.of(np.array([row])) for key, value in retentions.items()}
            (self.folder / f"{trial}.kept").write_bytes(pickle.dumps(own))

    def of(self, trial: str) -> Retentions:
        if trial not in self.held:
            content = (self.folder / f"{trial}.kept").read_bytes()
            self.held[trial] = len(content), pickle.loads(content)
        self.held.move_to_end(trial)
        while len(self.held) > 1 and sum(size for size, _ in self.held.values()) > REFERENCE_BYTES:
            self.held.popitem(last=False)
        return self.held[trial][1]


Runner = Callable[[Sequence[tuple[str, list[str]]]], Iterable[Part]]


@contextlib.contextmanager
def _workers(work: Work, scratch: Path, limits: Limits, processes: int) -> Iterator[Runner]:
    """Yield what does tasks, action and trials, and returns their parts in order."""
    if processes == 1:
        scorer = BlockScorer(work, scratch, limits)
        yield lambda tasks: (scorer.run(*task) for task in tasks)
        return
    # Copies of one that has imported what they need and started no threads: a copy of this one might stand still.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    with ProcessPoolExecutor(processes, context, _prepare, (work, scratch, limits)) as pool:
        yield lambda tasks: pool.map(_run, tasks)


_prepared: dict[str, Any] = {}


def _prepare(work: Work, scratch: Path, limits: Limits) -> None:
    """In a process of its own; what can go wrong waits for the first task, whose error is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if work.plugins:
        from nuwa.plugins import load_plugins  # and with it torch, which scoring does without

        load_plugins(work.plugins)
    _prepared["scorer"] = functools.cache(lambda: BlockScorer(work, scratch, limits))


def _end_with_parent() -> None:
    """Who was killed cannot tell others to end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(task: tuple[str, list[str]]) -> Part:
    return _prepared["scorer"]().run(*task)
