"""Say what would run, what it shares, what it costs, and how much of that is missing. Like every stage it checks
everything first; it reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor

from nuwa.vlm import Adapter, adapter_class
from nuwa.vlm.shapes import model_shape
from pipelines.datasets import choose_questions
from pipelines.features import signal_bytes, store_identity
from pipelines.grid import Layouts, Trial, expand
from pipelines.identity import recall
from pipelines.plan import (
    Costs,
    Example,
    Forecast,
    forecast,
    image_layouts,
    plan_units,
    read_examples,
    sweep_costs,
)
from pipelines.progress import duration, worker_speed
from pipelines.results import ResultStore
from pipelines.settings import Settings
from pipelines.sweep import answer_context
from stages.entry import EXAMPLES, MODEL, RESULT_STORE, UNITS_LOG, planned_trials, run_stage


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
    costs = sweep_costs(vlm, questions.examples)
    expected = forecast(trials, costs)
    widths = vlm.signal_widths(vlm.model.config)
    store = sum(signal_bytes(widths, layout, settings.features) for layout in layouts.values())
    speed = worker_speed(UNITS_LOG, settings.cluster)
    read = partial(read_examples, questions.examples, layouts=layouts)
    for line in describe(expected, store, settings, speed) + compare(trials, read, costs, settings, speed):
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


def describe(expected: Forecast, feature_bytes: int, settings: Settings, speed: float) -> list[str]:
    """The forecast of the whole grid in words, whatever is stored already."""
    cluster = settings.cluster
    seconds = expected.seconds(speed)
    measured = "as measured here" if UNITS_LOG.exists() else "a guess until a sweep has run here"
    return [
        f"tree: {expected.selections} selections, {expected.trunks} trunks, {expected.forks} forks, "
        f"{expected.answers:,} answers",
        f"work: {expected.alone_flops / 1e12:,.2f} TFLOP trial by trial, {expected.shared_flops / 1e12:,.2f} shared: "
        f"{expected.gain:.1f} times less",
        f"time: {duration(seconds / cluster.workers)} on {cluster.workers} workers ({measured})",
        f"GPU hours: {seconds / 3600 * cluster.gpus:,.2f}",
        f"disk: {_size(feature_bytes)} features, {_size(expected.result_bytes)} results",
    ]


def compare(
    trials: list[Trial],
    read: Callable[[str], list[Example]],
    costs: Sequence[Costs],
    settings: Settings,
    speed: float,
) -> list[str]:
    """How many answers are stored, and what those to come would take.

    ``read``: the questions, for an answer context. ``speed``: a worker's FLOP/s.
    """
    asked, cluster = settings.sweep, settings.cluster
    stored = ResultStore(asked.store or RESULT_STORE).done()
    if not stored:
        return []
    model = recall(MODEL, Path(settings.model.path), settings.model.dtype)
    if model is None:
        return [f"stored: {len(stored)} units; which answers are this model's is known once a sweep has loaded it"]
    context = answer_context(
        model.model,
        store_identity(model.encoder, settings.features.dtype, settings.features.keep),
        settings.model.attention,
    )
    examples = read(context)
    held = [(unit.trials, unit.examples) for unit in stored]
    units, cached = plan_units(trials, examples, held, costs, speed, asked.unit_images)
    missing, flops = len(trials) * len(examples) - cached, sum(unit.flops for unit in units.values())
    seconds = flops / speed
    return [
        f"stored: {cached:,} of {cached + missing:,} answers",
        f"to come: {missing:,} answers, {flops / 1e12:,.2f} TFLOP, {duration(seconds / cluster.workers)}, "
        f"{seconds / 3600 * cluster.gpus:,.2f} GPU hours",
    ]


def _size(count: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


if __name__ == "__main__":
    run_stage(plan)
