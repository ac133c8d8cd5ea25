"""MMMU (validation): college questions, multiple choice and open.

Images stand before all text, in the order of their numbers, each once. Variants: ``all_images`` shows all that a
question names; ``single_image`` leaves out the questions that name several; ``first_image`` asks them too, with the first
of their images. The ``<image k>`` tag of a single image is taken out of the text; of several they stay, and under the
protocols of lmms-eval all do. How many questions are left out or lack images is counted when the table is read.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from nuwa.benchmarks.answers import SINGLE_WORD
from nuwa.benchmarks.choices import OPTION_LETTER, Options, choice_scores, find_words, lettered, option_lines
from nuwa.benchmarks.definition import Benchmark, Example, Rules, Scores, TableSize, Truth
from nuwa.benchmarks.records import IMAGE, RecordError, columns, image_bytes, one_of, optional_text, text

SCHEMA = columns(
    id=pa.string(),
    question=pa.string(),
    options=pa.string(),
    explanation=pa.string(),
    **{f"image_{number}": IMAGE for number in range(1, 8)},
    img_type=pa.string(),
    answer=pa.string(),
    topic_difficulty=pa.string(),
    question_type=pa.string(),
    subfield=pa.string(),
)
CHOICE, OPEN = "multiple-choice", "open"
TAG = re.compile(r"<image ([1-7])>")
SUBJECT = re.compile(r"[a-z]+_(.+)_\d+")

# words before the part of an open answer that matters; "=" counts in the last line
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBER = re.compile(
    r"-?\b\d{1,3}(?:,\d{3})+\b"
    r"|-?\d+(?:\.\d+)?[eE][+-]?\d+"
    r"|-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"
)


def _read_all(row: dict[str, Any], tagged: bool = False) -> Iterator[Example]:
    numbers = _tags(row)
    example = _example(row, tagged or len(numbers) > 1)
    further = tuple(image_bytes(row[f"image_{number}"], f"image_{number}") for number in numbers[1:])
    yield replace(example, further=further, note="")


def _read_single(row: dict[str, Any], tagged: bool = False) -> Iterator[Example]:
    if len(_tags(row)) <= 1:
        yield _example(row, tagged)


def _read_first(row: dict[str, Any], tagged: bool = False) -> Iterator[Example]:
    yield _example(row, tagged)


def _tags(row: dict[str, Any]) -> list[int]:
    return sorted({int(number) for number in TAG.findall(f"{row['question']} {row['options']}")})


def _example(row: dict[str, Any], tagged: bool) -> Example:
    """``tagged``: the image's tag stays where it stands in the text, as harnesses show it."""
    question_id, kind = text(row, "id"), one_of(row, "question_type", (CHOICE, OPEN))
    tags = _tags(row)
    number = next(iter(tags), 1)
    shown = _as_published if tagged else partial(_without_tag, number=number)

    truth: Truth = {"id": question_id, "type": kind}
    if kind == CHOICE:
        truth["options"] = lettered(shown(option) for option in _options(row))
        truth["answer"] = one_of(row, "answer", tuple(truth["options"]))
    else:
        truth["answers"] = _open_answers(text(row, "answer"))

    subject = SUBJECT.fullmatch(question_id)
    return Example(
        example_id=f"mmmu:{question_id}",
        question=shown(text(row, "question")),
        truth=truth,
        category=subject[1] if subject else optional_text(row, "subfield"),
        image=image_bytes(row[f"image_{number}"], f"image_{number}"),
        note=f"the first of {len(tags)} images is shown" if len(tags) > 1 else "",
    )


def _as_published(words: str) -> str:
    return words


def _without_tag(words: str, number: int) -> str:
    return re.sub(rf" ?<image {number}>", "", words).strip()


def _options(row: dict[str, Any]) -> list[str]:
    """``options`` is a list written out as Python text."""
    try:
        options = ast.literal_eval(text(row, "options"))
    except (ValueError, SyntaxError):
        options = None
    if not isinstance(options, list) or len(options) < 2:
        raise RecordError(f"column 'options' should be the text of a list of two or more, found {row['options']!r}")
    return [str(option) for option in options]


