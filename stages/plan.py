"""Say what would run, what it shares and what it costs. Like every stage it checks everything first."""

from __future__ import annotations

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor

from nuwa.vlm import Adapter, adapter_class
from nuwa.vlm.shapes import model_shape
from pipelines.datasets import choose_questions
from pipelines.features import signal_bytes
from pipelines.grid import Layouts, Trial, expand
from pipelines.plan import Forecast, forecast, image_layouts, sweep_costs
from pipelines.progress import worker_speed
from pipelines.settings import Settings
from stages.entry import EXAMPLES, UNITS_LOG, planned_trials, run_stage


def plan(settings: Settings) -> None:
    trials = planned_trials(settings)
    console = Console()
    console.print(_grids(settings, trials))
    if not EXAMPLES.exists():
        console.print(
            f"{EXAMPLES} is not there yet: `dvc repro prepare` makes it, and the next plan says what this costs"
        )
        return
    asked = settings.sweep
    questions = choose_questions(pd.read_parquet(EXAMPLES), asked.benchmarks, asked.images, asked.subset_seed)
    vlm = weightless(settings.model.path)
    layouts = image_layouts(vlm, questions.examples)
    trials = expand(asked, Layouts.of(layouts.values(), vlm.dynamic), vlm.layers)
    expected = forecast(trials, sweep_costs(vlm, questions.examples))
    widths = vlm.signal_widths(vlm.model.config)
    store = sum(signal_bytes(widths, layout, settings.features) for layout in layouts.values())
    for line in describe(expected, store, settings):
        console.print(line, highlight=False)


def weightless(path: str) -> Adapter:
    """The model's shape and processor; no weights are read."""
    config = model_shape(path)
    family = adapter_class(config.model_type)
    with torch.device("meta"):
        model = family.model_class(config)
    return family(model, AutoProcessor.from_pretrained(path))


def _grids(settings: Settings, trials: list[Trial]) -> Table:
    table = Table(title=f"{len(trials)} trials", title_justify="left")
    for name in ("grid", "trials", "methods", "average tokens"):
        table.add_column(name, justify="left")
    for name in dict.fromkeys(entry.name for entry in settings.sweep.grids):
        mine = [trial for trial in trials if name in trial.grids]
        averages = sorted({trial.schedule.average_tokens for trial in mine})
        methods = ", ".join(sorted({trial.spec.method for trial in mine}))
        table.add_row(name, str(len(mine)), methods, ", ".join(f"{value:g}" for value in averages))
    return table


def describe(expected: Forecast, feature_bytes: int, settings: Settings) -> list[str]:
    """The forecast in words; time is for all answers, whatever is stored already."""
    cluster = settings.cluster
    seconds = expected.seconds(worker_speed(UNITS_LOG, cluster))
    measured = "as measured here" if UNITS_LOG.exists() else "a guess until a sweep has run here"
    return [
        f"tree: {expected.selections} selections, {expected.trunks} trunks, {expected.forks} forks, "
        f"{expected.answers:,} answers",
        f"work: {expected.alone_flops / 1e12:,.2f} TFLOP trial by trial, {expected.shared_flops / 1e12:,.2f} shared: "
        f"{expected.gain:.1f} times less",
        f"time: {_duration(seconds / cluster.workers)} on {cluster.workers} workers ({measured})",
        f"GPU hours: {seconds / 3600 * cluster.gpus:,.2f}",
        f"disk: {_size(feature_bytes)} features, {_size(expected.result_bytes)} results",
    ]


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _size(count: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


if __name__ == "__main__":
    run_stage(plan)
