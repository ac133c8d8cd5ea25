"""What it costs to score a large sweep: a made-up result table through what the ``evaluate`` stage does with it.

The table has the schema of a real one: every trial answers every question, boxes differ nearly everywhere, words
repeat. Scoring runs in a process of its own, so its peak memory is its own. Tracking is measured by
``benchmarks.tracking``. The last line is one JSON object.

    python -m benchmarks.evaluate
    python -m benchmarks.evaluate --trials 10000 --questions 100
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sweep.results import PREDICTIONS

LIMIT_S, LIMIT_GIB = 30.0, 1.2
WORDS = ("red", "blue", "green", "a man", "two dogs", "on the table", "17", "left", "wooden", "stop")
# Shares of the questions: grounding as in the papers' tables, and every way a headline metric is made.
SHARES = {"refcoco": 0.2, "refcocoplus": 0.15, "refcocog": 0.15, "pope": 0.2, "gqa": 0.15, "textvqa": 0.1, "mme": 0.05}
QUESTIONS_AN_IMAGE = 5
HEADLINE = 64.0  # a quarter of the trials have this budget
BEGINNINGS = (
    "what color is it",
    "the dog on the left",
    "the man behind the car",
    "is there a cat",
    "how many are there",
)


def write_sweep(folder: Path, trials: int, questions: int) -> None:
    """``examples``, ``trials`` and ``predictions`` in ``folder``, as the stages before ``evaluate`` leave them."""
    rng = np.random.default_rng(0)
    examples = _examples(questions, rng)
    examples.to_parquet(folder / "examples.parquet")
    ids = [f"{number:016x}" for number in range(trials)]
    methods = ["unpruned", "downsample", *["nuwa"] * (trials - 2)]
    rows: dict[str, list] = {"trial_id": ids, "method": methods, "position": ["pesp", "perc", *["pesp"] * (trials - 2)]}
    rows |= {"grids": [["methods"]] * trials, "budgets": [[], *[[HEADLINE * (1 + n % 4)] for n in range(trials - 1)]]}
    pd.DataFrame(rows).to_parquet(folder / "trials.parquet")
    truths = [json.loads(truth) for truth in examples["truth"]]
    kept = pa.array(rng.integers(0, 576, 32 * len(examples)).astype(np.int16))
    offsets = pa.array(np.arange(len(examples) + 1, dtype=np.int32) * 32)

    with pq.ParquetWriter(folder / "predictions.parquet", PREDICTIONS) as writer:
        for trial in ids:
            right = rng.random(len(examples)) < 0.6
            answers = [_answer(truth, good, rng) for truth, good in zip(truths, right, strict=True)]
            columns = [
                pa.array([trial] * len(examples)),
                pa.array(examples["example_id"], pa.string()),
                pa.array(answers),
                pa.ListArray.from_arrays(offsets, kept),
                pa.repeat(False, len(examples)),
            ]
            writer.write_table(pa.table(columns, schema=PREDICTIONS))


def _examples(questions: int, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for benchmark, share in SHARES.items():
        count = max(round(questions * share) // 2 * 2, 2)
        for number in range(count):
            truth, category = _truth(benchmark, number, rng)
            image = f"{benchmark}-{number // (2 if benchmark == 'mme' else QUESTIONS_AN_IMAGE)}"
            family = "grounding" if benchmark.startswith("refcoco") else "vqa"
            asked = BEGINNINGS[number % len(BEGINNINGS)]
            rows.append((f"{benchmark}:{number}", benchmark, family, image, asked, json.dumps(truth), category))
    return pd.DataFrame(rows, columns=["example_id", "benchmark", "family", "image", "question", "truth", "category"])


def _truth(benchmark: str, number: int, rng: np.random.Generator) -> tuple[dict, str]:
    if benchmark.startswith("refcoco"):
        left, top = rng.uniform(0, 0.6, 2)
        return {"box": [left, top, left + 0.3, top + 0.3]}, ""
    if benchmark == "pope":
        return {"answer": ("yes", "no")[number % 2]}, ("random", "popular", "adversarial")[number % 3]
    if benchmark == "mme":
        category = ("count", "position", "code_reasoning")[number // 2 % 3]
        return {"answer": ("yes", "no")[number % 2], "group": f"{category}/{number // 2}"}, category
    word = WORDS[rng.integers(len(WORDS))]
    return ({"answers": [word] * 10} if benchmark == "textvqa" else {"answer": word}), ""


def _answer(truth: dict, right: bool, rng: np.random.Generator) -> str:
    if "box" in truth:
        return str([round(float(v), 2) for v in np.add(truth["box"], rng.normal(0, 0.01 if right else 0.3, 4))])
    answer = truth["answers"][0] if "answers" in truth else truth["answer"]
    if right:
        return answer
    return {"yes": "no", "no": "yes"}.get(answer, WORDS[rng.integers(len(WORDS))])


def score(folder: Path, processes: int = 1) -> dict[str, float]:
    """Read, score, compare and write as the stage does; seconds, and CPU and peak memory of this process, not of others that
    score for it.

    Every trial is held against the unpruned one and against the first of the others; those of the headline budget by what
    was asked.
    """
    from pipelines.scores.blocks import Work, score_sweep
    from pipelines.scores.comparisons import Pair
    from stages.evaluate import write_table

    before = _peak_gib()
    started, cpu = time.perf_counter(), time.process_time()
    trials, examples = pd.read_parquet(folder / "trials.parquet"), pd.read_parquet(folder / "examples.parquet")
    whole, first, *others = trials["trial_id"]
    pairs = [Pair("unpruned", HEADLINE, trial, whole) for trial in (first, *others)]
    pairs += [Pair("against", HEADLINE, trial, first) for trial in others]
    work = Work(trials, examples, folder / "predictions.parquet", 1000, 0, None, pairs, 0.01, HEADLINE)

    tables = score_sweep(work, folder / "scoring", processes)
    for name, table in vars(tables).items():
        write_table(table, folder / f"{name}.parquet")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": _peak_gib(),
        "imports_gib": before,
        "score_rows": len(tables.scores),
    }


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=400, help="made-up trials (default: 400)")
    parser.add_argument("--questions", type=int, default=2500, help="questions each answers (default: 2500)")
    parser.add_argument("--processes", type=int, default=1, help="that score at once (default: 1)")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)  # the child's half
    options = parser.parse_args()
    if options.score:
        print(json.dumps(score(options.score, options.processes)))
        return
    with tempfile.TemporaryDirectory() as name:
        write_sweep(Path(name), options.trials, options.questions)
        rows = pq.read_metadata(Path(name) / "predictions.parquet").num_rows
        command = [sys.executable, "-m", "benchmarks.evaluate", "--score", name, "--processes", str(options.processes)]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    figures = {
        "benchmark": "evaluate",
        "trials": options.trials,
        "rows": rows,
        "evaluate_seconds": round(measured["seconds"], 2),
        "evaluate_cpu_seconds": round(measured["cpu_seconds"], 2),
        "evaluate_peak_gib": round(measured["peak_gib"], 3),
        "limit_seconds": LIMIT_S,
        "limit_gib": LIMIT_GIB,
    }
    print(f"{rows} answers of {options.trials} trials → {measured['score_rows']} scores")
    print(f"{measured['seconds']:.1f} s (bar: {LIMIT_S:.0f}); {measured['peak_gib']:.2f} GiB (bar: {LIMIT_GIB}), ")
    print(f"{measured['imports_gib']:.2f} GiB of it imported modules")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
