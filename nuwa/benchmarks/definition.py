"""What a benchmark is: a published table, a prompt, a score of one answer, an aggregate over all of them.

A benchmark is data: one frozen :class:`Benchmark` of plain functions in a file of its own. The path of a question is
``examples`` (table → :class:`Example`) → ``prompt`` (text behind the image) → ``score`` (one answer → numbers) →
``aggregate`` (numbers of all answers → metrics).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from nuwa.benchmarks.protocols import PROTOCOLS, TESTBED, ProtocolError
from nuwa.benchmarks.records import RecordError, check_columns, image_size
from nuwa.benchmarks.rows import Row, Source, rows_of
from nuwa.registry import UnknownName, unknown

Family = Literal["grounding", "vqa"]
Truth = dict[str, Any]
Scores = dict[str, float]
Sums = dict[str, np.ndarray]

STYLES = ("llava_v1", "testbed")
LEFT_OUT = "rows left out"


@dataclass(frozen=True)
class Example:
    """One question about one image.

    Attributes:
        example_id: ``<benchmark>:<question id>[:<k>]``; unique within a table.
        question: the expression or question as people read it.
        truth: what ``score`` needs, JSON-serialisable and self-contained. ``truth["group"]``, where there is one, names
            the questions that are scored together (MME's pairs, MMBench's circular copies).
        category: the benchmark's own division, ``""`` where it has none.
        image: encoded bytes, as published; of several images the first.
        context: what the prompt shows besides the question (a hint, OCR tokens) and scoring does not need.
        note: what of the published question the model is not shown, ``""`` where it is shown all of it.
        further: encoded bytes of the images behind the first, which all stand before the text.
    """

    example_id: str
    question: str
    truth: Truth
    category: str
    image: bytes
    context: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    further: tuple[bytes, ...] = ()

    @property
    def images(self) -> tuple[bytes, ...]:
        """All that are shown, in their order."""
        return self.image, *self.further


def means(sums: Sums) -> Sums:
    """The plain mean of every column."""
    return {name: mean(sums, name) for name in sums if name != "n"}


def mean(sums: Sums, name: str) -> np.ndarray:
    """The plain mean of column ``name``, not a number where there are no rows."""
    return ratio(sums[name], sums["n"], np.nan)


def ratio(part: np.ndarray, whole: np.ndarray, without: float) -> np.ndarray:
    """``part / whole``, and ``without`` where ``whole`` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), float(without)), where=np.asarray(whole) > 0)


@dataclass(frozen=True)
class TableSize:
    """How large one published table is: its ``questions`` and distinct ``images``, width and height of a typical
    ``photo`` in pixels, and the mean ``characters`` of what a prompt shows beside its benchmark's instruction."""

    questions: int
    images: int
    photo: tuple[int, int]
    characters: int


COCO = (640, 480)  # pixels of a typical photo of COCO


