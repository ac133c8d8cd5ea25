"""Benchmark tables → one table of questions and one of images, each image once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nuwa.benchmarks import Benchmark, image_size
from pipelines.atomic import atomic_path
from pipelines.settings import SettingsError
from pipelines.tables import BenchmarkName, read_benchmark

EXAMPLES = pa.schema(
    {
        "example_id": pa.string(),  # <benchmark>:<question id>[:<k>]
        "benchmark": pa.string(),
        "family": pa.string(),  # grounding | vqa
        "image": pa.string(),  # sha256 of the encoded image bytes
        "question": pa.string(),  # as people read it
        "prompt": pa.string(),  # the text behind the image that the model gets
        "truth": pa.string(),  # JSON, see nuwa.benchmarks
        "category": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "max_new_tokens": pa.int32(),
    }
)
IMAGES = pa.schema({"image": pa.string(), "width": pa.int32(), "height": pa.int32(), "bytes": pa.binary()})
IMAGES_PER_ROW_GROUP = 64


def parse_name(name: str) -> Benchmark:
    """``pope``, ``refcoco/testA`` or ``pope:first_sentence`` → the benchmark."""
    return BenchmarkName.parse(name).benchmark()


Size = tuple[int, int]  # width and height


def write_examples(
    sources: Mapping[str, Path],
    style: str,
    examples: Path,
    images: Path,
    seen: Callable[[Size], Size] = lambda size: size,
) -> None:
    """Read every benchmark from its folder; write ``examples.parquet`` sorted by image, and each image once.

    ``seen``: the size at which the model sees an image; truths told in pixels are told on it.

    Tables are read batch by batch and images written as they come, so memory does not grow with the images.
    """
    rows: list[dict] = []
    sizes: dict[str, tuple[int, int]] = {}
    with atomic_path(images) as fresh, pq.ParquetWriter(fresh, IMAGES) as writer:
        pending: dict[str, bytes] = {}
        for text, folder in sources.items():
            name = BenchmarkName.parse(text)
            benchmark = name.benchmark()
            for example in benchmark.examples(read_benchmark(folder, name), f"{folder} ({name.table})"):
                digest = hashlib.sha256(example.image).hexdigest()
                if digest not in sizes:
                    sizes[digest] = image_size(example.image)
                    pending[digest] = example.image
                if len(pending) == IMAGES_PER_ROW_GROUP:
                    _flush(writer, pending, sizes)
                width, height = sizes[digest]
                truth = example.truth
                if "size" in truth:
                    truth = {**truth, "size": list(seen((width, height)))}
                rows.append(
                    {
                        "example_id": name.table + example.example_id.removeprefix(benchmark.name),
                        "benchmark": text,
                        "family": benchmark.family,
                        "image": digest,
                        "question": example.question,
                        "prompt": benchmark.prompt(example, style),
                        "truth": json.dumps(truth, sort_keys=True),
                        "category": example.category,
                        "width": width,
                        "height": height,
                        "max_new_tokens": benchmark.max_new_tokens,
                    }
                )
        _flush(writer, pending, sizes)
    rows.sort(key=lambda row: (row["image"], row["example_id"]))
    with atomic_path(examples) as path:
        pq.write_table(pa.Table.from_pylist(rows, EXAMPLES), path)


def _flush(writer: pq.ParquetWriter, pending: dict[str, bytes], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Write the ``pending`` images as one row group and forget them."""
    if pending:
        widths, heights = zip(*(sizes[image] for image in pending), strict=True)
        columns = {"image": list(pending), "width": widths, "height": heights, "bytes": list(pending.values())}
        writer.write_table(pa.table(columns, schema=IMAGES))
        pending.clear()


@dataclass(frozen=True)
class Questions:
    """The examples a sweep asks, and their images in a fixed order."""

    examples: pd.DataFrame
    images: tuple[str, ...]

    def of(self, images: Sequence[str]) -> list[pd.DataFrame]:
        """The examples of each of ``images``."""
        groups = self.examples.groupby("image", sort=False)
        return [groups.get_group(image) for image in images]


def choose_questions(examples: pd.DataFrame, benchmarks: Sequence[str], images: int | None, seed: int) -> Questions:
    """Examples of ``benchmarks`` about a seeded subset of ``images`` images (null: all), in file order.

    Raises :class:`SettingsError` when a benchmark has no examples or there are fewer images than asked.
    """
    present = set(examples["benchmark"])
    for name in benchmarks:
        if name not in present:
            raise SettingsError(
                f"sweep.benchmarks: {name!r} is not in the prepared data; it holds {', '.join(sorted(present))}"
            )
    chosen = examples[examples["benchmark"].isin(benchmarks)]
    names = sorted(set(chosen["image"]))
    if images is not None:
        if images > len(names):
            raise SettingsError(f"sweep.images = {images}: the prepared data has {len(names)} images")
        names = sorted(np.random.default_rng(seed).choice(names, size=images, replace=False).tolist())
        chosen = chosen[chosen["image"].isin(names)]
    return Questions(chosen.reset_index(drop=True), tuple(names))
