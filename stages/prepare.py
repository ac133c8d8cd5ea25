"""``prepare``: questions and images the sweep reads, from the testbed (made here in the published schemas) or from
published tables in folders or on the hub."""

from __future__ import annotations

import shutil

from nuwa.testbed.benchmark import make_testbed_benchmark
from pipelines.datasets import write_examples
from pipelines.settings import Settings
from pipelines.tables import BenchmarkName, fetch_tables
from stages.entry import BENCHMARKS, EXAMPLES, IMAGES, run_stage


def prepare(settings: Settings) -> None:
    plan = settings.prepare
    shutil.rmtree(BENCHMARKS, ignore_errors=True)
    BENCHMARKS.mkdir(parents=True)
    if plan.tables is None:
        tasks = {BenchmarkName.parse(name).name: count for name, count in plan.questions.items()}
        make_testbed_benchmark(BENCHMARKS, plan.images, tasks, plan.seed)
        sources = dict.fromkeys(plan.questions, BENCHMARKS)
    else:
        sources = {name: fetch_tables(location) for name, location in plan.tables.items()}
    write_examples(sources, settings.model.prompt_style, EXAMPLES, IMAGES)


if __name__ == "__main__":
    run_stage(prepare)
