"""Groups of questions against loops over answers."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from pipelines.scores.evidence import gather
from pipelines.scores.groups import COLUMNS, group_table

ASKED = {  # expression → group
    "the blue 3": "what it is like",
    "the digit on the top": "where it is",
    "left of the picture": "where it is",
    "the 5 below the 7": "relation to another",
    "person to the right of the dog": "relation to another",
}
TRIALS = {"whole": "unpruned", "small": "downsample", "pruned": "nuwa", "other": "random"}


def asked_world() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Trials, examples and predictions: twenty images with a box and two questions each; who is right is drawn, more often on large boxes."""
    rng = np.random.default_rng(3)
    examples, predictions = [], []
    for number in range(20):
        side = 0.1 + 0.03 * (number % 10)
        corner = [round(x, 3) for x in rng.uniform(0, 1 - side, 2)]
        box = [*corner, corner[0] + side, corner[1] + side]
        rows = [
            ("refcoco", "grounding", list(ASKED)[number % 5], {"box": box}, ""),
            ("gqa", "vqa", "what color is it?", {"answer": ["red", "light red"][number % 2]}, ""),
            ("pope", "vqa", "is there a cat?", {"answer": "yes"}, ["random", "popular"][number % 2]),
        ]
        for benchmark, family, question, truth, category in rows:
            example = f"{benchmark}:{number}"
            examples.append({
                "example_id": example, "benchmark": benchmark, "family": family, "image": f"i{number}",
                "question": question, "truth": json.dumps(truth), "category": category,
            })  # fmt: skip
            for trial in TRIALS:
                chance = {"whole": 0.95, "small": 0.4}.get(trial, 0.3 + side)
                right = json.dumps(box) if "box" in truth else truth["answer"]
                predictions.append({
                    "trial_id": trial, "example_id": example,
                    "prediction": right if rng.random() < chance else "no",
                    "limit_reached": trial == "other" and number < 5,
                })  # fmt: skip
    trials = pd.DataFrame({
        "trial_id": list(TRIALS), "method": list(TRIALS.values()), "position": ["pesp", "perc", "pesp", "perc"],
        "grids": [["main"]] * 4, "budgets": [[], [16.0], [16.0], [16.0]],
    })  # fmt: skip
    return trials, pd.DataFrame(examples), pd.DataFrame(predictions)


@pytest.fixture(scope="module")
def run():
    return asked_world()


@pytest.fixture(scope="module")
def table(run):
    trials, examples, predictions = run
    evidence = gather(trials, examples, predictions, 200, 0)
    return group_table(evidence, examples, trials, 16.0, predictions)


def right(run, trial, example):
    predictions = run[2]
    given = predictions[(predictions["trial_id"] == trial) & (predictions["example_id"] == example["example_id"])]
    truth = json.loads(example["truth"])
    return given["prediction"].item() == (json.dumps(truth["box"]) if "box" in truth else truth["answer"])


def expected_groups(run):
    """Kind and group of every question of boxes, one by one."""
    boxes = run[1][run[1]["family"] == "grounding"]
    areas = {}
    for _, example in boxes.iterrows():
        left, top, edge, bottom = json.loads(example["truth"])["box"]
        areas[example["example_id"]] = (edge - left) * (bottom - top)
    first, second = np.quantile(list(areas.values()), [1 / 3, 2 / 3])
    for _, example in boxes.iterrows():
        left, top, edge, bottom = json.loads(example["truth"])["box"]
        area = areas[example["example_id"]]
        size = "smallest" if area <= first else "middle" if area <= second else "largest"
        inner = sum(1 / 3 <= middle <= 2 / 3 for middle in ((left + edge) / 2, (top + bottom) / 2))
        yield example, {
            "size": size, "place": ["corner", "edge", "centre"][inner], "expression": ASKED[example["question"]],
        }  # fmt: skip


def test_groups_of_boxes_count_what_a_loop_counts(run, table):
    counted: dict[tuple, list] = {}
    for example, groups in expected_groups(run):
        for trial in TRIALS:
            for kind, group in groups.items():
                counted.setdefault((trial, kind, group), []).append(right(run, trial, example))
    kinds = table[table["kind"].isin(("size", "place", "expression"))]
    found = {
        (row.trial_id, row.kind, row.group.split(" third")[0]): (round(row.score, 9), row.n, row.images)
        for row in kinds.itertuples()
    }
    assert found == {key: (round(np.mean(marks), 9), len(marks), len(marks)) for key, marks in counted.items()}
    assert (table["low"] <= table["score"]).all() and (table["score"] <= table["high"]).all()
    assert list(table.columns) == list(COLUMNS)


def test_hard_questions_are_right_unpruned_and_wrong_after_downsampling(run, table):
    hard = table[(table["kind"] == "downsampling") & (table["family"] == "vqa")].set_index(["group", "trial_id"])
    questions = [example for _, example in run[1].iterrows() if example["family"] == "vqa"]
    marks = {trial: [right(run, trial, example) for example in questions] for trial in TRIALS}
    for group, wanted in (("hard", False), ("easy", True)):
        among = [at for at in range(len(questions)) if marks["whole"][at] and marks["small"][at] == wanted]
        for trial in TRIALS:
            assert hard.loc[(group, trial), "n"] == len(among)
            assert hard.loc[(group, trial), "score"] == pytest.approx(np.mean([marks[trial][at] for at in among]))
    assert hard.loc[("hard", "whole"), "score"] == 1 and hard.loc[("hard", "small"), "score"] == 0


def test_questions_answers_and_categories_are_told_apart(table):
    vqa = table[(table["family"] == "vqa") & (table["trial_id"] == "pruned")]
    counts = {(row.kind, row.benchmark, row.group): row.n for row in vqa.itertuples()}
    assert counts["question", "", "is there"] == counts["question", "", "what color"] == 20
    assert (counts["answer", "", "one word"], counts["answer", "", "two words"]) == (30, 10)
    assert counts["category", "pope", "popular"] == counts["category", "pope", "random"] == 10
    assert not [kind for kind, benchmark, _ in counts if kind == "category" and benchmark == "gqa"]  # it has none


def test_an_answers_limit_is_the_trials_own_and_so_is_its_interval(run, table):
    limit = table[(table["kind"] == "limit") & (table["family"] == "grounding")]
    assert {(row.trial_id, row.group): row.n for row in limit.itertuples()} == {
        **{(trial, "ended before"): 20 for trial in ("whole", "small", "pruned")},
        ("other", "ended before"): 15,
        ("other", "ran into it"): 5,
    }


def test_without_downsampling_or_a_known_limit_those_groups_are_left_out(run):
    trials, examples, predictions = run
    trials = trials[trials["method"] != "downsample"]
    predictions = predictions.drop(columns="limit_reached")
    evidence = gather(trials, examples, predictions, 50, 0)
    found = group_table(evidence, examples, trials, 16.0, predictions)
    assert set(found["kind"]) == {"size", "place", "expression", "question", "answer", "category"}
