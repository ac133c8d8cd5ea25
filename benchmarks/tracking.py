"""What it costs to show a sweep in MLflow: synthetic trials into a fresh SQLite store, then the same trials again.

The figure to watch is milliseconds a trial, as a trial itself takes 150 ms and more: tracking stays below 50.
The last line is one JSON object.

    python -m benchmarks.tracking
    python -m benchmarks.tracking --trials 200
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from pipelines.tracking.runs import trial_runs
from pipelines.tracking.tracker import Tracker

LIMIT_MS = 50.0
BENCHMARKS = {
    "refcoco": ("grounding", "acc@0.5"),
    "refcocoplus": ("grounding", "acc@0.5"),
    "refcocog": ("grounding", "acc@0.5"),
    "pope": ("vqa", "f1"),
    "gqa": ("vqa", "accuracy"),
    "textvqa": ("vqa", "accuracy"),
}
METHODS = ("nuwa", "cls_topk", "random", "pooling")


def synthetic_tables(count: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Trials, scores and timings of a sweep of `count` trials over six benchmarks, with made-up values."""
    trials = pd.DataFrame([_trial(number) for number in range(count)])
    random = np.random.default_rng(0)
    scores = pd.DataFrame([row for trial_id in trials["trial_id"] for row in _scores(trial_id, random)])
    timings = pd.DataFrame({"trial_id": trials["trial_id"], "seconds": random.uniform(0.15, 3.4, count)})
    return trials, scores, timings


def _trial(number: int) -> dict[str, object]:
    method, budget = METHODS[number % 4], (16.0, 32.0, 48.0)[number // 4 % 3]

    return {
        "trial_id": f"{number:012x}",
        "label": f"{method} {budget:.0f} #{number}",
        "grids": ["budgets"],
        "method": method,
        "preset": "released",
        "position": ("pesp", "perc", "rpme")[number % 3],
        "budget": budget,
        "average_tokens": budget,
        "image_tokens": 144,
        "stage1_keep": int(budget * 1.5),
        "stage2_layer": 4,
        "stage2_keep": int(budget / 2),
        "stage2_cuts": f"4:{int(budget / 2)}",
        "stage2_scorer": "attention",
        "seed": number,
        "stage2_recycling": False,
        "flops": budget * 1e8,
        "flops_convention": "FLOP",
        "kv_bytes": budget * 1e4,
        "params": json.dumps({"alpha": number / 1000}),
    }


def _scores(trial_id: str, random: np.random.Generator) -> list[dict[str, object]]:
    """One headline row a benchmark and the mean retention of each family."""
    rows = []
    named = [(name, *rest, True) for name, rest in BENCHMARKS.items()]
    named += [("mean", family, "retention", False) for family in ("grounding", "vqa")]
    for benchmark, family, metric, headline in named:
        score = float(random.uniform(0.2, 1.0))
        row = {"trial_id": trial_id, "benchmark": benchmark, "family": family, "metric": metric, "score": score}
        row |= {"low": score - 0.03, "high": score + 0.03, "n": 300, "headline": headline, "retention": score}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=1000, help="how many synthetic trials to log (default: 1000)")
    count = parser.parse_args().trials
    runs = trial_runs(*synthetic_tables(count), tags={"dvc_lock": "synthetic"})

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        tracker = Tracker.open(f"sqlite:///{Path(folder) / 'mlflow.db'}", "benchmark", sweep_id="synthetic")
        opened = time.perf_counter()
        with tracker:
            tracker.parent("synthetic sweep", {"trials": count}, {})
            written = tracker.trials(runs)
        logged = time.perf_counter()
        with Tracker.open(f"sqlite:///{Path(folder) / 'mlflow.db'}", "benchmark", sweep_id="synthetic") as tracker:
            tracker.parent("synthetic sweep", {"trials": count}, {})
            rewritten = tracker.trials(runs)
        replayed = time.perf_counter()

    if (written, rewritten) != (count, 0):
        raise SystemExit(f"wrote {written} of {count} trials, then {rewritten} of 0: the figures mean nothing")
    figures = {
        "benchmark": "tracking",
        "trials": count,
        "metrics_a_trial": len(runs[0].metrics),
        "open_seconds": round(opened - started, 2),
        "ms_a_trial": round((logged - opened) / count * 1000, 2),
        "replay_ms_a_trial": round((replayed - logged) / count * 1000, 2),
        "limit_ms": LIMIT_MS,
    }
    print(f"new database: {figures['open_seconds']} s")
    print(
        f"{count} trials of {figures['metrics_a_trial']} metrics: {figures['ms_a_trial']} ms each (aim: {LIMIT_MS:.0f})"
    )
    print(f"the same trials again: {figures['replay_ms_a_trial']} ms each")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
