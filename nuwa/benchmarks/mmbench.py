"""MMBench (en, dev): four options; letter, then option text; a question counts when all its circular copies are right.

Copies with rotated options carry the index of the original plus multiples of a million. A table without copies gives
the same number twice. Variants: ``rules`` alone, or with grades for what they cannot read (``judged``); the test split's
answers are with the server (``submission``).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from nuwa.benchmarks.choices import OPTION_LETTER, Options, choice_scores, find_words, option_lines
from nuwa.benchmarks.definition import (
    Benchmark,
    Example,
    Rules,
    Scores,
    Sums,
    TableSize,
    Truth,
    for_server,
    mean,
    ratio,
)
from nuwa.benchmarks.records import IMAGE, RecordError, columns, image_bytes, one_of, optional_text, text

Score = Callable[[str, Truth], Scores]
LETTERS = ("A", "B", "C", "D")
MISSING = "nan"  # what stands for a text that a question lacks
COPY_STEP = 1_000_000
WORDS_WITH_ARTICLE = 3  # in a longer answer a bare "A" may be the article

# what lmms-eval reads as a letter: these, and what may stand before and behind one, the first form that names one letter
HARNESS_LETTERS = "ABCDE"
HARNESS_FORMS = (
    *(("", mark) for mark in ("", ".", ",", ":", ")", ").")),
    *(("(", mark) for mark in (")", ").")),
    *((":", mark) for mark in ("", ",", ".", ")", ").")),
)

SCHEMA = columns(
    **{
        "index": pa.int64(),
        "question": pa.string(),
        "hint": pa.string(),
        "answer": pa.string(),
        "A": pa.string(),
        "B": pa.string(),
        "C": pa.string(),
        "D": pa.string(),
        "category": pa.string(),
        "image": IMAGE,
        "source": pa.string(),
        "L2-category": pa.string(),
        "comment": pa.string(),
        "split": pa.string(),
    }
)
# the test split; its answers are "nan"
ASKED = pa.schema([SCHEMA.field(name) for name in ("index", "question", "hint", *LETTERS, "category", "image")])


def named_letter(answer: str, options: Options) -> str | None:
    """The one option letter that stands as a word of its own; bare letters first, then letters in punctuation."""
    words = answer.split()
    bare = {word for word in words if word in options}
    if len(bare) == 1 and not ("A" in bare and len(words) > WORDS_WITH_ARTICLE):
        return bare.pop()
    marked = {word.strip(string.punctuation) for word in words if word not in options} & set(options)
    return marked.pop() if len(marked) == 1 else None


def named_text(answer: str, options: Options) -> str | None:
    """The one option whose text is the answer, or else stands in it as whole words."""
    same = [letter for letter, option in options.items() if option.lower() == answer.strip().lower()]
    letters = same or [letter for letter, option in options.items() if find_words(option, answer)]
    return letters[0] if len(letters) == 1 else None


def harness_option(answer: str, options: Options) -> str | None:
    """The letter that lmms-eval's rules read, of A to E whatever the question has; else the one option whose text the
    answer holds, inside of words too.

    An option that is missing is none: the harness looks for its ``nan``, and finds it in ``banana``.
    """
    words = set(answer.split())
    many = len(answer.split()) > WORDS_WITH_ARTICLE
    for before, behind in HARNESS_FORMS:
        named = [letter for letter in HARNESS_LETTERS if f"{before}{letter}{behind}" in words]
        # A bare "A" is taken for the article in a longer answer.
        if len(named) == 1 and not (not before and not behind and named == ["A"] and many):
            return named[0]

    lower = answer.strip().lower()
    held = [letter for letter, option in options.items() if option.lower() in lower]
    return held[0] if len(held) == 1 else None


def read(row: dict[str, Any], name: str = "mmbench") -> Iterator[Example]:
    """One question of the benchmark called ``name``."""
    options = _options(row)
    index = int(text(row, "index"))
    truth = {"answer": one_of(row, "answer", tuple(options)), "options": options, "group": str(index % COPY_STEP)}
    yield _asked(row, f"{name}:{index}", truth)


def _options(row: dict[str, Any]) -> dict[str, str]:
    """Those that a question has: one that it lacks is published as ``nan``."""
    options = {letter: option for letter in LETTERS if (option := optional_text(row, letter))}
    if len(options) < 2:
        raise RecordError(f"columns 'A' to 'D' hold {len(options)} options, at least 2 are needed")
    return options


def _asked(row: dict[str, Any], example_id: str, truth: Truth) -> Example:
    return Example(
        example_id=example_id,
        question=text(row, "question"),
        truth=truth,
        category=row["category"] or "",
        image=image_bytes(row["image"], "image"),
        context={
            "hint": optional_text(row, "hint"),
            "published_hint": row["hint"],
            "published_options": {letter: row[letter] for letter in LETTERS},
        },
    )


def _read_asked(row: dict[str, Any]) -> Iterator[Example]:
    """Of the test split, whose answers are not published."""
    index = int(text(row, "index"))
    truth = {"index": index, "question": text(row, "question"), "options": _options(row)}
    yield _asked(row, f"mmbench:{index}", truth)


def _submission(truth: Truth, answer: str) -> dict[str, Any]:
    """A row of the sheet that the server takes; it reads the answer itself."""
    options = {letter: truth["options"].get(letter) for letter in LETTERS}
    return {"index": truth["index"], "question": truth["question"], **options, "prediction": answer}


def prompt(example: Example, instruction: str = OPTION_LETTER) -> str:
    """Hint, question, options, then ``instruction``."""
    hint = f"{example.context['hint']} " if example.context["hint"] else ""
    options = option_lines(example.truth["options"])
    return f"{hint}{example.question} There are several options:\n{options}\n{instruction}"


def harness_prompt(example: Example, instruction: str = OPTION_LETTER, unshown: tuple[str, ...] = (MISSING,)) -> str:
    """As lmms-eval, which takes no other spelling than ``nan`` for an option that is missing: blanks and ``NaN`` are
    shown. ``unshown``: hints that are not."""
    hint, published = example.context["published_hint"], example.context["published_options"]
    lines = option_lines(
        {letter: option for letter, option in published.items() if option and option != MISSING}
    ).rstrip("\n")
    shown = "" if hint is None or hint in unshown else f"{hint} "
    return f"{shown}{example.question} There are several options:\n{lines}\n{instruction}"


def llava_prompt(example: Example, instruction: str = OPTION_LETTER) -> str:
    """As LLaVA's own script: no line announces the options."""
    hint = f"{example.context['hint']}\n" if example.context["hint"] else ""
    return f"{hint}{example.question}\n{option_lines(example.truth['options'])}{instruction}"


