"""MME: two yes-or-no questions an image; acc + acc+ per category, summed to perception, cognition and total.

An answer counts by its first word, which must be yes or no (a lone y or n will do; none, nope and not mean no):
``Eyes`` is neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from nuwa.benchmarks.answers import SINGLE_WORD
from nuwa.benchmarks.definition import COCO, Benchmark, Example, Rules, Scores, Sums, TableSize, Truth, mean, ratio
from nuwa.benchmarks.records import IMAGE, columns, image_bytes, one_of, text

SCHEMA = columns(question_id=pa.string(), image=IMAGE, question=pa.string(), answer=pa.string(), category=pa.string())
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
REQUEST = " Please answer yes or no."
WORD = re.compile(r"\w+")
MEANT = {"yes": "yes", **dict.fromkeys(("no", "none", "nope", "not"), "no")}


def first_word(answer: str) -> str | None:
    """``yes``, ``no``, or ``None`` for anything else."""
    words = WORD.findall(answer.lower())
    if words in (["y"], ["n"]):
        return "yes" if words == ["y"] else "no"
    return MEANT.get(words[0]) if words else None


def _read(row: dict[str, Any]) -> Iterator[Example]:
    pair, category = text(row, "question_id"), one_of(row, "category", PERCEPTION + COGNITION)
    answer = one_of(row, "answer", ("yes", "no"), lower=True)
    # both questions of an image carry its question_id; one's answer is yes, the other's no
    yield Example(
        example_id=f"mme:{pair}:{answer}",
        question=text(row, "question").strip(),
        truth={"answer": answer, "group": f"{category}/{pair}"},
        category=category,
        image=image_bytes(row["image"], "image"),
    )


def _score(prediction: str, truth: Truth) -> Scores:
    said = first_word(prediction)
    return {"accuracy": float(said == truth["answer"]), "parse_failure": float(said is None)}


def summands(rows: pd.DataFrame) -> pd.DataFrame:
    """Per category, each row's half of its pair's 100·acc + 100·(both right), and its half of a pair.

    Raises:
        ValueError: an image with other than two answers.
    """
    pairs = rows.groupby("group")["accuracy"]
    size = pairs.transform("size")
    broken = size[size != 2]
    if len(broken):
        label = rows["group"][broken.index[0]]
        raise ValueError(f"mme scores pairs: image {label!r} has {broken.iloc[0]} answers, not 2; score whole images")
    points = 100 * (pairs.transform("mean") + pairs.transform("min")) / 2
    columns: dict[str, pd.Series] = {}
    for category in (*PERCEPTION, *COGNITION):
        inside = rows["category"] == category
        if inside.any():
            columns |= {f"points {category}": points.where(inside, 0), f"pairs {category}": inside / 2}
    return pd.DataFrame(columns)


def metrics(sums: Sums) -> Sums:
    """Points a pair per category, summed over the ten perception (≤ 2000) and the four cognition categories (≤ 800),
    and the total of both."""
    parts = {
        family: sum(
            (ratio(sums[f"points {name}"], sums[f"pairs {name}"], 0) for name in names if f"pairs {name}" in sums),
            start=np.zeros_like(sums["n"]),
        )
        for family, names in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return {
        **parts,
        "total": parts["perception"] + parts["cognition"],
        "accuracy": mean(sums, "accuracy"),
        "parse_failure": mean(sums, "parse_failure"),
    }


VARIANTS = (
    Benchmark(
        name="mme",
        title="MME",
        paper="MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models",
        splits={"test": TableSize(2374, 1187, COCO, 60)},
        points=True,
        group_size=2,
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="total",
        read=_read,
        llava_v1=lambda example: example.question.replace(REQUEST, "") + SINGLE_WORD,
        score=_score,
        metrics=metrics,
        summands=summands,
        rules={
            "lmms_eval": Rules("mme_perception_score + mme_cognition_score", 16),
            "lmms_eval_0_3": Rules("mme_perception_score + mme_cognition_score", 16),
        },
    ),
)
