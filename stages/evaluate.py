"""``evaluate``: predictions → scores, retention and intervals; metrics, plots, and one MLflow run a trial."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nuwa.budget import budget_tokens
from pipelines.data.datasets import choose_questions
from pipelines.data.left_out import left_out, without
from pipelines.files.atomic import atomic_path
from pipelines.files.lines import tell
from pipelines.scores.blocks import Tables, Work, score_sweep
from pipelines.scores.comparisons import never_met, pairs_of
from pipelines.scores.grades import read_grades
from pipelines.scores.seeds import spread_over_seeds, with_seeds
from pipelines.scores.submissions import check_scored
from pipelines.scores.summary import budget_curves, headline_metrics, headline_table
from pipelines.settings import Settings
from stages.entry import (
    COMPARISONS,
    EXAMPLES,
    GROUPS,
    HEADLINE,
    METRICS,
    PLOTS,
    PREDICTIONS,
    SCORES,
    SCORING,
    SEEDS,
    SWEEP,
    TRIALS,
    run_stage,
)
from stages.track import track


def score_tables(
    trials: Path, examples: pd.DataFrame, predictions: Path, resamples: int, seed: int, grades: Path | None = None
) -> pd.DataFrame:
    """The table of scores from files of trials and predictions."""
    given = read_grades(grades) if grades else None
    with tempfile.TemporaryDirectory() as folder:
        work = Work(pd.read_parquet(trials), examples, predictions, resamples, seed, given)
        return score_sweep(work, Path(folder, "scoring")).scores


def write_table(table: pd.DataFrame, target: Path) -> None:
    with atomic_path(target) as path:
        pq.write_table(pa.Table.from_pandas(table, preserve_index=False), path)


def scored(
    settings: Settings, trials: pd.DataFrame, answered: pd.DataFrame, predictions: Path, scratch: Path
) -> tuple[Tables, float]:
    """The tables of ``trials`` on the questions ``answered``, and the average tokens of the headline.

    ``predictions``: a file of answers; ``scratch``: see :func:`score_sweep`, which says what is raised.
    """
    recipe, tokens = settings.evaluate, int(trials["image_tokens"].iloc[0])
    headline = budget_tokens(settings.report.headline_budget, settings.sweep.budget_unit, tokens)
    work = Work(
        trials,
        answered,
        predictions,
        recipe.resamples,
        recipe.seed,
        read_grades(Path(recipe.grades)) if recipe.grades else None,
        pairs_of(trials, recipe.against, recipe.planned),
        recipe.margin,
        headline,
        settings.plugins,
    )

    tables = score_sweep(work, scratch, recipe.processes)
    spread = spread_over_seeds(trials, tables.scores)
    return replace(tables, comparisons=with_seeds(tables.comparisons, trials, spread)), headline


def evaluate(settings: Settings) -> None:
    plan = settings.sweep
    check_scored(plan.benchmarks)
    questions = choose_questions(pd.read_parquet(EXAMPLES), plan.benchmarks, plan.images, plan.subset_seed)
    answered, trials = without(questions.examples, left_out(SWEEP)), pd.read_parquet(TRIALS)
    for line in never_met(trials, settings.evaluate.planned):
        tell(line)
    tables, headline = scored(settings, trials, answered, PREDICTIONS, SCORING)
    scores = tables.scores
    write_table(scores, SCORES)
    write_table(tables.comparisons, COMPARISONS)
    write_table(tables.groups, GROUPS)
    spread = spread_over_seeds(trials, scores)
    write_table(spread, SEEDS)

    with atomic_path(METRICS) as path:
        path.write_text(json.dumps(headline_metrics(trials, scores, headline, spread), indent=1) + "\n")
    with atomic_path(HEADLINE) as path:
        headline_table(trials, scores, headline).to_csv(path, index=False)
    for family, table in budget_curves(trials, scores).items():
        with atomic_path(PLOTS / f"{family}_retention.csv") as path:
            table.to_csv(path, index=False)
    track(settings, with_report=False)  # the page on disk may be an earlier sweep's


if __name__ == "__main__":
    run_stage(evaluate)
