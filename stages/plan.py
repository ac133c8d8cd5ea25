"""Say what would run, what it shares, what it costs, and how much of that is missing. Like every stage it checks
everything first; it reads no weights. :mod:`stages.doctor` looks over whatever a run will touch: its errors end the plan with
exit code 2, its warnings do not. ``DEEP=1`` in the environment has it read everything.

Before ``prepare`` has run for these benchmarks, the questions are stand-ins: the testbed's are drawn, those of published
tables come from their published sizes. The rest is the same.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from nuwa.image_rules import PINS, QWENS
from nuwa.layout import VisualLayout, images_of
from nuwa.plugins import plugin_modules
from nuwa.stage1.learnpruner import WeightsError
from nuwa.vlm import Adapter, adapter_class
from nuwa.vlm.processors import load_processor
from nuwa.vlm.remembered import folder_memory
from nuwa.vlm.shapes import SHAPES, model_shape
from nuwa.vlm.weights import shape_numbers, stored_numbers
from pipelines.addresses import BenchmarkName
from pipelines.data.datasets import Questions, choose_questions
from pipelines.data.left_out import without
from pipelines.data.published_sizes import expected_examples
from pipelines.features.identity import ModelIdentity
from pipelines.features.known_code import remembered_code
from pipelines.features.layouts import image_layouts
from pipelines.features.loading import Loading
from pipelines.features.signals import signal_bytes
from pipelines.features.stand_in import StandInProcessor
from pipelines.presets import preset_path
from pipelines.settings import (
    PARAMS_FILE,
    ClusterSettings,
    ModelSettings,
    Settings,
    SweepSettings,
    parse_settings,
    read_yaml,
)
from pipelines.sweep.askable import unaskable
from pipelines.sweep.costs import SAMPLED, Costs, Forecast, forecast, sweep_costs
from pipelines.sweep.engine import blocks_of, priced, pulled_tables, with_weights
from pipelines.sweep.identity import answer_context, code_of, context_key, with_code
from pipelines.sweep.progress import duration, worker_speed
from pipelines.sweep.results import ResultStore, StoredUnit
from pipelines.sweep.reuse import Changes, explain, summary
from pipelines.sweep.trials import Layouts, Trial, expand
from pipelines.sweep.units import WorkUnit, plan_units, read_examples
from stages.doctor import Finding, examine, memory_for, memory_here, room_for
from stages.entry import BAD_INPUT, EXAMPLES, UNITS_LOG, known_shape, places, planned_trials, published, run_stage
from stages.experiment import experiment
from stages.prepare import prepare_testbed

NAMED_LAYOUTS = 5  # of images, in a plan


def plan(settings: Settings) -> None:
    console = Console()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    findings = examine(settings, deep=bool(os.environ.get("DEEP")))
    tell(findings)
    if any(finding.level == "error" for finding in findings):
        sys.exit(BAD_INPUT)

    console.print(_grids(settings, planned_trials(settings)))
    examples = prepared_examples(settings.sweep)
    remarks: list[str] = []
    exact = examples is not None
    if examples is None:
        examples, remarks = expected(settings)
    for line in remarks:
        say(line)
    if examples.empty:
        say(f"{EXAMPLES} is not there yet: `dvc repro prepare` makes it, and the next plan says what this costs")
        return

    outlook = Outlook.of(settings, examples, exact)
    if Path(settings.model.path).is_dir():
        folder_memory(settings.model.path).save()  # what was asked of its processor
    speed = worker_speed(UNITS_LOG, settings.cluster)
    lines = [*outlook.left_out, *pixel_limits(outlook.vlm, settings), image_tokens(outlook.layouts.values())]
    lines += describe(outlook.forecast, outlook.feature_bytes, settings, speed)
    if exact:
        lines += compare(outlook, settings, speed, each=bool(os.environ.get("EXPLAIN")))
    for line in lines:
        say(line)
    tell(room_for(settings, outlook.feature_bytes, outlook.forecast.result_bytes))
    if numbers := weight_numbers(settings.model.path):
        tell(memory_for(settings, numbers, **memory_here()))


def weight_numbers(path: str) -> int | None:
    """How many numbers a model's weights are; null where its files do not say."""
    if Path(path).is_dir():
        return stored_numbers(Path(path))
    config = known_shape(path)
    return shape_numbers(adapter_class(config.model_type).model_class, config)