@dataclass(frozen=True)
class Rules:
    """How one protocol (:mod:`nuwa.benchmarks.protocols`) asks one benchmark and scores its answers.

    What is None is as the benchmark has it, except for the limit.

    Attributes:
        metric: what the harness calls the headline.
        max_new_tokens: answer tokens allowed; None: the protocol's usual limit for the model's family.
        llava_v1: the text behind the image.
        read: one row of the table → its examples: which questions are asked, with which images.
        score: answer and truth → numbers of this example.
        metrics: see :class:`Benchmark`.
        headline: see :class:`Benchmark`.
        right: see :class:`Benchmark`.
        graded: see :class:`Benchmark`.
        unwritten: model types that the harness asks in other words, which are not written here.
    """

    metric: str
    max_new_tokens: int | None = None
    llava_v1: Callable[[Example], str] | None = None
    read: Callable[[dict[str, Any]], Iterator[Example]] | None = None
    score: Callable[[str, Truth], Scores] | None = None
    metrics: Callable[[Sums], Sums] | None = None
    headline: str | None = None
    right: str | None = None
    graded: Callable[[str, Truth], bool] | None = None
    unwritten: Collection[str] = ()


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark under one scoring rule, and what is known of it.

    Attributes:
        name: registry name.
        title: the name as papers print it.
        paper: title of the paper that describes it.
        splits: the published tables by split; see :class:`TableSize`. Sums say what a count rests on.
        parts: names of the tables that a split is published as, where they are several; ``join`` makes one of them.
        right: the column of ``score`` that is at least a half where an answer counts as right.
        points: whether the headline is a sum of points, not a share.
        group_size: how many questions every ``truth["group"]`` has, where no other number can be scored.
        variant: which of the published prompts or rules this is, ``""`` where there is only one.
        family: averages of retention keep the two apart.
        schema: published columns and types.
        max_new_tokens: answer tokens allowed, None where that is the protocol's affair; see :meth:`limit`.
        headline: name of the metric in ``aggregate``'s result that papers report; higher is better.
        read: one row of the table → its examples.
        llava_v1: the text behind the image for LLaVA-1.5's ``vicuna_v1`` conversation.
        score: answer and truth → numbers of this example, ``parse_failure`` (0 or 1) always among them. Never raises,
            whatever the answer.
        metrics: metrics from the sums of the columns of :meth:`score_table` and ``summands`` over the rows, and ``n``,
            their number; arrays of any one shape, so that a bootstrap makes the metrics of all resamples at once.
        summands: the frame of :meth:`score_table` → further columns to sum, where a row's share depends on the other
            rows of its group. Whole groups are drawn together; every copy of a group has its own label.
        pixels: whether boxes are told in pixels of the image as the model sees it, ``truth["size"]``.
        graded: answer and truth → whether the answer needs a grade from outside, ``truth["grade"]``, from 0 to 1, without
            which ``score`` raises ``KeyError``; None: no answer does.
        submission: truth and answer → one row of the file that the benchmark's server scores, of a variant whose answers
            are not published; see :func:`for_server`. None: scored here.
        rules: what each protocol does otherwise, by the protocol's name; see :meth:`under`.
        protocol: the protocol this is asked and scored under.
        metric: what that protocol's harness calls the headline, ``""`` for the testbed's own.
    """

    name: str
    family: Family
    schema: pa.Schema
    max_new_tokens: int | None
    headline: str
    read: Callable[[dict[str, Any]], Iterator[Example]]
    llava_v1: Callable[[Example], str]
    score: Callable[[str, Truth], Scores]
    metrics: Callable[[Sums], Sums] = means
    summands: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    variant: str = ""
    title: str = ""
    paper: str = ""
    splits: Mapping[str, TableSize] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    join: Callable[..., pa.Table] | None = None
    right: str = "accuracy"
    points: bool = False
    group_size: int | None = None
    pixels: bool = False
    graded: Callable[[str, Truth], bool] | None = None
    submission: Callable[[Truth, str], dict[str, Any]] | None = None
    rules: Mapping[str, Rules] = field(default_factory=dict)
    protocol: str = TESTBED
    metric: str = ""

    def under(self, protocol: str) -> Benchmark:
        """This benchmark as ``protocol`` asks and scores it.

        Raises:
            UnknownName: no such protocol, or none that asks this benchmark (in this variant).
        """
        PROTOCOLS.look_up(protocol)
        if protocol == self.protocol:
            return self
        if protocol not in self.rules:
            label = f"{self.name}:{self.variant}" if self.variant else self.name
            raise UnknownName(unknown(f"protocol of {label}", protocol, (TESTBED, *self.rules)))
        rules = self.rules[protocol]
        names = ("llava_v1", "read", "score", "metrics", "headline", "right", "graded")
        changed = {name: value for name in names if (value := getattr(rules, name)) is not None}
        return replace(self, protocol=protocol, metric=rules.metric, max_new_tokens=rules.max_new_tokens, **changed)

    def limit(self, model_type: str = "") -> int:
        """Answer tokens allowed for a model of ``model_type``.

        Raises:
            ProtocolError: the protocol is not run on such a model.
        """
        protocol = PROTOCOLS[self.protocol]
        protocol.check_model(model_type)
        if self.protocol in self.rules and model_type in self.rules[self.protocol].unwritten:
            raise ProtocolError(
                f"prepare.protocol: {self.protocol!r} asks {model_type} models {self.name} in other words, which are not "
                "written here; choose another protocol or model, or leave the benchmark out"
            )
        return protocol.limit(model_type) if self.max_new_tokens is None else self.max_new_tokens

    def examples(
        self, table: Source, source: str = "the table", notes: Counter[str] | None = None, *, whole: bool = False
    ) -> Iterator[Example]:
        """All examples in table order. A question id that repeats gets ``#2``, ``#3``, … appended.

        ``notes`` counts what the model is not shown: rows that are no question, and every note of an example.

        ``whole``: the table is one to score, so images whose header cannot be read, groups that are not whole and a table
        without questions are refused.

        Raises:
            SchemaError: the table's columns are not the published ones.
            RecordError: a row cannot be a question; names ``source``, the row (from 0) and the column.
        """
        check_schema(table.schema, self, source)
        seen: Counter[str] = Counter()
        groups: dict[str, tuple[int, str]] = {}  # how many questions, and where the last one is
        for row in rows_of(table, self.schema):
            questions, place = 0, f"{row.place or source}: row {row.number} of {self.name}"
            try:
                for example in self._examples_of(row, whole):
                    questions += 1
                    seen[example.example_id] += 1
                    repeat = seen[example.example_id]
                    if repeat > 1:
                        # A table may hold an id that looks like a repeated one.
                        while (renamed := f"{example.example_id}#{repeat}") in seen:
                            repeat += 1
                        seen[renamed] = 1
                        example = replace(example, example_id=renamed)
                    if whole and self.group_size is not None:
                        count, _ = groups.get(example.truth["group"], (0, ""))
                        groups[example.truth["group"]] = count + 1, place
                    if notes is not None and example.note:
                        notes[example.note] += 1
                    yield example
            except RecordError as error:
                raise RecordError(f"{place}: {error}; mend or drop the row, or fetch the file again") from None
            if notes is not None and not questions:
                notes[LEFT_OUT] += 1
        if whole and not seen:
            raise RecordError(f"{source}: no question of {self.name} in it; fetch the table again")
        self._check_groups(groups)

    def questions_of(self, row: Row) -> list[Example]:
        """The questions of one row, its images looked at; raises :class:`RecordError` naming file, row and column."""
        try:
            return list(self._examples_of(row, whole=True))
        except RecordError as error:
            place = f"{row.place or 'the table'}: row {row.number} of {self.name}"
            raise RecordError(f"{place}: {error}; mend or drop the row, or fetch the file again") from None

    def _examples_of(self, row: Row, whole: bool) -> Iterator[Example]:
        for example in self.read(row.values):
            if whole:
                for image in example.images:
                    try:
                        image_size(image)
                    except RecordError as error:
                        raise RecordError(f"column {_column_of(row.values, image)!r}: {error}") from None
            yield example

    def _check_groups(self, groups: Mapping[str, tuple[int, str]]) -> None:
        for name, (count, place) in groups.items():
            if count != self.group_size:
                raise RecordError(
                    f"{place}: {self.name} scores {self.group_size} questions an image together, and {name!r} has {count}; "
                    "mend or drop its rows, or fetch the file again"
                )

    def prompt(self, example: Example, style: str) -> str:
        """The text between the image and the assistant's turn.

        Raises:
            ValueError: ``style`` is none of ``STYLES``.
        """
        if style == "llava_v1":
            return self.llava_v1(example)
        if style == "testbed":
            return f"locate {example.question}" if self.family == "grounding" else example.question
        raise ValueError(f"prompt style {style!r} does not exist; choose one of {', '.join(STYLES)}")

    def score_table(
        self, predictions: Sequence[str], truths: Sequence[Truth], categories: Sequence[str]
    ) -> pd.DataFrame:
        """The scores of many answers, one row an answer, with the ``category`` and ``group`` that ``aggregate`` reads.

        A question without a group of its own is its own group.
        """
        rows = [self.score(prediction, truth) for prediction, truth in zip(predictions, truths, strict=True)]
        table = pd.DataFrame(rows)
        table["category"] = list(categories)
        table["group"] = [str(truth.get("group", f"row {number}")) for number, truth in enumerate(truths)]
        return table

    def aggregate(self, table: pd.DataFrame) -> Scores:
        """The metrics of the frame of :meth:`score_table`."""
        columns = table.select_dtypes("number")
        if self.summands is not None:
            columns = columns.join(self.summands(table))
        sums = {name: np.asarray(columns[name].sum(), float) for name in columns}
        metrics = self.metrics(sums | {"n": np.asarray(len(table), float)})
        return {name: float(value) for name, value in metrics.items()}


def for_server(
    known: Benchmark,
    schema: pa.Schema,
    read: Callable[[dict[str, Any]], Iterator[Example]],
    submission: Callable[[Truth, str], dict[str, Any]],
) -> Benchmark:
    """The variant ``submission`` of ``known``, for a table whose answers only the benchmark's server has: asked in the same
    words, scored there. Its truths hold what ``submission`` needs."""
    rules = {protocol: replace(one, read=None, score=None, graded=None) for protocol, one in known.rules.items()}
    return replace(
        known,
        variant="submission",
        splits={},
        schema=schema,
        read=read,
        score=_not_scored,
        submission=submission,
        rules=rules,
    )


def _not_scored(prediction: str, truth: Truth) -> Scores:
    raise ValueError("the answers to this question are not published: only the benchmark's server can score it")


def check_schema(table_schema: pa.Schema, benchmark: Benchmark, path: str) -> None:
    """Refuse a file that is not ``benchmark``'s published table.

    Raises:
        SchemaError: one line with the file, the column, the expected and the found type, and what to do.
    """
    check_columns(table_schema, benchmark.schema, benchmark.name, path)


def _column_of(values: Mapping[str, Any], image: bytes) -> str:
    """The column of a row that holds ``image``."""
    for name, value in values.items():
        held = value if isinstance(value, list) else [value]
        if any(isinstance(one, dict) and one.get("bytes") == image for one in held):
            return name
    return "image"
