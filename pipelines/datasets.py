"""Benchmark tables → one table of questions and one of images, each image once."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nuwa.benchmarks import Benchmark, RecordError, image_size
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
    order: Callable[[Size], Any] = lambda size: (),
) -> None:
    """Read every benchmark from its folder; write ``examples.parquet`` sorted by image, and each image once.

    ``seen``: the size at which the model sees an image; truths told in pixels are told on it. ``order``: what images
    are sorted by before their digest, from their size: those of one value stand in row groups of their own. It raises
    ``ValueError`` for a size that the model does not take.

    Tables are read batch by batch and images wait on disk for their place, so memory does not grow with the images.
    """
    rows: list[dict] = []
    sizes: dict[str, Size] = {}
    orders: dict[str, Any] = {}
    images.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=images.parent) as waiting:
        places: dict[str, tuple[int, int]] = {}
        for text, folder in sources.items():
            name = BenchmarkName.parse(text)
            benchmark, source = name.benchmark(), f"{folder} ({name.table})"
            for example in benchmark.examples(read_benchmark(folder, name), source):
                digest = hashlib.sha256(example.image).hexdigest()
                example_id = name.table + example.example_id.removeprefix(benchmark.name)
                if digest not in sizes:
                    sizes[digest] = image_size(example.image)
                    orders[digest] = _ordered(order, sizes[digest], f"{source}: {example_id}")
                    places[digest] = (waiting.tell(), len(example.image))
                    waiting.write(example.image)
                width, height = sizes[digest]
                truth = example.truth
                if "size" in truth:
                    truth = {**truth, "size": list(seen((width, height)))}
                rows.append(
                    {
                        "example_id": example_id,
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
        _write_images(images, waiting, places, sizes, orders)
    rows.sort(key=lambda row: (row["image"], row["example_id"]))
    with atomic_path(examples) as path:
        pq.write_table(pa.Table.from_pylist(rows, EXAMPLES), path)


def _ordered(order: Callable[[Size], Any], size: Size, asked: str) -> Any:
    try:
        return order(size)
    except ValueError as error:
        raise RecordError(
            f"{asked}: an image of {size[0]}x{size[1]} pixels: the model takes no such image ({error}); take its rows "
            "out of the table"
        ) from None


def _write_images(
    target: Path,
    waiting: BinaryIO,
    places: Mapping[str, tuple[int, int]],
    sizes: Mapping[str, Size],
    orders: Mapping[str, Any],
) -> None:
    """Images as features are encoded, so that whoever reads one after the other reads every row group once.

    ``places``: start and length of each image in ``waiting``.
    """
    digests = sorted(places, key=lambda digest: (orders[digest], digest))
    with atomic_path(target) as fresh, pq.ParquetWriter(fresh, IMAGES) as writer:
        for _, found in itertools.groupby(digests, key=orders.__getitem__):
            alike = list(found)
            for first in range(0, len(alike), IMAGES_PER_ROW_GROUP):
                group, content = alike[first : first + IMAGES_PER_ROW_GROUP], []
                for digest in group:
                    start, length = places[digest]
                    waiting.seek(start)
                    content.append(waiting.read(length))
                widths, heights = zip(*(sizes[digest] for digest in group), strict=True)
                columns = {"image": group, "width": widths, "height": heights, "bytes": content}
                writer.write_table(pa.table(columns, schema=IMAGES))


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
