"""A benchmark of one's own: a table of images, questions and answers or boxes, scored by a rule of a name.

The table is Parquet, or JSON Lines: an object a line. Its columns are ``image`` (in Parquet a struct of ``bytes`` and
``path`` as the ``datasets`` library writes it, in JSON Lines the path of a file, below the table's folder), ``question``,
and ``answers`` (a list of texts) or ``box`` (left, top, right, bottom as shares of the image).
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from nuwa.benchmarks import edit_distance
from nuwa.benchmarks.answers import in_a_word, normalize_answer
from nuwa.benchmarks.boxes import parse_box, score_box
from nuwa.benchmarks.chartqa import relaxed
from nuwa.benchmarks.definition import Benchmark, Example, Scores, TableSize, Truth
from nuwa.benchmarks.grounding import INSTRUCTION
from nuwa.benchmarks.records import (
    IMAGE,
    TEXTS,
    RecordError,
    SchemaError,
    columns,
    content_id,
    image_bytes,
    text,
    texts,
    type_name,
)
from nuwa.benchmarks.rows import Row
from nuwa.errors import in_one_line
from nuwa.registry import Registry

SHOWN = 80  # characters of a wrong value in a message
SIZE = TableSize(questions=1000, images=500, photo=(640, 480), characters=40)  # planned for until the table is at hand


def _exact(prediction: str, truth: Truth) -> Scores:
    """1 where the answer, normalised as EvalAI does, is one of the answers."""
    said = normalize_answer(prediction)
    right = said in [normalize_answer(answer) for answer in truth["answers"]]
    return {"accuracy": float(right), "parse_failure": float(not said)}


def _contains(prediction: str, truth: Truth) -> Scores:
    """1 where one of the answers stands in what was said, normalised."""
    said = f" {normalize_answer(prediction)} "
    right = any(f" {normalize_answer(answer)} " in said for answer in truth["answers"])
    return {"accuracy": float(right), "parse_failure": float(not said.strip())}


def _relaxed(prediction: str, truth: Truth) -> Scores:
    """ChartQA's rule: numbers within 5 per cent."""
    right = any(relaxed(prediction, answer) for answer in truth["answers"])
    return {"accuracy": float(right), "parse_failure": float(not prediction.strip())}


def _box(prediction: str, truth: Truth) -> Scores:
    """Share of answers whose box overlaps the truth's by more than a half."""
    return score_box(parse_box(prediction, "normalized"), truth["box"])


@dataclass(frozen=True)
class Rule:
    """``answer``: the column of the table that holds the truth."""

    score: Callable[[str, Truth], Scores]
    headline: str
    right: str
    answer: str = "answers"


RULES: Registry[Rule] = Registry("scoring rule")
for _name, _rule in {
    "exact": Rule(_exact, "accuracy", "accuracy"),
    "contains": Rule(_contains, "accuracy", "accuracy"),
    "relaxed": Rule(_relaxed, "accuracy", "accuracy"),
    "anls": Rule(edit_distance.score, "anls", "anls"),
    "box": Rule(_box, "acc_at_50", "acc_at_50", answer="box"),
}.items():
    RULES.add(_name, _rule)


def own_benchmark(
    name: str,
    title: str,
    score: str,
    *,
    prompt: Callable[[Example], str] | None = None,
    max_new_tokens: int = 32,
    size: TableSize = SIZE,
) -> Benchmark:
    """A benchmark of the module's form of table, to be registered (:func:`nuwa.benchmarks.register_benchmark`).

    ``score``: a name of ``RULES``. ``prompt``: the text behind the image; absent: the question and LLaVA's instruction to
    answer briefly, or to give a box. ``size``: what a plan assumes before the table is at hand. Its split is called
    ``test``. Raises :class:`nuwa.registry.UnknownName`.
    """
    rule = RULES.look_up(score)
    boxes = rule.answer == "box"
    answers = pa.list_(pa.float64()) if boxes else TEXTS

    return Benchmark(
        name=name,
        title=title,
        splits={"test": size},
        family="grounding" if boxes else "vqa",
        schema=columns(image=IMAGE, question=pa.string(), **{rule.answer: answers}),
        max_new_tokens=max_new_tokens,
        headline=rule.headline,
        right=rule.right,
        read=functools.partial(_read, name, rule.answer),
        llava_v1=prompt or (_locate if boxes else in_a_word),
        score=rule.score,
    )