def tell(findings: Iterable[Finding]) -> None:
    for finding in findings:
        print(finding, file=sys.stderr)


def prepared_examples(sweep: SweepSettings) -> pd.DataFrame | None:
    """What ``prepare`` wrote, where it holds all benchmarks of ``sweep``."""
    if not EXAMPLES.exists():
        return None
    examples = pd.read_parquet(EXAMPLES)
    return examples if set(sweep.benchmarks) <= set(examples["benchmark"].unique()) else None


def expected(settings: Settings) -> tuple[pd.DataFrame, list[str]]:
    """Stand-ins for the questions that ``prepare`` will write, and what to say of them."""
    prepare = settings.prepare
    if prepare.tables is None:
        return _drawn(settings), ["estimate, `dvc repro prepare` has not run: on test scenes drawn for it"]
    examples, unknown = expected_examples(
        settings.sweep.benchmarks, settings.model.prompt_style, known_shape(settings.model.path).model_type
    )
    remarks = []
    if len(examples):
        questions, images = len(examples), examples["image"].nunique()
        remarks.append(
            "estimate, `dvc repro prepare` has not run for these benchmarks: from published sizes, "
            f"{questions:,} questions about {images:,} images of typical size; an image of several tables counts in each"
        )
    if unknown:
        tables = dict.fromkeys(BenchmarkName.parse(name).table for name in unknown)
        remarks.append(f"not counted, sizes are not known: {', '.join(tables)}")
    return examples, remarks


def _drawn(settings: Settings) -> pd.DataFrame:
    """The testbed's own questions; beyond ``SAMPLED`` scenes, copies of them."""
    wanted = settings.prepare.images
    with tempfile.TemporaryDirectory() as folder:
        some = settings.prepare.model_copy(update={"images": min(wanted, SAMPLED)})
        examples = prepare_testbed(some, settings.model.prompt_style, Path(folder))
    names = sorted(examples["image"].unique())
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
    vlm: Adapter

    @classmethod
    def of(cls, settings: Settings, examples: pd.DataFrame, exact: bool) -> Outlook:
        """Of the questions in ``examples``. Stand-ins refuse nothing: what only they put out of reach is left out."""
        sweep = settings.sweep
        if not exact:
            images = _at_most(sweep.images, examples)
            grids = [entry.model_copy(update={"where_reachable": True}) for entry in sweep.grids]
            known = set(examples["benchmark"].unique())
            present = [name for name in sweep.benchmarks if name in known]
            sweep = sweep.model_copy(update={"images": images, "grids": grids, "benchmarks": present})

        questions = choose_questions(examples, sweep.benchmarks, sweep.images, sweep.subset_seed)
        vlm = weightless(settings.model)
        layouts = image_layouts(vlm, questions.examples)
        left_out: list[str] = []
        counted = Layouts.of(layouts.values(), vlm.dynamic)
        trials = expand(sweep, counted, vlm.layers, left_out.append)
        reasons = unaskable(vlm, questions.examples)
        if reasons:
            left_out.append(f"{len(reasons)} questions cannot be asked, first {next(iter(reasons.values()))}")
            questions = replace(questions, examples=without(questions.examples, reasons))

        costs = sweep_costs(vlm, priced(settings, questions.examples))
        widths = vlm.signal_widths(vlm.model.config)
        store = sum(count * signal_bytes(widths, layout, settings.features) for layout, count in counted.counts.items())
        return cls(questions, layouts, trials, costs, forecast(trials, costs), store, left_out, vlm)


def _at_most(images: int | dict[str, int] | None, examples: pd.DataFrame) -> dict[str, int] | None:
    """How many images of every benchmark are asked for, and no more than its stand-ins have."""
    if images is None:
        return None
    held = examples.groupby("benchmark")["image"].nunique()
    wanted = images if isinstance(images, dict) else dict.fromkeys(held.index, images)
    return {name: min(wanted[name], int(count)) for name, count in held.items() if name in wanted}


