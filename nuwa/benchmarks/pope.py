"""POPE: is an object in the image? Accuracy, precision, recall, F1 and the yes-ratio of the predictions.

Variants: ``exact`` takes nothing but yes or no for an answer; ``first_sentence`` reads the text before the first
period: no or not means no, anything else yes. An answer that cannot be read is wrong and counts as neither yes nor no,
so it lowers recall, never precision. Papers report F1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.answers import in_a_word
from nuwa.benchmarks.definition import COCO, Benchmark, Example, Rules, Scores, Sums, TableSize, Truth, mean, ratio
from nuwa.benchmarks.records import IMAGE, columns, image_bytes, one_of, text

SCHEMA = columns(
    id=pa.string(),
    question_id=pa.string(),
    question=pa.string(),
    answer=pa.string(),
    image=IMAGE,
    category=pa.string(),
)
CATEGORIES = ("adversarial", "popular", "random")
WORD = re.compile(r"\w+")


def exact(answer: str) -> bool | None:
    """True for yes, False for no, None for anything else."""
    return {"yes": True, "no": False}.get(answer.strip().lower())


def first_sentence(answer: str) -> bool | None:
    """False where the first sentence says no or not, None where it says nothing, else True."""
    words = WORD.findall(answer.split(".", 1)[0].lower())
    return not {"no", "not"} & set(words) if words else None


def _read(row: dict[str, Any]) -> Iterator[Example]:
    category = text(row, "category")
    # the three categories number their questions alike
    example_id = f"pope:{category}/{text(row, 'question_id')}"
    truth = {"answer": one_of(row, "answer", ("yes", "no"), lower=True)}
    yield Example(example_id, text(row, "question").strip(), truth, category, image_bytes(row["image"], "image"))


def metrics(sums: Sums) -> Sums:
    """The five figures of ``correct``, ``said_yes``, ``is_yes``, ``hit``; a ratio without denominator is 0.

    ``F1 = 2 hits / (said yes + is yes)``, the harmonic mean of precision and recall written as one ratio.
    """
    return {
        "accuracy": mean(sums, "correct"),
        "precision": ratio(sums["hit"], sums["said_yes"], 0),
        "recall": ratio(sums["hit"], sums["is_yes"], 0),
        "f1": ratio(2 * sums["hit"], sums["said_yes"] + sums["is_yes"], 0),
        "yes_ratio": mean(sums, "said_yes"),
        "parse_failure": mean(sums, "parse_failure"),
    }


def _scores(said: bool | None, truth: Truth) -> Scores:
    is_yes = truth["answer"] == "yes"
    return {
        "correct": float(said is is_yes),
        "said_yes": float(said is True),
        "is_yes": float(is_yes),
        "hit": float(said is True and is_yes),
        "parse_failure": float(said is None),
    }


def _harness_score(prediction: str, truth: Truth) -> Scores:
    """As lmms-eval: recall, and with it F1, is of the questions answered with yes or no alone."""
    said = exact(prediction)
    scores = _scores(said, truth)
    return scores if said is not None else scores | {"is_yes": 0.0}


def _benchmark(variant: str, parse: Callable[[str], bool | None], rules: Mapping[str, Rules]) -> Benchmark:
    def score(prediction: str, truth: Truth) -> Scores:
        return _scores(parse(prediction), truth)

    return Benchmark(
        name="pope",
        variant=variant,
        title="POPE",
        paper="Evaluating Object Hallucination in Large Vision-Language Models",
        splits={
            "test": TableSize(9000, 500, COCO, 31),
            **dict.fromkeys(CATEGORIES, TableSize(3000, 500, COCO, 31)),
        },
        right="correct",
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="f1",
        read=_read,
        llava_v1=in_a_word,
        score=score,
        metrics=metrics,
        rules=rules,
    )


HARNESS = Rules("pope_f1_score", 128, score=_harness_score)

VARIANTS = (
    _benchmark("exact", exact, {"lmms_eval": HARNESS, "lmms_eval_0_3": HARNESS}),
    _benchmark("first_sentence", first_sentence, {"llava": Rules("F1 score", 128)}),
)
