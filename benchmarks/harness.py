"""The same questions through lmms-eval: tasks of this project's tables, and whether the answers are the sweep's own.

    python -m benchmarks.harness tasks FOLDER             # after make repro: a task a benchmark, of what the sweep asked
    lmms-eval --model nuwa --model_args pretrained=models/testbed,method=nuwa,average_tokens=16 \
        --include_path FOLDER --tasks nuwa_gqa,nuwa_pope --batch_size 8 --log_samples --output_path LOGS
    python -m benchmarks.harness compare LOGS FOLDER "nuwa · 16 · pesp"

``tasks`` needs the tables of a finished sweep (``data/``), no lmms-eval; docs/lmms_eval.md has figures. ``compare`` reads
the answers that lmms-eval logged and says of each benchmark how many differ from a trial's, and both scores. The last line
is one JSON object; the exit code is 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

DATA = Path("data")
UNPRUNED = "unpruned"
PREFIX = "nuwa_"
COLUMNS = ("example_id", "benchmark", "prompt", "truth", "category")
FEATURES = {name: {"_type": "Value", "dtype": "string"} for name in COLUMNS} | {"image": {"_type": "Image"}}

TASK = """task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files: {{ test: {table} }}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: prompt
doc_to_target: truth
generation_kwargs: {{ max_new_tokens: {tokens}, temperature: 0, do_sample: false }}
process_results: !function utils.process_results
metric_list:
  - metric: {headline}
    aggregation: !function utils.headline
    higher_is_better: true
"""
FUNCTIONS = '''"""Written by benchmarks/harness.py."""

import json

from nuwa.benchmarks import get_benchmark


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    benchmark = get_benchmark(doc["benchmark"])
    kept = {name: doc[name] for name in ("benchmark", "truth", "category")}
    return {benchmark.headline: {"answer": results[0], **kept}}


def headline(results):
    benchmark = get_benchmark(results[0]["benchmark"])
    truths = [json.loads(one["truth"]) for one in results]
    table = benchmark.score_table([one["answer"] for one in results], truths, [one["category"] for one in results])
    return benchmark.aggregate(table)[benchmark.headline]
'''


def write_tasks(folder: Path) -> list[str]:
    """A task of every benchmark that the sweep asked, over the questions that it asked; their names."""
    answers = trial_answers(UNPRUNED)
    examples = pd.read_parquet(DATA / "examples.parquet").merge(answers[["example_id"]], on="example_id")
    examples = examples.merge(pd.read_parquet(DATA / "images.parquet")[["image", "bytes"]], on="image")
    scores = pd.read_parquet(DATA / "scores.parquet").query("headline")
    headlines = dict(zip(scores["benchmark"], scores["metric"], strict=True))

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text(FUNCTIONS)
    names = []
    for benchmark, rows in examples.groupby("benchmark"):
        task, table = f"{PREFIX}{benchmark}", (folder / f"{benchmark}.parquet").absolute()
        columns = {name: pa.array(rows[name], pa.string()) for name in COLUMNS}
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns["image"] = pa.array([{"bytes": one, "path": None} for one in rows["bytes"]], kind)
        known = {"huggingface": json.dumps({"info": {"features": FEATURES}})}  # so that datasets decodes the images
        pq.write_table(pa.table(columns).replace_schema_metadata(known), table)

        (limit,) = set(rows["max_new_tokens"])
        text = TASK.format(task=task, table=table, tokens=limit, headline=headlines[benchmark])
        (folder / f"{task}.yaml").write_text(text)
        names.append(task)
    return names


def trial_answers(label: str) -> pd.DataFrame:
    """``example_id`` and ``prediction`` of the trial that the report calls ``label``."""
    trials = pd.read_parquet(DATA / "trials.parquet")
    if label not in set(trials["label"]):
        raise SystemExit(f"no trial is called {label!r}; see the column label of {DATA / 'trials.parquet'}")
    (trial,) = trials.loc[trials["label"] == label, "trial_id"]
    return pd.read_parquet(DATA / "predictions.parquet", filters=[("trial_id", "==", trial)])


def logged_answers(logs: Path, folder: Path) -> pd.DataFrame:
    """``benchmark``, ``example_id`` and ``answer`` of every sample that lmms-eval logged of the tasks in ``folder``."""
    rows = []
    for path in sorted(logs.rglob(f"*_samples_{PREFIX}*.jsonl")):
        benchmark = path.stem.partition(f"_samples_{PREFIX}")[2]
        names = pd.read_parquet(folder / f"{benchmark}.parquet", columns=["example_id"])["example_id"]
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            answer = sample["filtered_resps"]
            (answer,) = answer if isinstance(answer, list) else [answer]  # lmms-eval unpacks a list of one
            rows.append({"benchmark": benchmark, "example_id": names[sample["doc_id"]], "answer": answer})
    if not rows:
        raise SystemExit(f"no samples under {logs}; run lmms-eval with --log_samples --output_path")
    return pd.DataFrame(rows)


def compare(logs: Path, folder: Path, label: str) -> int:
    """How many answers differ, by benchmark, on standard output; returns their number."""
    both = logged_answers(logs, folder).merge(trial_answers(label), on="example_id")
    # Harnesses differ in white space around an answer, which no score reads.
    both["differs"] = both["answer"].str.strip() != both["prediction"].str.strip()
    for benchmark, rows in both.groupby("benchmark"):
        print(f"{benchmark}: {rows['differs'].sum()} of {len(rows)} answers differ")
    for row in both[both["differs"]].head(10).itertuples():
        print(f"  {row.example_id}: {row.answer!r}, the sweep {row.prediction!r}")
    differ = int(both["differs"].sum())
    print(json.dumps({"trial": label, "answers": len(both), "differ": differ}, ensure_ascii=False))
    return differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tasks").add_argument("folder", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("logs", type=Path)
    comparing.add_argument("folder", type=Path)
    comparing.add_argument("label")
    asked = parser.parse_args()

    if asked.command == "tasks":
        print(",".join(write_tasks(asked.folder)))
    else:
        sys.exit(1 if compare(asked.logs, asked.folder, asked.label) else 0)


if __name__ == "__main__":
    main()
