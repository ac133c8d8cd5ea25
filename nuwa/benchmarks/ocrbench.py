"""OCRBench: reading text of ten sorts; an answer is right that holds one of the accepted ones.

Here an accepted answer must stand free of further letters and digits (``12`` is not in ``123``), and formulas (HME100k)
are compared without blanks, case kept. Papers print the number of right answers of 1,000.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.answers import as_asked
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, Sums, TableSize, Truth, mean, ratio
from nuwa.benchmarks.edit_distance import check_answers
from nuwa.benchmarks.records import IMAGE, TEXTS, RecordError, columns, content_id, image_bytes, text

SCHEMA = columns(dataset=pa.string(), question=pa.string(), question_type=pa.string(), answer=TEXTS, image=IMAGE)
FORMULAS = "HME100k"
GROUPS = {
    "Regular Text Recognition": "recognition",
    "Irregular Text Recognition": "recognition",
    "Artistic Text Recognition": "recognition",
    "Handwriting Recognition": "recognition",
    "Digit String Recognition": "recognition",
    "Non-Semantic Text Recognition": "recognition",
    "Scene Text-centric VQA": "scene",
    "Doc-oriented VQA": "documents",
    "Key Information Extraction": "key information",
    "Handwritten Mathematical Expression Recognition": "formulas",
}
PARTS = tuple(dict.fromkeys(GROUPS.values()))
WORD = "[0-9A-Za-z]"


def _read(row: dict[str, Any]) -> Iterator[Example]:
    kind, dataset = text(row, "question_type").strip(), text(row, "dataset")
    if kind not in GROUPS:
        raise RecordError(f"column 'question_type' is {kind!r}, allowed are {', '.join(GROUPS)}")
    question, image = text(row, "question").strip(), image_bytes(row["image"], "image")
    truth = {"answers": check_answers(row["answer"]), "dataset": dataset, "part": GROUPS[kind]}
    yield Example(f"ocrbench:{content_id(image, kind, question)}", question, truth, kind, image)


def one_line(words: str) -> str:
    """Outer blanks off, line breaks as blanks, full-width forms as plain ones."""
    return unicodedata.normalize("NFKC", words.strip().replace("\n", " "))


def holds(prediction: str, answer: str, formula: bool) -> bool:
    """Whether ``prediction`` has ``answer`` in it, free of further letters and digits."""
    said, wanted = one_line(prediction), one_line(answer)
    if formula:
        return wanted.replace(" ", "") in said.replace(" ", "")
    said, wanted = said.lower(), wanted.lower()
    before = rf"(?<!{WORD})" if re.match(WORD, wanted) else ""
    after = rf"(?!{WORD})" if re.search(f"{WORD}$", wanted) else ""
    return re.search(before + re.escape(wanted) + after, said) is not None


def contains(prediction: str, answer: str, formula: bool, lowered: bool = False) -> bool:
    """The harness's plain containment. ``lowered``: of formulas the prediction alone, as in lmms-eval 0.3.4, under
    which no formula with a capital can be right."""
    said, wanted = (words.strip().replace("\n", " ") for words in (prediction, answer))
    if formula:
        return wanted.replace(" ", "") in (said.lower() if lowered else said).replace(" ", "")
    return wanted.lower() in said.lower()


def _score(rule: Any, prediction: str, truth: Truth) -> Scores:
    formula = truth["dataset"] == FORMULAS
    right = float(any(rule(prediction, answer, formula) for answer in truth["answers"]))
    scores = {"accuracy": right, "parse_failure": float(not prediction.strip())}
    for part in PARTS:
        scores |= {f"right {part}": right * (part == truth["part"]), f"asked {part}": float(part == truth["part"])}
    return scores


def metrics(sums: Sums) -> Sums:
    """``accuracy`` over all, ``hits``, and the accuracy of each of the five parts."""
    return {
        "accuracy": mean(sums, "accuracy"),
        "hits": sums["accuracy"],
        **{part: ratio(sums[f"right {part}"], sums[f"asked {part}"], 0) for part in PARTS},
        "parse_failure": mean(sums, "parse_failure"),
    }


VARIANTS = (
    Benchmark(
        name="ocrbench",
        title="OCRBench",
        paper="OCRBench: On the Hidden Mystery of OCR in Large Multimodal Models",
        splits={"test": TableSize(1000, 1000, (600, 400), 60)},  # images: at most
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=128,
        headline="accuracy",
        read=_read,
        llava_v1=as_asked,
        score=partial(_score, holds),
        metrics=metrics,
        rules={
            "lmms_eval": Rules("ocrbench_accuracy", 128, score=partial(_score, contains)),
            "lmms_eval_0_3": Rules("ocrbench_accuracy", 128, score=partial(_score, partial(contains, lowered=True))),
        },
    ),
)
