"""``prepare``: questions and images the sweep reads, from the testbed (made here in the published schemas) or from
published tables in folders or on the hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoProcessor, PretrainedConfig

from nuwa.layout import layout_order
from nuwa.testbed.benchmark import make_testbed_benchmark
from nuwa.vlm import Qwen2_5VLAdapter, adapter_class
from nuwa.vlm.shapes import model_shape, usual_image_processor
from pipelines.datasets import Size, write_examples
from pipelines.settings import PrepareSettings, Settings
from pipelines.tables import BenchmarkName, fetch_tables
from stages.entry import BENCHMARKS, EXAMPLES, IMAGES, published, run_stage


def prepare(settings: Settings) -> None:
    plan = settings.prepare
    shutil.rmtree(BENCHMARKS, ignore_errors=True)
    BENCHMARKS.mkdir(parents=True)
    if plan.tables is None:
        sources = make_testbed(plan, BENCHMARKS)
    else:
        sources = {name: fetch_tables(location, BenchmarkName.parse(name)) for name, location in plan.tables.items()}
    path, style = settings.model.path, settings.model.prompt_style
    told_in_pixels = any(BenchmarkName.parse(name).benchmark().variant == "pixels" for name in sources)
    seen = seen_by(path) if told_in_pixels else lambda size: size
    write_examples(sources, style, EXAMPLES, IMAGES, seen, reading_order(path))


def reading_order(path: str) -> Callable[[Size], Any]:
    """By what images are sorted for the model of ``path``: where they have layouts of their own, by layout, as
    features are encoded. Raises ``ValueError`` for an image the model does not take."""
    config = model_shape(published(path))
    family = adapter_class(config.model_type)
    if not family.dynamic:
        return lambda size: ()
    try:
        image_processor = AutoProcessor.from_pretrained(path).image_processor
    except OSError:  # not at hand yet; the order changes no result
        image_processor = usual_image_processor(config)
    return cache(lambda size: layout_order(family.layout_for(config, image_processor, size)))


def make_testbed(plan: PrepareSettings, folder: Path) -> dict[str, Path]:
    """Draw the testbed's tables into ``folder``; which of them each benchmark reads."""
    tasks = {BenchmarkName.parse(name).name: count for name, count in plan.questions.items()}
    make_testbed_benchmark(folder, plan.images, tasks, plan.seed)
    return dict.fromkeys(plan.questions, folder)


def prepare_testbed(plan: PrepareSettings, style: str, folder: Path) -> pd.DataFrame:
    """The testbed's questions as ``prepare`` writes them, made in ``folder``."""
    write_examples(make_testbed(plan, folder), style, folder / EXAMPLES.name, folder / IMAGES.name)
    return pd.read_parquet(folder / EXAMPLES.name)


def seen_by(path: str) -> Callable[[Size], Size]:
    """The size at which the model of ``path`` sees an image; its weights are not needed."""
    config = model_shape(path)
    return seen_size(config, AutoProcessor.from_pretrained(path).image_processor)


def seen_size(config: PretrainedConfig, image_processor: Any) -> Callable[[Size], Size]:
    """Qwen2.5-VL sees images resized to whole merged patches and tells boxes on those; others on the image itself."""
    if config.model_type != "qwen2_5_vl":
        return lambda size: size
    vision = config.vision_config
    cell = vision.patch_size * vision.spatial_merge_size

    def seen(size: Size) -> Size:
        (view,) = Qwen2_5VLAdapter.layout_for(config, image_processor, size).views
        return view.grid.width * cell, view.grid.height * cell

    return seen


if __name__ == "__main__":
    run_stage(prepare)
