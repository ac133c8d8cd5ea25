"""``evaluate``: predictions → scores, retention and intervals; metrics, plots, and one MLflow run a trial."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.atomic import atomic_path
from pipelines.datasets import choose_questions
from pipelines.evidence import evaluate as score
from pipelines.settings import Settings, budget_tokens
from pipelines.summary import budget_table, headline_metrics
from stages.entry import EXAMPLES, METRICS, PLOTS, PREDICTIONS, SCORES, TRIALS, run_stage
from stages.track import track


def score_tables(trials: Path, examples: pd.DataFrame, predictions: Path, resamples: int, seed: int) -> pd.DataFrame:
    """The table of scores from files of trials and predictions; of predictions only what scoring needs is read."""
    columns = ["trial_id", "example_id", "prediction"]
    answers = pq.read_table(predictions, columns=columns, read_dictionary=columns).unify_dictionaries()
    return score(pd.read_parquet(trials), examples, answers.to_pandas(), resamples, seed)


def write_scores(scores: pd.DataFrame, target: Path) -> None:
    with atomic_path(target) as path:
        pq.write_table(pa.Table.from_pandas(scores, preserve_index=False), path)


def evaluate(settings: Settings) -> None:
    plan = settings.sweep
    questions = choose_questions(pd.read_parquet(EXAMPLES), plan.benchmarks, plan.images, plan.subset_seed)
    scores = score_tables(TRIALS, questions.examples, PREDICTIONS, settings.evaluate.resamples, settings.evaluate.seed)
    write_scores(scores, SCORES)
    trials = pd.read_parquet(TRIALS)
    headline = budget_tokens(settings.report.headline_budget, plan.budget_unit, int(trials["image_tokens"].iloc[0]))
    with atomic_path(METRICS) as path:
        path.write_text(json.dumps(headline_metrics(trials, scores, headline), indent=1) + "\n")
    for family, table in budget_table(trials, scores).items():
        with atomic_path(PLOTS / f"{family}_retention.csv") as path:
            table.to_csv(path, index=False)
    track(settings, with_report=False)  # the page on disk may be an earlier sweep's


if __name__ == "__main__":
    run_stage(evaluate)