def weightless(settings: ModelSettings) -> Adapter:
    """The model's shape and processor; no weights are read. Of a published checkpoint neither must be at hand."""
    path, known = settings.path, published(settings.path)
    framing: dict[str, Any] = {
        "conversation": settings.conversation,
        "image_aspect_ratio": settings.image_aspect_ratio,
        "image_rules": settings.images,
    }
    if settings.text_tower is not None and Path(settings.text_tower).is_dir():  # part of what answers are known by
        framing["text_tower"] = settings.text_tower
    if Path(path).is_dir():
        memory = folder_memory(path)
        family = adapter_class(memory.config().model_type)
        outline: Any = memory.outline(family, settings.attention)
        return family(outline, memory.processor(settings.image_backend), **framing)

    config = model_shape(known)
    family = adapter_class(config.model_type)
    with torch.device("meta"):
        model = family.model_class(config)
    processor: Any = StandInProcessor(config)
    if known not in SHAPES:
        processor = load_processor(path, settings.image_backend)
    elif not Path(path).exists():
        with contextlib.suppress(OSError):
            processor = load_processor(known, settings.image_backend, local_files_only=True)
    return family(model, processor, **framing)


def _grids(settings: Settings, trials: list[Trial]) -> Table:
    table = Table(title=f"{len(trials)} trials", title_justify="left")
    for name in ("grid", "trials", "methods", "average tokens"):
        table.add_column(name, justify="left")
    for name in dict.fromkeys(entry.name for entry in settings.sweep.grids):
        of_grid = [trial for trial in trials if name in trial.grids]
        averages = sorted({trial.schedule.average_tokens for trial in of_grid})
        methods = ", ".join(sorted({trial.spec.method for trial in of_grid}))
        table.add_row(name, str(len(of_grid)), methods, ", ".join(f"{value:g}" for value in averages))
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
        f"time: {_time(seconds, cluster)} on {cluster.workers} workers of {speed / 1e12:.2g} TFLOP/s ({measured})",
        f"GPU hours: {seconds / 3600 * cluster.gpus:,.2f}",
        f"disk: {_size(feature_bytes)} features, {_size(expected.result_bytes)} results",
    ]


def pixel_limits(vlm: Adapter, settings: Settings) -> list[str]:
    """A line of how many pixels an image may have, and by whose rules, where a family has such limits."""
    if vlm.model.config.model_type not in QWENS:
        return []
    image_processor, rules = vlm.processor.image_processor, settings.model.images
    least, most = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    own = " and ".join(f"model.{name}" for name in ("min_pixels", "max_pixels") if getattr(rules, name) is not None)
    pinned = vlm.model.config.model_type in PINS[rules.protocol]
    by = [*([own] if own else []), f"the protocol {rules.protocol}" if pinned else "the checkpoint"]
    line = f"pixels an image: {least:,} to {most:,}, by {' and '.join(by)}"

    first = getattr(image_processor, "first_resize", None)
    if first is not None and first != (least, most):
        line += f"; resized before that to {first[0]:,} to {first[1]:,}"
    return [line]


def image_tokens(layouts: Iterable[VisualLayout]) -> str:
    """How many tokens an image has before anything is pruned, fixed tokens included: on average and layout by layout, the
    most frequent first. Of several images in one question each counts by itself."""
    counts = Counter(image for layout in layouts for image in images_of(layout))
    average = sum(layout.tokens * count for layout, count in counts.items()) / counts.total()
    named = [
        f"{_grids_of(layout)} = {layout.tokens:,} of {count:,} images"
        for layout, count in counts.most_common(NAMED_LAYOUTS)
    ]
    if len(counts) > NAMED_LAYOUTS:
        named.append(f"{len(counts) - NAMED_LAYOUTS:,} further layouts")
    return f"tokens an image: {average:,.1f} on average; {', '.join(named)}"


