"""``prepare``: questions and images the sweep reads, from the testbed (made here in the published schemas) or from
published tables in folders or on the hub."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from nuwa.layout import layout_order
from nuwa.testbed.benchmark import make_testbed_benchmark
from nuwa.vlm import ImageRules, adapter_class, usual_image_processor
from nuwa.vlm.processors import load_processor
from nuwa.vlm.shapes import model_shape
from pipelines.addresses import BenchmarkName
from pipelines.data.datasets import Size, write_examples
from pipelines.data.tables import fetch_tables
from pipelines.files.atomic import atomic_folder
from pipelines.settings import PrepareSettings, Settings
from stages.entry import BENCHMARKS, EXAMPLES, IMAGES, published, run_stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AS_PUBLISHED = ImageRules()


def prepare(settings: Settings) -> None:
    plan = settings.prepare
    with atomic_folder(BENCHMARKS) as fresh:
        if plan.tables is None:
            make_testbed(plan, fresh)
    if plan.tables is None:
        sources = dict.fromkeys(plan.questions, BENCHMARKS)
    else:
        sources = {name: fetch_tables(location, BenchmarkName.parse(name)) for name, location in plan.tables.items()}

    path, style, rules = settings.model.path, settings.model.prompt_style, settings.model.images
    told_in_pixels = any(BenchmarkName.parse(name).benchmark().pixels for name in sources)
    seen = seen_by(path, rules) if told_in_pixels else lambda size: size
    model_type = model_shape(published(path)).model_type
    order = reading_order(path, rules)

    notes = write_examples(
        sources,
        style,
        EXAMPLES,
        IMAGES,
        seen=seen,
        order=order,
        model_type=model_type,
        several=adapter_class(model_type).alike,
    )

    for name, counts in notes.items():
        for note, count in counts.items():
            print(f"{name}: {note}: {count:,}")


def reading_order(path: str, rules: ImageRules = AS_PUBLISHED) -> Callable[[Size], Any]:
    """By what images are sorted for the model of ``path``: where they have layouts of their own, by layout, as
    features are encoded. Raises ``ValueError`` for an image the model does not take."""
    config = model_shape(published(path))
    family = adapter_class(config.model_type)
    if not family.dynamic:
        return lambda size: ()
    try:
        image_processor = load_processor(path, rules.backend).image_processor
    except OSError:  # not at hand yet; the order changes no result
        image_processor = usual_image_processor(config)
    framed = rules.framed(image_processor, config.model_type)
    return cache(lambda size: layout_order(family.layout_for(config, framed, size)))


def make_testbed(plan: PrepareSettings, folder: Path) -> dict[str, Path]:
    """Draw the testbed's tables into ``folder``; which of them each benchmark reads."""
    tasks = {BenchmarkName.parse(name).name: count for name, count in plan.questions.items()}
    make_testbed_benchmark(folder, plan.images, tasks, plan.seed)
    return dict.fromkeys(plan.questions, folder)


def prepare_testbed(plan: PrepareSettings, style: str, folder: Path) -> pd.DataFrame:
    """The testbed's questions as ``prepare`` writes them, made in ``folder``."""
    write_examples(make_testbed(plan, folder), style, folder / EXAMPLES.name, folder / IMAGES.name)
    return pd.read_parquet(folder / EXAMPLES.name)


def seen_by(path: str, rules: ImageRules = AS_PUBLISHED) -> Callable[[Size], Size]:
    """The size at which the model of ``path`` sees an image; its weights are not needed."""
    config = model_shape(path)
    image_processor = load_processor(path, rules.backend).image_processor
    return seen_size(config, rules.framed(image_processor, config.model_type))


def seen_size(config: PretrainedConfig, image_processor: Any) -> Callable[[Size], Size]:
    """The size of an image → that of the picture on which models of ``config`` tell boxes."""
    return partial(adapter_class(config.model_type).seen_size, config, image_processor)


if __name__ == "__main__":
    run_stage(prepare)
