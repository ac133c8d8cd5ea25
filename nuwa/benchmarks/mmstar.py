"""MMStar: four options in the question's text; the average is over eighteen fields of questions, not over questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from nuwa.benchmarks.choices import OPTION_LETTER, choice_scores, harness_letter, stated_letter
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, Sums, TableSize, Truth, mean, ratio
from nuwa.benchmarks.records import IMAGE, columns, image_bytes, one_of, text

SCHEMA = columns(
    index=pa.int64(),
    question=pa.string(),
    image=IMAGE,
    answer=pa.string(),
    category=pa.string(),
    l2_category=pa.string(),
    meta_info=pa.struct([("source", pa.string()), ("split", pa.string()), ("image_path", pa.string())]),
)
LETTERS = ("A", "B", "C", "D")
REQUEST = " Please answer yes or no."
RIGHT, COUNT = "right of ", "questions of "


def _read(row: dict[str, Any]) -> Iterator[Example]:
    yield Example(
        example_id=f"mmstar:{text(row, 'index')}",
        question=text(row, "question").strip(),
        truth={"answer": one_of(row, "answer", LETTERS)},
        category=f"{text(row, 'category').strip()}: {text(row, 'l2_category').strip()}",
        image=image_bytes(row["image"], "image"),
    )


def _prompt(example: Example) -> str:
    return example.question.replace(REQUEST, "") + OPTION_LETTER.removesuffix(".")


def opening_letter(answer: str) -> str | None:
    """lmms-eval 0.3.4: the first character, or the one behind ``(``, ``option`` or ``the answer is``; any case, and of
    any word."""
    said = answer.lower().replace("\n", " ").strip()
    places = [said[:1], said[1:2] if said.startswith("(") else ""]
    for opening in ("option ", "the answer is "):
        places.append(said[len(opening) :][:1] if said.startswith(opening) else "")
    return next((place.upper() for place in places if place.upper() in LETTERS and len(place) == 1), None)


def _score(letter: Callable[[str], str | None], prediction: str, truth: Truth) -> Scores:
    return choice_scores(letter(prediction), truth["answer"])


def summands(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every finer field its right answers and its questions."""
    columns: dict[str, pd.Series] = {}
    for field in sorted(set(rows["category"])):
        inside = rows["category"] == field
        columns |= {RIGHT + field: rows["accuracy"].where(inside, 0), COUNT + field: inside.astype(float)}
    return pd.DataFrame(columns)


def metrics(sums: Sums) -> Sums:
    """``average``: the mean of the fields' accuracies, of those that hold a question; ``accuracy`` over questions."""
    fields = [name.removeprefix(COUNT) for name in sums if name.startswith(COUNT)]
    accuracies = [ratio(sums[RIGHT + field], sums[COUNT + field], 0) for field in fields]
    held = sum(((np.asarray(sums[COUNT + field]) > 0).astype(float) for field in fields), np.zeros_like(sums["n"]))
    return {
        "average": ratio(sum(accuracies, np.zeros_like(sums["n"])), held, np.nan),
        "accuracy": mean(sums, "accuracy"),
        "parse_failure": mean(sums, "parse_failure"),
    }


VARIANTS = (
    Benchmark(
        name="mmstar",
        title="MMStar",
        paper="Are We on the Right Way for Evaluating Large Vision-Language Models?",
        splits={"val": TableSize(1500, 1500, (500, 400), 230)},  # images: at most
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="average",
        read=_read,
        llava_v1=_prompt,
        score=partial(_score, partial(stated_letter, letters=LETTERS)),
        metrics=metrics,
        summands=summands,
        rules={
            "lmms_eval": Rules("average", score=partial(_score, partial(harness_letter, letters=LETTERS))),
            "lmms_eval_0_3": Rules("average", score=partial(_score, opening_letter)),
        },
    ),
)
