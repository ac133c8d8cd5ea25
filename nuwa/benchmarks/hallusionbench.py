"""HallusionBench, its questions about images: yes or no, with pictures edited so that the answer turns.

Read by rule: the one of the whole words yes and no that the answer holds; both or neither count as unknown, which is
wrong. Published figures are by a judge model; without one lmms-eval marks every answer unclear, which scores nothing, so
that is not done here under any protocol. The variant ``judged`` takes grades from a file
(:mod:`pipelines.scores.grades`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from nuwa.benchmarks.answers import as_asked
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, Sums, TableSize, Truth, mean, ratio
from nuwa.benchmarks.records import IMAGE, columns, image_bytes, one_of, text

SCHEMA = columns(
    category=pa.string(),
    subcategory=pa.string(),
    visual_input=pa.string(),
    set_id=pa.string(),
    figure_id=pa.string(),
    sample_note=pa.string(),
    question_id=pa.string(),
    question=pa.string(),
    gt_answer_details=pa.string(),
    gt_answer=pa.string(),
    filename=pa.string(),
    image=IMAGE,
)
WORD = re.compile(r"\w+")
BETWEEN = " | "  # figure and question of a row's group


def yes_or_no(answer: str) -> bool | None:
    """True or False for the one of the words yes and no that ``answer`` holds, None for both or neither."""
    words = {"yes", "no"} & set(WORD.findall(answer.lower()))
    return words == {"yes"} if len(words) == 1 else None


def _read(row: dict[str, Any]) -> Iterator[Example]:
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    category, subcategory, of, figure, question = (text(row, name).strip() for name in names)
    home = f"{category}/{subcategory}/{of}"
    yield Example(
        example_id=f"hallusionbench:{home}/{figure}/{question}",
        question=text(row, "question"),
        truth={
            "answer": "yes" if one_of(row, "gt_answer", ("0", "1")) == "1" else "no",
            "group": f"{home}/figure {figure}{BETWEEN}{home}/question {question}",
            "question": text(row, "question"),
            "details": row["gt_answer_details"] or "",
        },
        category=category,
        image=image_bytes(row["image"], "image"),
    )


def _score(prediction: str, truth: Truth) -> Scores:
    said = yes_or_no(prediction)
    return {"accuracy": float(said is (truth["answer"] == "yes")), "parse_failure": float(said is None)}


def _is_said(prediction: str, truth: Truth) -> bool:
    return bool(prediction.strip())


def _score_graded(prediction: str, truth: Truth) -> Scores:
    """A judge's word: right where the grade is at least a half; an empty answer is wrong without asking."""
    said = _is_said(prediction, truth)
    return {"accuracy": float(said and truth["grade"] >= 0.5), "parse_failure": float(not said)}


def summands(rows: pd.DataFrame) -> pd.DataFrame:
    """Each row's share of its figure and of its question over all figures, and of those that are wholly right."""
    figures, questions, copies = [], [], []
    for group in rows["group"]:
        figure, _, rest = str(group).partition(BETWEEN)
        questions.append(rest)
        copies.append(rest.partition(" #")[2])  # what tells copies of a group apart
        figures.append((figure, copies[-1]))
    columns = {}
    for name, keys in (("figure", figures), ("question", questions)):
        right = rows["accuracy"].groupby(pd.Series(keys, index=rows.index))
        columns[name] = 1 / right.transform("size")
        columns[f"{name} right"] = right.transform("min") * columns[name]
    return pd.DataFrame(columns)


def metrics(sums: Sums) -> Sums:
    """``accuracy`` per answer (aAcc), per figure (fAcc) and per question over its figures (qAcc)."""
    return {
        "accuracy": mean(sums, "accuracy"),
        "figure_accuracy": ratio(sums["figure right"], sums["figure"], np.nan),
        "question_accuracy": ratio(sums["question right"], sums["question"], np.nan),
        "parse_failure": mean(sums, "parse_failure"),
    }


_BY_RULE = (
    Benchmark(
        name="hallusionbench",
        variant="yes_no",
        title="HallusionBench",
        paper="HallusionBench: An Advanced Diagnostic Suite for Entangled Language Hallucination and Visual Illusion",
        splits={"image": TableSize(951, 346, (700, 500), 100)},  # images: at most
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=128,
        headline="accuracy",
        read=_read,
        llava_v1=as_asked,
        score=_score,
        metrics=metrics,
        summands=summands,
        rules={"lmms_eval": Rules("aAcc", 128), "lmms_eval_0_3": Rules("aAcc", 128)},
    ),
)
VARIANTS = (*_BY_RULE, replace(_BY_RULE[0], variant="judged", score=_score_graded, graded=_is_said))
