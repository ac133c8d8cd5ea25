"""Benchmark tables → one table of questions and one of images, each image once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nuwa.benchmarks import Benchmark, check_schema, get_benchmark, image_size
from nuwa.benchmarks.gqa import join_images
from pipelines.atomic import atomic_path
from pipelines.settings import SettingsError

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
IMAGES = pa.schema({"image": pa.string(), "bytes": pa.binary()})


def parse_name(name: str) -> Benchmark:
    """``pope`` or ``pope:first_sentence`` → the benchmark."""
    base, _, variant = name.partition(":")
    return get_benchmark(base, variant or None)


def read_benchmark(folder: Path, benchmark: Benchmark) -> pa.Table:
    """The published table of ``benchmark`` in ``folder``; GQA's two tables are joined."""
    if benchmark.name == "gqa":
        tables = [pq.read_table(folder / f"gqa_{part}.parquet") for part in ("instructions", "images")]
        return join_images(*tables)
    path = folder / f"{benchmark.name}.parquet"
    check_schema(pq.read_schema(path), benchmark, str(path))
    return pq.read_table(path)


def write_examples(folder: Path, names: Sequence[str], style: str, examples: Path, images: Path) -> None:
    """Read ``names`` from ``folder``; write ``examples.parquet`` and ``images.parquet`` sorted by content."""
    rows, contents = [], {}
    for name in names:
        benchmark = parse_name(name)
        for example in benchmark.examples(read_benchmark(folder, benchmark), str(folder / benchmark.name)):
            digest = hashlib.sha256(example.image).hexdigest()
            contents.setdefault(digest, example.image)
            width, height = image_size(example.image)
            rows.append(
                {
                    "example_id": example.example_id,
                    "benchmark": name,
                    "family": benchmark.family,
                    "image": digest,
                    "question": example.question,
                    "prompt": benchmark.prompt(example, style),
                    "truth": json.dumps(example.truth, sort_keys=True),
                    "category": example.category,
                    "width": width,
                    "height": height,
                    "max_new_tokens": benchmark.max_new_tokens,
                }
            )
    rows.sort(key=lambda row: (row["image"], row["example_id"]))
    with atomic_path(images) as path:
        content = [{"image": digest, "bytes": contents[digest]} for digest in sorted(contents)]
        pq.write_table(pa.Table.from_pylist(content, IMAGES), path)
    with atomic_path(examples) as path:
        pq.write_table(pa.Table.from_pylist(rows, EXAMPLES), path)


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
