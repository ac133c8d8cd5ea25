"""``prepare``: the testbed's benchmarks in their published schemas, and the questions and images the sweep reads."""

from __future__ import annotations

import shutil

from nuwa.testbed.benchmark import make_testbed_benchmark
from pipelines.datasets import write_examples
from pipelines.settings import Settings
from stages.entry import BENCHMARKS, EXAMPLES, IMAGES, run_stage


def prepare(settings: Settings) -> None:
    plan = settings.prepare
    shutil.rmtree(BENCHMARKS, ignore_errors=True)
    make_testbed_benchmark(BENCHMARKS, plan.images, plan.questions, plan.seed)
    write_examples(BENCHMARKS, list(plan.questions), settings.model.prompt_style, EXAMPLES, IMAGES)


if __name__ == "__main__":
    run_stage(prepare)
