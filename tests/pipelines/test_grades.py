"""Grades from outside: what is to be graded, what a file may hold, and scores that rest on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nuwa.benchmarks import get_benchmark
from pipelines.scores.evidence import evaluate
from pipelines.scores.grades import GradesError, read_grades, ungraded

TRIALS = pd.DataFrame({"trial_id": ["whole", "half"], "method": ["unpruned", "nuwa"]})
OPTIONS = {"A": "red", "B": "blue"}
EXAMPLES = pd.DataFrame(
    {
        "example_id": ["mmvet:1", "mmvet:2", "mmbench:3"],
        "benchmark": ["mmvet:judged", "mmvet:judged", "mmbench:judged"],
        "family": "vqa",
        "image": ["i", "j", "j"],
        "question": ["Why?", "How?", "Which?"],
        "truth": [
            json.dumps({"question": "Why?", "answer": "so"}),
            json.dumps({"question": "How?", "answer": "thus"}),
            json.dumps({"answer": "A", "options": OPTIONS, "group": "3"}),
        ],
        "category": "",
    }
)
SAID = {
    ("whole", "mmvet:1"): "so",
    ("whole", "mmvet:2"): "",  # 0 without asking
    ("whole", "mmbench:3"): "A",  # read by the rules
    ("half", "mmvet:1"): "so",
    ("half", "mmvet:2"): "perhaps",
    ("half", "mmbench:3"): "the crimson one",
}
PREDICTIONS = pd.DataFrame(
    [(*key, text) for key, text in SAID.items()], columns=["trial_id", "example_id", "prediction"]
)
WANTED = {("mmvet:1", "so"), ("mmvet:2", "perhaps"), ("mmbench:3", "the crimson one")}


def test_equal_answers_are_graded_once_and_none_without_need():
    lines = list(ungraded(EXAMPLES, PREDICTIONS, {}))
    assert {(line["example_id"], line["prediction"]) for line in lines} == WANTED and len(lines) == 3
    first = next(line for line in lines if line["example_id"] == "mmvet:1")
    assert first == {
        "example_id": "mmvet:1",
        "benchmark": "mmvet:judged",
        "question": "Why?",
        "answer": "so",
        "prediction": "so",
        "grade": None,
    }
    known = {("mmvet:1", "so"): 1.0}
    assert len(list(ungraded(EXAMPLES, PREDICTIONS, known))) == 2


def test_scores_rest_on_grades(tmp_path):
    given = {"mmvet:1": 1, "mmvet:2": 0.25, "mmbench:3": 1}
    lines = [line | {"grade": given[line["example_id"]]} for line in ungraded(EXAMPLES, PREDICTIONS, {})]
    path = tmp_path / "grades.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    scores = evaluate(TRIALS, EXAMPLES, PREDICTIONS, 100, 0, read_grades(path))
    found = scores[scores["headline"]].set_index(["trial_id", "benchmark"])["score"]
    assert found["whole", "mmvet:judged"] == pytest.approx((1 + 0) / 2)
    assert found["half", "mmvet:judged"] == pytest.approx((1 + 0.25) / 2)
    assert found["whole", "mmbench:judged"] == found["half", "mmbench:judged"] == 1


def test_a_missing_grade_is_named_before_anything_is_scored():
    with pytest.raises(GradesError) as caught:
        evaluate(TRIALS, EXAMPLES, PREDICTIONS, 100, 0, {("mmvet:1", "so"): 1.0, ("mmbench:3", "the crimson one"): 0.0})
    assert str(caught.value) == (
        "evaluate.grades: mmvet:judged lacks 1 of 2 grades, first of mmvet:2; `python -m stages.grades` writes what is to "
        "be graded"
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{", "g.jsonl: line 1 should be a JSON object with example_id, prediction and grade; "),
        ('\n{"example_id": "a", "prediction": "b"}', "g.jsonl: line 2 should be a JSON object with "),
        (
            '{"example_id": "a", "prediction": "b", "grade": 7}',
            "g.jsonl: line 1: grade 7 must be a number from 0 to 1, or null",
        ),
        (
            '{"example_id": "a", "prediction": "b", "grade": true}',
            "g.jsonl: line 1: grade True must be a number from 0 to 1, or null",
        ),
        (
            '{"example_id": "a", "prediction": "b", "grade": 0}\n{"example_id": "a", "prediction": "b", "grade": 1}',
            "g.jsonl: line 2: a has two grades for one answer; keep one of them",
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_line(tmp_path, monkeypatch, lines, message):
    monkeypatch.chdir(tmp_path)
    Path("g.jsonl").write_text(lines)
    with pytest.raises(GradesError) as caught:
        read_grades(Path("g.jsonl"))
    assert str(caught.value).startswith(message)


def test_lines_without_a_grade_are_not_graded_yet(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text('{"example_id": "a", "prediction": "b", "grade": null}\n\n')
    assert read_grades(path) == {}
    with pytest.raises(GradesError, match=r"cannot be read \(No such file or directory\)"):
        read_grades(tmp_path / "none.jsonl")


def test_rules_alone_are_the_default():
    for name in ("mmbench", "hallusionbench", "mmvet"):
        assert get_benchmark(name).graded is None and get_benchmark(name, "judged").graded is not None
    truth = {"answer": "yes", "group": "f | q"}
    judged = get_benchmark("hallusionbench", "judged")
    assert [judged.score("Surely.", truth | {"grade": grade})["accuracy"] for grade in (0, 0.5, 1)] == [0, 1, 1]
    assert np.isclose(judged.score(" ", truth)["accuracy"], 0)
