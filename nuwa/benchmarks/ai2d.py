"""AI2D: school diagrams, their labels as printed, four options. The table without labels (``ai2d_no_mask``) is another."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.choices import OPTION_LETTER, choice_scores, lettered, option_lines, stated_letter
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, TableSize, Truth
from nuwa.benchmarks.records import IMAGE, TEXTS, RecordError, columns, content_id, image_bytes, one_of, text, texts

SCHEMA = columns(question=pa.string(), options=TEXTS, answer=pa.string(), image=IMAGE)
LEADING_LETTER = re.compile(r"\s*([A-Z])\.")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _read(row: dict[str, Any]) -> Iterator[Example]:
    question, choices = text(row, "question"), texts(row, "options")
    image, options = image_bytes(row["image"], "image"), lettered(choices)
    if len(options) < 2:
        raise RecordError(f"column 'options' holds {len(options)} options, at least 2 are needed")
    position = int(one_of(row, "answer", tuple(map(str, range(len(options))))))
    truth = {"answer": list(options)[position], "options": options}
    yield Example(f"ai2d:{content_id(image, question, *choices)}", question, truth, "", image)


def _prompt(example: Example) -> str:
    return f"{example.question}\n{option_lines(example.truth['options'])}{OPTION_LETTER}"


def _score(prediction: str, truth: Truth) -> Scores:
    return choice_scores(stated_letter(prediction, tuple(truth["options"])), truth["answer"])


def _score_as_published(prediction: str, truth: Truth) -> Scores:
    """The harness's: a capital before a period that begins the answer, else the whole answer without punctuation."""
    leading = LEADING_LETTER.match(prediction)
    said = leading[1] if leading else prediction.translate(NO_PUNCTUATION).upper()
    return choice_scores(said if said in truth["options"] else None, truth["answer"])


HARNESS = Rules("exact_match", 16, score=_score_as_published)

VARIANTS = (
    Benchmark(
        name="ai2d",
        title="AI2D",
        paper="A Diagram Is Worth a Dozen Images",
        splits={"test": TableSize(3088, 3088, (600, 450), 120)},  # images: at most
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="accuracy",
        read=_read,
        llava_v1=_prompt,
        score=_score,
        rules={"lmms_eval": HARNESS, "lmms_eval_0_3": HARNESS},
    ),
)
