"""Grades from outside: a file of JSON lines that a person or a judge model has filled in.

One line an answer: ``{"example_id": ..., "prediction": ..., "grade": 0..1}``. Equal answers to a question have one grade,
whoever gave them, so a file serves any number of trials. :func:`ungraded` says what is still to be graded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from nuwa.errors import UserError
from pipelines.data.datasets import parse_name

Grades = Mapping[tuple[str, str], float]
REMEDY = "`python -m stages.grades` writes what is to be graded"


class GradesError(UserError, ValueError):
    """A file of grades that cannot be used, or answers that lack one."""


def read_grades(path: Path) -> dict[tuple[str, str], float]:
    """``(example id, answer)`` → grade. Lines whose grade is null are not graded yet.

    Raises:
        GradesError: no such file, a line that is no JSON object with the three keys, a grade outside 0..1, or two grades
            of one answer that differ.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise GradesError(f"evaluate.grades = {path}: cannot be read ({error.strerror}); {REMEDY}") from None

    grades: dict[tuple[str, str], float] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key, grade = (str(row["example_id"]), str(row["prediction"])), row["grade"]
        except (ValueError, KeyError, TypeError):
            raise GradesError(
                f"{path}: line {number} should be a JSON object with example_id, prediction and grade; {REMEDY}"
            ) from None

        if grade is None:
            continue
        if isinstance(grade, bool) or not isinstance(grade, int | float) or not 0 <= grade <= 1:
            raise GradesError(f"{path}: line {number}: grade {grade!r} must be a number from 0 to 1, or null")
        if grades.setdefault(key, float(grade)) != grade:
            raise GradesError(f"{path}: line {number}: {key[0]} has two grades for one answer; keep one of them")
    return grades


def ungraded(examples: pd.DataFrame, predictions: pd.DataFrame, grades: Grades) -> Iterator[dict[str, Any]]:
    """A line for every distinct answer that needs a grade and has none, with what a judge reads.

    ``examples``, ``predictions``: as :func:`pipelines.scores.evidence.evaluate` takes them.
    """
    answers = predictions[["example_id", "prediction"]].astype(str).drop_duplicates()
    by_example = answers.groupby("example_id", sort=False)["prediction"].agg(sorted).to_dict()

    for row in examples.itertuples():
        benchmark = parse_name(row.benchmark)
        if benchmark.graded is None:
            continue
        truth = json.loads(row.truth)
        for prediction in by_example.get(row.example_id, ()):
            if benchmark.graded(prediction, truth) and (row.example_id, prediction) not in grades:
                yield {
                    "example_id": row.example_id,
                    "benchmark": row.benchmark,
                    "question": row.question,
                    **({"options": truth["options"]} if "options" in truth else {}),
                    "answer": truth.get("details") or truth["answer"],
                    "prediction": prediction,
                    "grade": None,
                }
