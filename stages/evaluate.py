"""``evaluate``: predictions → scores, retention and intervals; metrics, plots, and one MLflow run a trial."""

from __future__ import annotations

import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.atomic import atomic_path
from pipelines.datasets import choose_questions
from pipelines.evidence import evaluate as score
from pipelines.settings import Settings
from pipelines.summary import budget_table, headline_metrics
from stages.entry import EXAMPLES, METRICS, PLOTS, PREDICTIONS, SCORES, TRIALS, run_stage
from stages.track import track


def evaluate(settings: Settings) -> None:
    plan = settings.sweep
    trials = pd.read_parquet(TRIALS)
    questions = choose_questions(pd.read_parquet(EXAMPLES), plan.benchmarks, plan.images, plan.subset_seed)
    scores = score(
        trials, questions.examples, pd.read_parquet(PREDICTIONS), settings.evaluate.resamples, settings.evaluate.seed
    )
    with atomic_path(SCORES) as path:
        pq.write_table(pa.Table.from_pandas(scores, preserve_index=False), path)
    with atomic_path(METRICS) as path:
        path.write_text(json.dumps(headline_metrics(trials, scores, settings.report.headline_budget), indent=1) + "\n")
    for family, table in budget_table(trials, scores).items():
        with atomic_path(PLOTS / f"{family}_retention.csv") as path:
            table.to_csv(path, index=False)
    track(settings, with_report=False)  # the page on disk may be an earlier sweep's


if __name__ == "__main__":
    run_stage(evaluate)
