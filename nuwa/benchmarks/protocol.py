"""What a benchmark is: a published table, a prompt, a score of one answer, an aggregate over all of them.

A benchmark is data: one frozen :class:`Benchmark` of plain functions in a file of its own. The path of a question is
``examples`` (table → :class:`Example`) → ``prompt`` (text behind the image) → ``score`` (one answer → numbers) →
``aggregate`` (numbers of all answers → metrics).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from nuwa.benchmarks.records import RecordError, check_columns

Family = Literal["grounding", "vqa"]
Truth = dict[str, Any]
Scores = dict[str, float]
Source = pa.Table | ds.Dataset  # a dataset is read batch by batch, whatever its size
Sums = dict[str, np.ndarray]

STYLES = ("llava_v1", "testbed")
ROWS_AT_ONCE = 256  # bounds how many decoded rows with their images are in memory


@dataclass(frozen=True)
class Example:
    """One question about one image.

    Attributes:
        example_id: ``<benchmark>:<question id>[:<k>]``; unique within a table.
        question: the expression or question as people read it.
        truth: what ``score`` needs, JSON-serialisable and self-contained. ``truth["group"]``, where there is one, names
            the questions that are scored together (MME's pairs, MMBench's circular copies).
        category: the benchmark's own division, ``""`` where it has none.
        image: encoded bytes, as published.
        context: what the prompt shows besides the question (a hint, OCR tokens) and scoring does not need.
    """

    example_id: str
    question: str
    truth: Truth
    category: str
    image: bytes
    context: Mapping[str, Any] = field(default_factory=dict)


def means(sums: Sums) -> Sums:
    """The plain mean of every column."""
    return {name: ratio(total, sums["n"], np.nan) for name, total in sums.items() if name != "n"}


def ratio(part: np.ndarray, whole: np.ndarray, without: float) -> np.ndarray:
    """``part / whole``, and ``without`` where ``whole`` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), float(without)), where=np.asarray(whole) > 0)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark under one scoring rule.

    Attributes:
        name: registry name.
        variant: which of the published prompts or rules this is, ``""`` where there is only one.
        family: averages of retention keep the two apart.
        schema: published columns and types.
        max_new_tokens: answer length the harness allows.
        headline: name of the metric in ``aggregate``'s result that papers report; higher is better.
        read: one row of the table → its examples.
        llava_v1: the text behind the image for LLaVA-1.5's ``vicuna_v1`` conversation.
        score: answer and truth → numbers of this example, ``parse_failure`` (0 or 1) always among them. Never raises,
            whatever the answer.
        metrics: metrics from the sums of the columns of :meth:`score_table` and ``summands`` over the rows, and ``n``,
            their number; arrays of any one shape, so that a bootstrap makes the metrics of all resamples at once.
        summands: the frame of :meth:`score_table` → further columns to sum, where a row's share depends on the other
            rows of its group. Whole groups are drawn together; every copy of a group has its own label.
    """

    name: str
    family: Family
    schema: pa.Schema
    max_new_tokens: int
    headline: str
    read: Callable[[dict[str, Any]], Iterator[Example]]
    llava_v1: Callable[[Example], str]
    score: Callable[[str, Truth], Scores]
    metrics: Callable[[Sums], Sums] = means
    summands: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    variant: str = ""

    def examples(self, table: Source, source: str = "the table") -> Iterator[Example]:
        """All examples in table order. A question id that repeats gets ``#2``, ``#3``, … appended.

        Raises:
            SchemaError: the table's columns are not the published ones.
            RecordError: a row cannot be a question; names ``source``, the row (from 0) and the column.
        """
        check_schema(table.schema, self, source)
        seen: Counter[str] = Counter()
        for number, row in enumerate(_rows(table, self.schema.names)):
            try:
                for example in self.read(row):
                    seen[example.example_id] += 1
                    repeat = seen[example.example_id]
                    if repeat > 1:
                        example = replace(example, example_id=f"{example.example_id}#{repeat}")
                    yield example
            except RecordError as error:
                raise RecordError(
                    f"{source}: row {number} of {self.name}: {error}; mend or drop the row, or fetch the file again"
                ) from None

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


def check_schema(table_schema: pa.Schema, benchmark: Benchmark, path: str) -> None:
    """Refuse a file that is not ``benchmark``'s published table.

    Raises:
        SchemaError: one line with the file, the column, the expected and the found type, and what to do.
    """
    check_columns(table_schema, benchmark.schema, benchmark.name, path)


def _rows(table: Source, names: list[str]) -> Iterator[dict[str, Any]]:
    if isinstance(table, pa.Table):
        batches = iter(table.select(names).to_batches(max_chunksize=ROWS_AT_ONCE))
    else:
        batches = table.to_batches(columns=names, batch_size=ROWS_AT_ONCE, batch_readahead=1, fragment_readahead=1)
    for batch in batches:
        yield from batch.to_pylist()
