"""Answers to questions whose truths are not published, as the benchmarks' servers take them.

VQAv2's and VizWiz's are lists in JSON for EvalAI, MMBench's is a sheet of Excel. A file holds the questions that were
asked; a server refuses one that lacks some of a split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nuwa.errors import UserError
from pipelines.data.datasets import parse_name
from pipelines.files.atomic import atomic_path
from pipelines.files.spreadsheet import write_sheet

SHEETS = ("mmbench",)  # benchmarks whose servers take a sheet
REMEDY = "`make submission` answers it and writes the file for its server"


class SubmissionError(UserError, ValueError):
    """Nothing to hand in, or a score asked of what only a server can score."""


def check_scored(benchmarks: Sequence[str]) -> None:
    """Refuse to score benchmarks whose answers are not published; raises :class:`SubmissionError`."""
    for name in benchmarks:
        if parse_name(name).submission is not None:
            raise SubmissionError(
                f"sweep.benchmarks: {name!r} has no published answers, so nothing here can score it; {REMEDY}"
            )


def submissions(examples: pd.DataFrame, predictions: pd.DataFrame) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Benchmark, trial and the rows of its file, in the order of ``examples``.

    ``examples``, ``predictions``: as :func:`pipelines.scores.evidence.evaluate` takes them.

    Raises:
        SubmissionError: no benchmark of ``examples`` is for a server, or a trial lacks an answer.
    """
    handed_in = False
    for name, asked in examples.groupby("benchmark", sort=False):
        submission = parse_name(name).submission
        if submission is None:
            continue

        handed_in, truths = True, [json.loads(truth) for truth in asked["truth"]]
        answers = predictions[predictions["example_id"].isin(asked["example_id"])]
        for trial, given in answers.groupby("trial_id", sort=True, observed=True):
            said = dict(zip(given["example_id"].astype(str), given["prediction"].astype(str), strict=True))
            lacking = next((one for one in asked["example_id"] if one not in said), None)
            if lacking is not None:
                raise SubmissionError(f"trial {trial} has no answer to {lacking}; run the sweep to its end first")
            rows = [submission(truth, said[one]) for truth, one in zip(truths, asked["example_id"], strict=True)]
            yield name, str(trial), rows
    if not handed_in:
        raise SubmissionError(
            "sweep.benchmarks: none is for a server; allowed: vqav2/testdev:submission, mmbench/test:submission, "
            "vizwiz/test:submission"
        )


def write_submission(benchmark: str, trial: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write one trial's file below ``folder``; returns its place."""
    table = benchmark.partition(":")[0].replace("/", "-")
    sheet = parse_name(benchmark).name in SHEETS
    target = folder / table / f"{trial}.{'xlsx' if sheet else 'json'}"
    with atomic_path(target) as path:
        if sheet:
            write_sheet(list(rows[0]), [list(row.values()) for row in rows], path)
        else:
            path.write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")
    return target