def _grids_of(layout: VisualLayout) -> str:
    grids = [(view.grid.height, view.grid.width + view.newline) for view in layout.views]
    parts = [f"{rows} x {columns}" for rows, columns in grids]
    beside = layout.tokens - sum(rows * columns for rows, columns in grids)
    return " + ".join([*parts, f"{beside} {layout.fixed_name}"] if beside else parts)


def compare(outlook: Outlook, settings: Settings, speed: float, *, each: bool = False) -> list[str]:
    """How many answers are stored, what those to come would take, and why they are to come.

    ``speed``: a worker's FLOP/s. ``each``: a line a trial that lacks answers.
    """
    sweep, cluster = settings.sweep, settings.cluster
    where = places(settings)
    store = ResultStore(where.results)
    stored = store.done()
    if not stored and not where.facts.exists():
        return []
    if not Path(settings.model.path).is_dir():
        return [f"stored: {len(stored)} units; which answers are this model's is known once its files are here"]
    known = ModelIdentity.of(settings.model.path, Loading.of(settings.model, cluster), outlook.vlm)
    with contextlib.nullcontext() if plugin_modules(settings.plugins) else remembered_code():
        context = answer_context(known, outlook.vlm, settings.features)
        trials = outlook.trials
        with contextlib.suppress(WeightsError):  # a repro trains them first
            trials = with_weights(trials, known.fingerprint, settings.model.path)
        trials = with_code(trials, outlook.vlm, cluster.device)
    examples = read_examples(outlook.questions.examples, context.digest, outlook.layouts, blocks_of(settings))

    def planned() -> tuple[dict[str, WorkUnit], int]:
        held = [(unit.trials, unit.examples) for unit in stored]
        return plan_units(trials, examples, held, outlook.costs, speed, sweep.unit_images, reuse=sweep.reuse)

    units, cached = planned()
    if units and (pulled := pulled_tables(where, settings, outlook.vlm, context_key(context), context.digest)):
        stored = [*stored, pulled.as_stored()]  # as the sweep will, before it asks
        units, cached = planned()
    if not stored:
        return []
    missing, flops = len(trials) * len(examples) - cached, sum(unit.flops for unit in units.values())
    seconds = flops / speed
    lines = [
        f"stored: {cached:,} of {cached + missing:,} answers",
        f"to come: {missing:,} answers, {flops / 1e12:,.2f} TFLOP, {_time(seconds, cluster)}, "
        f"{seconds / 3600 * cluster.gpus:,.2f} GPU hours",
    ]
    changes = Changes.since(store, context, [code_of(trial, outlook.vlm) for trial in trials])
    reasons = explain(trials, units.values(), stored, changes, sweep.reuse)
    lines += summary(reasons)
    if each:
        lines += [f"  {one.trial.label}: {one.answers:,} of {len(examples):,} to come: {one.reason}" for one in reasons]
    return lines + _old(stored)


def _old(stored: Sequence[StoredUnit]) -> list[str]:
    """A line about units that an earlier version of this project left."""
    count = sum(unit.provenance is None for unit in stored)
    return [f"{count} units of an earlier version's store are left alone; their answers are not taken"] if count else []


def _time(seconds: float, cluster: ClusterSettings) -> str:
    """``seconds`` of one worker's work, on as many as are asked for."""
    if cluster.workers == "auto":
        return f"{duration(seconds)} of one worker"
    return duration(seconds / cluster.workers)


def _size(count: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def plan_experiment(name: str) -> None:
    """The plan of an experiment, which ``params.yaml`` need not hold yet."""
    settings = parse_settings(experiment(name), f"{PARAMS_FILE} with {name}")
    for line in only_timed(name):
        print(line)
    plan(settings)


def only_timed(name: str) -> list[str]:
    """What to say where an experiment has no sweep of its own."""
    path = preset_path(name)
    if set(read_yaml(path.read_text(), str(path))) != {"profile"}:
        return []
    return [
        f"{name} sets what is timed, not what is swept: `make experiment profile PRESET={name}` runs it; the plan below is of "
        f"the sweep in {PARAMS_FILE}"
    ]


if __name__ == "__main__":
    run_stage(plan if len(sys.argv) == 1 else lambda _: plan_experiment(" ".join(sys.argv[1:])), needs_model=False)
