"""``python -m stages.submission``: the sweep's answers to questions whose truths are not published, a file a trial for the
benchmark's server, below ``data/submissions``."""

from __future__ import annotations

import pandas as pd

from pipelines.data.datasets import choose_questions
from pipelines.data.left_out import left_out
from pipelines.scores.submissions import SubmissionError, submissions, write_submission
from pipelines.settings import Settings
from stages.entry import DATA, EXAMPLES, PREDICTIONS, SWEEP, TRIALS, run_stage

SUBMISSIONS = DATA / "submissions"


def submission(settings: Settings) -> None:
    plan = settings.sweep
    questions = choose_questions(pd.read_parquet(EXAMPLES), plan.benchmarks, plan.images, plan.subset_seed)
    missing = left_out(SWEEP)
    if missing:
        raise SubmissionError(f"{SWEEP}: {len(missing)} questions were left out; a server takes whole splits alone")

    columns = ["trial_id", "example_id", "prediction"]
    predictions = pd.read_parquet(PREDICTIONS, columns=columns)
    labels = dict(pd.read_parquet(TRIALS, columns=["trial_id", "label"]).to_numpy())
    for benchmark, trial, rows in submissions(questions.examples, predictions):
        path = write_submission(benchmark, trial, rows, SUBMISSIONS)
        print(f"{path}: {len(rows):,} answers of {labels[trial]}")


if __name__ == "__main__":
    run_stage(submission)