def _score(prediction: str, truth: Truth) -> Scores:
    options = truth["options"]
    return choice_scores(named_letter(prediction, options) or named_text(prediction, options), truth["answer"])


def harness_score(prediction: str, truth: Truth) -> Scores:
    """By lmms-eval's rules alone: what they cannot read is wrong."""
    return choice_scores(harness_option(prediction, truth["options"]), truth["answer"])


def _is_unread(prediction: str, truth: Truth, score: Score = _score) -> bool:
    """What the rules cannot read is a judge's affair, as in the harness."""
    return bool(prediction.strip()) and bool(score(prediction, truth)["parse_failure"])


def _score_graded(prediction: str, truth: Truth, score: Score = _score) -> Scores:
    scores, unread = score(prediction, truth), _is_unread(prediction, truth, score)
    return scores | {"accuracy": float(truth["grade"] >= 0.5)} if unread else scores


def summands(rows: pd.DataFrame) -> pd.DataFrame:
    """Each row's share of a question, and of a question all of whose copies are right."""
    groups = rows.groupby("group")["accuracy"]
    question = 1 / groups.transform("size")
    return pd.DataFrame({"question": question, "all_right": groups.transform("min") * question})


def metrics(sums: Sums) -> Sums:
    """``accuracy`` over all rows, ``circular_accuracy`` over questions whose copies are all right."""
    return {
        "accuracy": mean(sums, "accuracy"),
        "circular_accuracy": ratio(sums["all_right"], sums["question"], np.nan),
        "parse_failure": mean(sums, "parse_failure"),
    }


HARNESS = Rules("gpt_eval_score", 1024, llava_v1=harness_prompt, score=harness_score)
_BY_RULE = (
    Benchmark(
        name="mmbench",
        title="MMBench",
        paper="MMBench: Is Your Multi-modal Model an All-around Player?",
        splits={"dev": TableSize(4329, 1164, (400, 300), 210)},  # 1,164 questions in copies
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=16,
        headline="circular_accuracy",
        read=read,
        llava_v1=prompt,
        score=_score,
        metrics=metrics,
        summands=summands,
        rules={
            # by rules alone; the harness asks a judge about the rest
            **dict.fromkeys(("lmms_eval", "lmms_eval_0_3"), HARNESS),
            "llava": Rules("accuracy", 1024, llava_v1=llava_prompt),
        },
    ),
)
_GRADED = replace(
    HARNESS, score=partial(_score_graded, score=harness_score), graded=partial(_is_unread, score=harness_score)
)
VARIANTS = (
    replace(_BY_RULE[0], variant="rules"),
    replace(
        _BY_RULE[0],
        variant="judged",
        score=_score_graded,
        graded=_is_unread,
        rules={**_BY_RULE[0].rules, **dict.fromkeys(("lmms_eval", "lmms_eval_0_3"), _GRADED)},
    ),
    for_server(_BY_RULE[0], ASKED, _read_asked, _submission),
)
