"""Scores, comparisons and groups a block of trials at a time: the same numbers as all at once, in bounded memory."""

from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_group_scores import asked_world

from pipelines.scores import blocks, evidence
from pipelines.scores.blocks import Work, score_sweep
from pipelines.scores.comparisons import Pair, compare
from pipelines.scores.evidence import IncompleteTrials, evaluate, gather
from pipelines.scores.groups import group_table

BUDGET = 16.0


def written(predictions: pd.DataFrame, path, rows: int) -> None:
    pq.write_table(pa.Table.from_pandas(predictions, preserve_index=False), path, row_group_size=rows)


@pytest.fixture(scope="module")
def world():
    """Seven trials: those of tests/pipelines/test_group_scores.py and three that answer like them a question later."""
    trials, examples, predictions = asked_world()
    more = trials.iloc[1:].assign(trial_id=lambda rows: rows["trial_id"] + "2", method=["nuwa", "random", "nuwa"])
    later = predictions[predictions["trial_id"] != "whole"]
    later = later.assign(
        trial_id=later["trial_id"] + "2",
        prediction=later.groupby(["trial_id", later["example_id"].str.partition(":")[0]])["prediction"].transform(
            lambda said: np.roll(said, 1)
        ),
    )
    trials, predictions = pd.concat([trials, more]), pd.concat([predictions, later])
    return trials.reset_index(drop=True), examples, predictions.sort_values(["trial_id", "example_id"])


def work_of(world, path, predictions=None, rows=100) -> Work:
    trials, examples, usual = world
    written(usual if predictions is None else predictions, path, rows)
    ids = trials["trial_id"].tolist()
    pairs = [Pair("unpruned", BUDGET, trial, "whole") for trial in ids[1:]]
    pairs += [Pair("against", BUDGET, trial, "pruned") for trial in ids[1:] if trial != "pruned"]
    pairs += [Pair("position", BUDGET, "pruned2", "other")]
    return Work(trials, examples, path, 100, 0, None, pairs, 0.01, BUDGET)


def same(tables, others) -> None:
    for name, table in vars(tables).items():
        pd.testing.assert_frame_equal(table, vars(others)[name], check_exact=True)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """All trials in one block."""
    folder = tmp_path_factory.mktemp("whole")
    return score_sweep(work_of(world, folder / "predictions.parquet"), folder / "scratch")


def test_blocks_give_what_all_answers_at_once_give(world, whole, tmp_path):
    trials, examples, predictions = world
    work = work_of(world, tmp_path / "predictions.parquet")
    gathered = gather(trials, examples, predictions, 100, 0)
    same(
        whole,
        blocks.Tables(
            evaluate(trials, examples, predictions, 100, 0),
            compare(gathered, work.pairs, 0.01),
            group_table(gathered, examples, trials, BUDGET, predictions),
        ),
    )
    assert set(whole.groups["kind"]) >= {"limit", "downsampling", "size", "category"}
    assert "limit_reached" in set(whole.scores["metric"])


@pytest.mark.parametrize(("answers", "rows"), [(1, 7), (130, 100)])
def test_size_of_blocks_row_groups_and_the_order_of_rows_change_nothing(
    world, whole, tmp_path, monkeypatch, answers, rows
):
    """A trial or two at a time, from row groups that begin anywhere; and from rows in any order."""
    monkeypatch.setattr(blocks, "BLOCK_ANSWERS", answers)
    monkeypatch.setattr(blocks, "REFERENCE_BYTES", 1)
    for number, predictions in enumerate((world[2], world[2].sample(frac=1, random_state=0))):
        work = work_of(world, tmp_path / f"{number}.parquet", predictions, rows)
        same(score_sweep(work, tmp_path / "scratch"), whole)
        assert not (tmp_path / "scratch").exists()


def test_two_processes_give_the_same_bits(world, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ANSWERS", 1)
    work = work_of(world, tmp_path / "predictions.parquet")
    same(score_sweep(work, tmp_path / "scratch", processes=2), whole)


def test_a_trial_that_lacks_answers_is_refused(world, tmp_path):
    lacking = world[2][world[2]["trial_id"] != "other2"]
    with pytest.raises(IncompleteTrials) as raised:
        score_sweep(work_of(world, tmp_path / "predictions.parquet", lacking), tmp_path / "scratch")
    # As it is, and as another process would hand it on.
    for error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert str(error) == "trial other2 has no predictions; `dvc repro sweep` computes them"
    assert not (tmp_path / "scratch").exists()


def test_groups_and_pairs_are_made_only_where_they_are_asked_for(world, tmp_path):
    work = replace(work_of(world, tmp_path / "predictions.parquet"), pairs=(), budget=None)
    tables = score_sweep(work, tmp_path / "scratch")
    assert tables.comparisons.empty and tables.groups.empty and len(tables.scores)


def peak(world, copies: int, folder, monkeypatch) -> tuple[int, int]:
    """Most bytes that were held while long answers of ``copies`` trials were scored, and bytes of the table."""
    trials, examples, predictions = world
    monkeypatch.setattr(blocks, "BLOCK_ANSWERS", 120)
    monkeypatch.setattr(evidence, "KNOWN_BYTES", 100_000)
    said = predictions[predictions["trial_id"] == "pruned"]
    said = said.assign(prediction=said["prediction"] + " " * 8000)
    more = [said.assign(trial_id=f"t{n:03}", prediction=said["prediction"] + str(n)) for n in range(copies)]
    ids = [f"t{n:03}" for n in range(copies)]
    trials = pd.concat([trials.iloc[:1], *[trials.iloc[2:3].assign(trial_id=trial, budgets=[[]]) for trial in ids]])
    answers = pd.concat([predictions[predictions["trial_id"] == "whole"], *more])
    work = work_of((trials, examples, answers), folder / f"{copies}.parquet", rows=60)
    work = replace(work, pairs=(), budget=None)
    size = int(answers["prediction"].str.len().sum())
    del more, answers

    tracemalloc.start()
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        score_sweep(work, folder / "scratch")
        return tracemalloc.get_traced_memory()[1] + pool.max_memory(), size
    finally:
        pa.set_memory_pool(usual)
        tracemalloc.stop()


def test_memory_hardly_grows_with_the_answers(world, tmp_path, monkeypatch):
    few, small = peak(world, 5, tmp_path, monkeypatch)
    many, large = peak(world, 25, tmp_path, monkeypatch)
    assert large > 4 * small
    assert many - few < (large - small) / 10
