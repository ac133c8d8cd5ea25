"""``python -m stages.grades``: what a judge is to grade, as JSON lines with an empty ``grade``: fill it in and name the
file as ``evaluate.grades``. Grades that the named file holds already are not asked again."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from pipelines.data.datasets import choose_questions
from pipelines.files.atomic import atomic_path
from pipelines.scores.grades import read_grades, ungraded
from pipelines.settings import Settings
from stages.entry import DATA, EXAMPLES, PREDICTIONS, run_stage

TO_GRADE = DATA / "to_grade.jsonl"


def grades(settings: Settings) -> None:
    plan, held = settings.sweep, settings.evaluate.grades
    questions = choose_questions(pd.read_parquet(EXAMPLES), plan.benchmarks, plan.images, plan.subset_seed)
    predictions = pq.read_table(PREDICTIONS, columns=["example_id", "prediction"]).to_pandas()
    known = read_grades(Path(held)) if held else {}
    lines = list(ungraded(questions.examples, predictions, known))
    with atomic_path(TO_GRADE) as path:
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{TO_GRADE}: {len(lines):,} answers to grade, {len(known):,} graded already")


if __name__ == "__main__":
    run_stage(grades)
