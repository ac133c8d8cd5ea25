"""ChartQA: questions about charts, half by people, half made; numbers within a twentieth, words exactly.

Here thousands may be parted by commas, zero equals zero, and what is off by exactly a twentieth is right whatever its
rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, Sums, TableSize, Truth, mean, ratio
from nuwa.benchmarks.records import IMAGE, columns, content_id, image_bytes, one_of, text

SCHEMA = columns(type=pa.string(), question=pa.string(), answer=pa.string(), image=IMAGE)
HUMAN, AUGMENTED = "human_test", "augmented_test"
REQUEST = "\nAnswer the question with a single word."
RELATIVE = 0.05  # how far a number may be off, as a share of the true one
ROUNDING = 1e-9
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def _read(row: dict[str, Any]) -> Iterator[Example]:
    question, image = text(row, "question"), image_bytes(row["image"], "image")
    kind = one_of(row, "type", (HUMAN, AUGMENTED))
    truth = {"answer": text(row, "answer"), "type": kind}
    yield Example(f"chartqa:{content_id(image, kind, question)}", question, truth, kind, image)


def number(words: str) -> float | None:
    """A finite number; hundredths where ``%`` ends it."""
    stripped = words.strip()
    digits = THOUSANDS.sub("", stripped.removesuffix("%"))
    try:
        value = float(digits) / (100 if stripped.endswith("%") else 1)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def relaxed(prediction: str, answer: str) -> bool:
    """Within a twentieth of a true number, else equal without case and outer blanks."""
    said, true = number(prediction), number(answer)
    if said is None or true is None:
        return prediction.strip().lower() == answer.strip().lower()
    return abs(said - true) <= RELATIVE * abs(true) + ROUNDING * max(abs(true), abs(said))


def _plain_number(words: str) -> float | None:
    try:
        return float(words.rstrip("%")) / 100 if words.endswith("%") else float(words)
    except ValueError:
        return None


def relaxed_as_published(prediction: str, answer: str) -> bool:
    """The harness's rule: nothing is stripped, a true zero is compared as text."""
    said, true = _plain_number(prediction), _plain_number(answer)
    if said is not None and true:
        return abs(said - true) / abs(true) <= RELATIVE
    return prediction.lower() == answer.lower()


def _score(rule: Callable[[str, str], bool], prediction: str, truth: Truth) -> Scores:
    right, human = float(rule(prediction, truth["answer"])), float(truth["type"] == HUMAN)
    return {
        "accuracy": right,
        "human right": right * human,
        "human": human,
        "parse_failure": float(not prediction.strip()),
    }


def metrics(sums: Sums) -> Sums:
    """Accuracy over all questions, over those people wrote, and over those that were made."""
    return {
        "accuracy": mean(sums, "accuracy"),
        "human": ratio(sums["human right"], sums["human"], 0),
        "augmented": ratio(sums["accuracy"] - sums["human right"], sums["n"] - sums["human"], 0),
        "parse_failure": mean(sums, "parse_failure"),
    }


HARNESS = Rules("relaxed_overall", 16, score=partial(_score, relaxed_as_published))

VARIANTS = (
    Benchmark(
        name="chartqa",
        title="ChartQA",
        paper="ChartQA: A Benchmark for Question Answering about Charts with Visual and Logical Reasoning",
        splits={"test": TableSize(2500, 1612, (850, 600), 70)},  # images: at most
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=lambda example: example.question + REQUEST,
        score=partial(_score, relaxed),
        metrics=metrics,
        rules={"lmms_eval": HARNESS, "lmms_eval_0_3": HARNESS},
    ),
)