def _open_answers(answer: str) -> list[str]:
    """Some open questions have several right answers, written out as a list."""
    try:
        values = ast.literal_eval(answer) if answer.startswith("[") else None
    except (ValueError, SyntaxError):
        values = None
    return [str(value) for value in values] if isinstance(values, list) and values else [answer]


def _prompt(example: Example) -> str:
    if example.truth["type"] == OPEN:
        return f"{example.question}\n{SINGLE_WORD}"
    return f"{example.question}\n{option_lines(example.truth['options'])}\n{OPTION_LETTER}"


def named_option(answer: str, options: Options) -> str | None:
    """The last option named, by ``(B)``, else by ``B`` as a word, else by ``B.``, else by its text as whole words.

    Letters count as whole words only: ``DVD`` names no option.
    """
    letters = "".join(options)
    trimmed = answer.strip().strip(",.!?;:'")
    for form in (rf"\(([{letters}])\)", rf"(?<!\S)([{letters}])(?!\S)", rf"(?<!\w)([{letters}])\."):
        named = re.findall(form, trimmed)
        if named:
            return named[-1]
    ends = [(match.end(), len(text), letter) for letter, text in options.items() for match in find_words(text, trimmed)]
    return max(ends)[2] if ends else None


def score_choice(prediction: str, truth: Truth) -> Scores:
    """An answer that names no option gets one drawn by the question's id: right by chance, and a parse failure."""
    chosen = named_option(prediction, truth["options"])
    if chosen is not None:
        return choice_scores(chosen, truth["answer"])
    drawn = random.Random(truth["id"]).choice(list(truth["options"]))
    return {"accuracy": float(drawn == truth["answer"]), "parse_failure": 1.0}


def key_phrases(answer: str) -> list[str]:
    """Per line the shortest text behind a key word; the whole answer if there is none."""
    lines = answer.strip().strip(".").lower().split("\n")
    phrases = []
    for number, line in enumerate(lines, start=1):
        keys = (*KEYS, "=") if number == len(lines) else KEYS
        tails = [line.rsplit(key, 1)[1].strip() for key in keys if key in line]
        shortest = min((tail for tail in tails if tail), key=len, default="")
        if shortest.strip(",.!?;:'"):
            phrases.append(shortest)
    return phrases or ["\n".join(lines)]


def as_number(words: str) -> float | None:
    """A number to two decimals, thousands separators allowed."""
    try:
        return round(float(words.strip().replace(",", "")), 2)
    except ValueError:
        return None


def score_open(prediction: str, truth: Truth) -> Scores:
    """A numeric answer must equal a number in the key phrases, a text must be contained in one (a letter as a word)."""
    phrases = key_phrases(prediction)
    numbers = {as_number(part) for phrase in phrases for part in (phrase, *NUMBER.findall(phrase))}
    right = False
    for answer in truth["answers"]:
        number, words = as_number(answer), answer.strip().lower()
        if number is not None:
            right = right or number in numbers
        elif len(words) == 1:
            right = right or any(find_words(words, phrase) for phrase in phrases)
        else:
            right = right or any(words in phrase for phrase in phrases)
    return {"accuracy": float(right), "parse_failure": float(not prediction.strip())}


def _score(prediction: str, truth: Truth) -> Scores:
    return score_open(prediction, truth) if truth["type"] == OPEN else score_choice(prediction, truth)


VARIANTS = tuple(
    Benchmark(
        name="mmmu",
        variant=variant,
        title="MMMU",
        paper="MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark for Expert AGI",
        splits={"validation": TableSize(900, 900, (800, 500), 310)},  # at most: some are left out
        family="vqa",
        schema=SCHEMA,
        max_new_tokens=128,
        headline="accuracy",
        read=read,
        llava_v1=_prompt,
        score=_score,
        rules={
            "lmms_eval": Rules("mmmu_acc", 128, read=partial(read, tagged=True), unwritten=("qwen3_vl",)),
            "lmms_eval_0_3": Rules("mmmu_acc", 16, read=partial(read, tagged=True)),
        },
    )
    for variant, read in (("all_images", _read_all), ("single_image", _read_single), ("first_image", _read_first))
)
