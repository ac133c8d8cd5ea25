"""Answers that ran into their limit: marked where they are made, counted by benchmark, unknown in stores of old."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nuwa.decoder.generation import Answer
from pipelines.scores.evidence import evaluate
from pipelines.sweep.answers import _prediction_table
from pipelines.sweep.results import COLUMNS, FOOTER, PARTS, SUFFIX, ResultStore, unit_name

TRIALS = pd.DataFrame({"trial_id": ["whole", "half"], "method": ["unpruned", "nuwa"]})
EXAMPLES = pd.DataFrame(
    {
        "example_id": ["gqa:1", "gqa:2", "textvqa:3"],
        "benchmark": ["gqa", "gqa", "textvqa"],
        "family": "vqa",
        "image": ["i", "j", "j"],
        "truth": [json.dumps({"answer": "dog"})] * 2 + [json.dumps({"answers": ["dog"] * 10})],
        "category": "",
    }
)


def predictions(**reached: list[bool | None]) -> pd.DataFrame:
    rows = [
        {"trial_id": trial, "example_id": example, "prediction": "dog", "limit_reached": cut}
        for trial, cuts in reached.items()
        for example, cut in zip(EXAMPLES["example_id"], cuts, strict=True)
    ]
    return pd.DataFrame(rows)


def test_the_share_is_told_by_trial_and_benchmark():
    scores = evaluate(TRIALS, EXAMPLES, predictions(whole=[False, True, False], half=[True, True, False]), 100, 0)
    rows = scores[scores["metric"] == "limit_reached"].set_index(["trial_id", "benchmark"])
    assert rows["score"].to_dict() == {
        ("half", "gqa"): 1.0,
        ("half", "textvqa"): 0.0,
        ("whole", "gqa"): 0.5,
        ("whole", "textvqa"): 0.0,
    }
    assert rows["n"].to_dict()["whole", "gqa"] == 2 and not rows["headline"].any()


@pytest.mark.parametrize("known", [False, True])
def test_nothing_else_changes_and_what_is_not_known_is_not_told(known):
    answers = predictions(whole=[False, None, False], half=[True, True, False])
    answers = answers if known else answers.drop(columns="limit_reached")
    scores = evaluate(TRIALS, EXAMPLES, answers, 100, 0)
    assert "limit_reached" not in set(scores["metric"])
    told = evaluate(TRIALS, EXAMPLES, predictions(whole=[False] * 3, half=[True] * 3), 100, 0)
    pd.testing.assert_frame_equal(told[told["metric"] != "limit_reached"].reset_index(drop=True), scores)


def test_an_answer_as_long_as_is_allowed_ran_into_its_limit():
    """The token that ends an answer is none of its tokens."""
    examples = [SimpleNamespace(example_id=f"e{limit}", max_new_tokens=limit) for limit in (3, 4, 5)]
    words = SimpleNamespace(decode=lambda tokens: " ".join(map(str, tokens)))
    table = _prediction_table("t", examples, [Answer((7, 8, 9, 9)[:length], (0,)) for length in (3, 3, 4)], words)
    assert table["limit_reached"].to_pylist() == [True, False, False]


def test_a_store_of_old_does_not_know(tmp_path):
    """A unit as it was written before the column existed."""
    old = pa.schema([field for field in COLUMNS if field.name != "limit_reached"])
    name = unit_name(["t"], ["d"])
    footer = dict(zip(FOOTER, (json.dumps(["t"]), json.dumps(["d"])), strict=True))
    values = {
        "predictions": {"trial_id": "t", "example_id": "e", "prediction": "dog", "kept_final": [1]},
        "kept": {"trial_id": "t", "image": "i", "indices": [1], "pillar": [True]},
        "timings": {"trial_id": "t", "unit": name, "questions": 1, "selection_s": 0.0, "trunk_s": 0.0, "answer_s": 0.0},
    }
    with pq.ParquetWriter(tmp_path / f"{name}{SUFFIX}", old.with_metadata(footer), write_page_checksum=True) as writer:
        for part in PARTS:
            writer.write_table(pa.Table.from_pylist([values[part]], writer.schema))

    store = ResultStore(tmp_path)
    assert [unit.unit for unit in store.done()] == [name]
    tables = store.read(name)
    assert tables["predictions"].to_pylist() == [values["predictions"] | {"limit_reached": None}]
    assert all(tables[part].schema.equals(PARTS[part]) for part in PARTS)