def _locate(example: Example) -> str:
    return INSTRUCTION + example.question


def _read(name: str, answer: str, row: dict[str, Any]) -> Iterator[Example]:
    image, question = image_bytes(row["image"], "image"), text(row, "question")
    truth: Truth = {"box": _checked_box(row["box"])} if answer == "box" else {"answers": texts(row, "answers")}
    yield Example(f"{name}:{content_id(image, question)}", question, truth, "", image)


def _checked_box(box: list[float] | None) -> list[float]:
    if box is None or len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise RecordError(
            f"column 'box' is {box}; it must be left, top, right and bottom as shares of the image, 0 to 1"
        )
    return [float(side) for side in box]


@dataclass(frozen=True)
class JsonLines:
    """A table in JSON Lines; images are read when their row is."""

    path: Path

    @property
    def schema(self) -> pa.Schema:
        """Of the first line. Raises ``SchemaError``."""
        for first in self._objects():
            return pa.schema([(name, self._kind(name, value)) for name, value in first.items()])
        raise SchemaError(f"{self.path}: an empty file; it should hold an object a line")

    def rows(self, published: pa.Schema) -> Iterator[Row]:
        """Raises ``RecordError``."""
        for number, values in self._values(published):
            yield self._row(number, values)

    def _row(self, number: int, values: dict[str, Any]) -> Row:
        if values.get("image") is not None:
            values["image"] = self._image(values["image"], number)
        return Row(str(self.path), number, values)

    def _values(self, published: pa.Schema) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every row with the name of its image."""
        for number, held in enumerate(self._objects()):
            values: dict[str, Any] = {}
            for column in published:
                values[column.name] = value = held.get(column.name)
                wanted = pa.string() if column.name == "image" else column.type
                if not _is(value, wanted):
                    raise RecordError(
                        f"{self.path}: row {number}: column {column.name!r} should be {type_name(wanted)}, found "
                        f"{json.dumps(value, ensure_ascii=False)[:SHOWN]}; mend or drop the row"
                    )
            yield number, values

    def ends(self, published: pa.Schema) -> Iterator[Row]:
        """The first row and the last; no other image is read."""
        rows = self._values(published)
        first = next(rows, None)
        last = collections.deque(rows, maxlen=1)
        yield from (self._row(*end) for end in (first, *last) if end is not None)

    def count_rows(self) -> int:
        return sum(1 for _ in self._objects())

    def _objects(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines):
                if not line.strip():
                    continue
                try:
                    held = json.loads(line.decode().rstrip())
                    json.dumps(held, ensure_ascii=False).encode()  # half a pair of surrogates is no text
                except (ValueError, RecursionError) as error:  # ValueError: no UTF-8 either
                    raise RecordError(f"{self.path}: line {number + 1}: no JSON: {error}; mend or drop it") from None
                if not isinstance(held, dict):
                    raise RecordError(f"{self.path}: line {number + 1}: no object; mend or drop it")
                yield held

    def _image(self, name: str, number: int) -> dict[str, Any]:
        place = self.path.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:  # what lies elsewhere is not seen to change
            raise RecordError(
                f"{self.path}: row {number}: column 'image' names {name!r}; images must lie below the table's folder, as "
                "files or behind a link"
            )
        if not place.is_file():
            raise RecordError(f"{self.path}: row {number}: column 'image' names {name!r}, and {place} is no file")
        return {"bytes": place.read_bytes(), "path": name}

    def _kind(self, name: str, value: Any) -> pa.DataType:
        if name == "image" and isinstance(value, str):
            return IMAGE
        try:
            return pa.array([value]).type
        except (pa.ArrowException, OverflowError) as error:
            reason = in_one_line(error)
            raise SchemaError(f"{self.path}: line 1: {name!r} is of no one type ({reason}); mend it") from None


def _is(value: Any, kind: pa.DataType) -> bool:
    """Whether a value of JSON is one of ``kind``, or null."""
    if value is None:
        return True
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(_is(one, kind.value_type) for one in value)
    if pa.types.is_floating(kind):
        return type(value) in (int, float)
    return isinstance(value, str)
