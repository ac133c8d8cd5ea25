"""Say what would run, what it shares, what it costs, and how much of that is missing. Like every stage it checks
everything first; it reads no weights.

Before ``prepare`` has run for these benchmarks, the questions are stand-ins: the testbed's are drawn, those of published
tables come from their published sizes. The rest is the same.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor

from nuwa.layout import VisualLayout
from nuwa.vlm import Adapter, adapter_class
from nuwa.vlm.shapes import SHAPES, model_shape
from pipelines.datasets import Questions, choose_questions
from pipelines.features import Loading, signal_bytes, store_identity
from pipelines.grid import Layouts, Trial, expand
from pipelines.identity import recall
from pipelines.plan import (
    SAMPLED,
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
from pipelines.published_sizes import expected_examples
from pipelines.results import ResultStore
from pipelines.settings import PARAMS_FILE, ModelSettings, Settings, SweepSettings, parse_settings
from pipelines.stand_in import StandInProcessor
from pipelines.sweep import answer_context
from stages.entry import EXAMPLES, MODEL, RESULT_STORE, UNITS_LOG, planned_trials, published, run_stage
from stages.experiment import experiment
from stages.prepare import prepare_testbed


def plan(settings: Settings) -> None:
    console = Console()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    console.print(_grids(settings, planned_trials(settings)))
    examples, remarks = prepared_examples(settings.sweep), []
    exact = examples is not None
    if examples is None:
        examples, remarks = expected(settings)
    for line in remarks:
        say(line)
    if examples.empty:
        say(f"{EXAMPLES} is not there yet: `dvc repro prepare` makes it, and the next plan says what this costs")
        return
    outlook = Outlook.of(settings, examples, exact)
    speed = worker_speed(UNITS_LOG, settings.cluster)
    lines = outlook.left_out + describe(outlook.forecast, outlook.feature_bytes, settings, speed)
    if exact:
        read = partial(read_examples, outlook.questions.examples, layouts=outlook.layouts)
        lines += compare(outlook.trials, read, outlook.costs, settings, speed)
    for line in lines:
        say(line)


def prepared_examples(asked: SweepSettings) -> pd.DataFrame | None:
    """What ``prepare`` wrote, where it holds all benchmarks that are asked."""
    if not EXAMPLES.exists():
        return None
    examples = pd.read_parquet(EXAMPLES)
    return examples if set(asked.benchmarks) <= set(examples["benchmark"]) else None


def expected(settings: Settings) -> tuple[pd.DataFrame, list[str]]:
    """Stand-ins for the questions that ``prepare`` will write, and what to say of them."""
    prepare, asked = settings.prepare, settings.sweep
    if prepare.tables is None:
        return _drawn(settings), ["estimate, `dvc repro prepare` has not run: on test scenes drawn for it"]
    examples, unknown = expected_examples(asked.benchmarks, settings.model.prompt_style)
    remarks = []
    if len(examples):
        questions, images = len(examples), examples["image"].nunique()
        remarks.append(
            "estimate, `dvc repro prepare` has not run for these benchmarks: from published sizes, "
            f"{questions:,} questions about {images:,} images of typical size; an image of several tables counts in each"
        )
    if unknown:
        remarks.append(f"not counted, sizes are not known: {', '.join(unknown)}")
    return examples, remarks


def _drawn(settings: Settings) -> pd.DataFrame:
    """The testbed's own questions; beyond ``SAMPLED`` scenes, copies of them."""
    wanted = settings.prepare.images
    with tempfile.TemporaryDirectory() as folder:
        some = settings.prepare.model_copy(update={"images": min(wanted, SAMPLED)})
        examples = prepare_testbed(some, settings.model.prompt_style, Path(folder))
    names = sorted(set(examples["image"]))
    copies = [
        examples.assign(image=examples["image"] + f" {copy}" * bool(copy)) for copy in range(-(-wanted // SAMPLED))
    ]
    more = (wanted - 1) % SAMPLED + 1  # scenes in the last copy
    copies[-1] = copies[-1][examples["image"].isin(names[:more])]
    return pd.concat(copies, ignore_index=True)


@dataclass(frozen=True)
class Outlook:
    """A sweep before it runs; ``layouts`` by image, ``left_out`` a line a grid that does without trials."""

    questions: Questions
    layouts: dict[str, VisualLayout]
    trials: list[Trial]
    costs: list[Costs]
    forecast: Forecast
    feature_bytes: int
    left_out: list[str]

    @classmethod
    def of(cls, settings: Settings, examples: pd.DataFrame, exact: bool) -> Outlook:
        """Of the questions in ``examples``. Stand-ins refuse nothing: what only they put out of reach is left out."""
        asked = settings.sweep
        if not exact:
            images = asked.images and min(asked.images, examples["image"].nunique())
            grids = [entry.model_copy(update={"where_reachable": True}) for entry in asked.grids]
            present = [name for name in asked.benchmarks if name in set(examples["benchmark"])]
            asked = asked.model_copy(update={"images": images, "grids": grids, "benchmarks": present})
        questions = choose_questions(examples, asked.benchmarks, asked.images, asked.subset_seed)
        vlm = weightless(settings.model)
        layouts = image_layouts(vlm, questions.examples)
        left_out: list[str] = []
        trials = expand(asked, Layouts.of(layouts.values(), vlm.dynamic), vlm.layers, left_out.append)
        costs = sweep_costs(vlm, questions.examples)
        widths = vlm.signal_widths(vlm.model.config)
        store = sum(signal_bytes(widths, layout, settings.features) for layout in layouts.values())
        return cls(questions, layouts, trials, costs, forecast(trials, costs), store, left_out)


def weightless(settings: ModelSettings) -> Adapter:
    """The model's shape and processor; no weights are read. Of a published checkpoint neither must be at hand."""
    path, known = settings.path, published(settings.path)
    config = model_shape(known)
    family = adapter_class(config.model_type)
    with torch.device("meta"):
        model = family.model_class(config)
    if known in SHAPES and not Path(path).exists():
        try:
            processor = AutoProcessor.from_pretrained(known, local_files_only=True)
        except OSError:
            processor = StandInProcessor(config)
    else:
        processor = AutoProcessor.from_pretrained(path)
    return family(model, processor, conversation=settings.conversation, image_aspect_ratio=settings.image_aspect_ratio)


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
        f"time: {duration(seconds / cluster.workers)} on {cluster.workers} workers of {speed / 1e12:.2g} TFLOP/s ({measured})",
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
    model = recall(MODEL, Path(settings.model.path), *Loading.of(settings.model, settings.cluster).identity)
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


def plan_experiment(name: str) -> None:
    """The plan of an experiment, which ``params.yaml`` need not hold yet."""
    plan(parse_settings(experiment(name), f"{PARAMS_FILE} with {name}"))


if __name__ == "__main__":
    run_stage(plan if len(sys.argv) == 1 else lambda _: plan_experiment(" ".join(sys.argv[1:])))
