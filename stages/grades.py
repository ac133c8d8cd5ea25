"""``python -m stages.grades``: what a judge is to grade, as JSON lines with an empty ``grade``: fill it in and name the
file as ``evaluate.grades``. Grades that the named file holds already are not asked again.

With the address of a server of OpenAI's chat protocol (``http://127.0.0.1:8000/v1``) and a model's name, that model fills
them in, ``OPENAI_API_KEY`` its key where it needs one. Without, nobody is asked. Grades in the file stay there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from pipelines.data.datasets import choose_questions
from pipelines.files.atomic import atomic_path
from pipelines.scores.grades import GradesError, read_grades, ungraded
from pipelines.scores.judge import judged
from pipelines.settings import Settings
from stages.entry import DATA, EXAMPLES, PREDICTIONS, run_stage

TO_GRADE = DATA / "to_grade.jsonl"


def grades(settings: Settings, judge: Sequence[str] = ()) -> None:
    """``judge``: address and model; empty: nobody is asked."""
    if len(judge) not in (0, 2):
        raise GradesError(f"a judge is an address and a model's name, found {' '.join(judge)!r}")
    plan, held = settings.sweep, settings.evaluate.grades
    questions = choose_questions(pd.read_parquet(EXAMPLES), plan.benchmarks, plan.images, plan.subset_seed)
    predictions = pq.read_table(PREDICTIONS, columns=["example_id", "prediction"]).to_pandas()

    # What this file holds already stays in it: it may be the work of hours.
    elsewhere = read_grades(Path(held)) if held and Path(held).resolve() != TO_GRADE.resolve() else {}
    here = read_grades(TO_GRADE) if TO_GRADE.exists() else {}
    lines = [
        line | {"grade": here.get((line["example_id"], line["prediction"]))}
        for line in ungraded(questions.examples, predictions, elsewhere)
    ]
    try:
        if judge:
            address, model = judge
            places = [place for place, line in enumerate(lines) if line["grade"] is None]
            answers = judged([lines[place] for place in places], address, model, os.environ.get("OPENAI_API_KEY"))
            for place, line in zip(places, answers, strict=True):
                lines[place] = line
    finally:
        with atomic_path(TO_GRADE) as path:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            path.write_text(text, encoding="utf-8")
        missing = sum(line["grade"] is None for line in lines)
        print(f"{TO_GRADE}: {missing:,} answers to grade, {len(elsewhere) + len(lines) - missing:,} graded already")


if __name__ == "__main__":
    run_stage(partial(grades, judge=sys.argv[1:]))
