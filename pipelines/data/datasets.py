"""Benchmark tables → one table of questions and one of images, each image once."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nuwa.benchmarks import Benchmark, RecordError, image_size
from pipelines.addresses import BenchmarkName
from pipelines.data.image_keys import key_of
from pipelines.data.tables import read_benchmark
from pipelines.files.atomic import atomic_path
from pipelines.settings import SettingsError

SHOWN = pa.list_(pa.struct({"image": pa.string(), "width": pa.int32(), "height": pa.int32()}))
EXAMPLES = pa.schema(
    {
        "example_id": pa.string(),  # <benchmark>:<question id>[:<k>]
        "benchmark": pa.string(),
        "family": pa.string(),  # grounding | vqa
        "image": pa.string(),  # sha256 of the encoded image bytes; of several see pipelines.data.image_keys
        "question": pa.string(),  # as people read it
        "prompt": pa.string(),  # the text behind the image that the model gets
        "truth": pa.string(),  # JSON, see nuwa.benchmarks
        "category": pa.string(),
        "width": pa.int32(),  # of the first image
        "height": pa.int32(),
        "max_new_tokens": pa.int32(),
        "images": SHOWN,  # of a question about several images all of them; null where there is one
    }
)
IMAGES = pa.schema({"image": pa.string(), "width": pa.int32(), "height": pa.int32(), "bytes": pa.binary()})
IMAGES_PER_ROW_GROUP = 64
SEVERAL_IMAGES = "questions about several images left out, which the pipeline shows this model one at a time"
NOTES = b"notes"  # key of the metadata of examples.parquet


def parse_name(name: str) -> Benchmark:
    """``pope``, ``refcoco/testA``, ``pope:first_sentence`` or ``gqa/testdev@lmms_eval`` → the benchmark."""
    return BenchmarkName.parse(name).benchmark()


Size = tuple[int, int]  # width and height


def write_examples(
    sources: Mapping[str, Path],
    style: str,
    examples: Path,
    images: Path,
    *,
    seen: Callable[[Size], Size] = lambda size: size,
    order: Callable[[Size], Any] = lambda size: (),
    model_type: str = "",
    several: bool = True,
) -> dict[str, Counter[str]]:
    """Read every benchmark from its folder; write ``examples.parquet`` sorted by image, and each image once.

    Returns, by benchmark, how many questions the model is not shown whole or at all, by what it is not shown; the file
    says the same in its metadata, under ``NOTES``.

    ``seen``: the size at which the model sees an image; truths told in pixels are told on it. ``order``: what images
    are sorted by before their digest, from their size: those of one value stand in row groups of their own. It raises
    ``ValueError`` for a size that the model does not take. ``model_type``: of whose family answer limits are, where a
    protocol tells families apart; raises :class:`nuwa.benchmarks.ProtocolError` where it is not run on such a model.
    ``several``: whether the model can be asked about several images at once; else such questions are left out and counted.

    Tables are read batch by batch and images wait on disk for their place, so memory does not grow with the images.
    """
    rows: list[dict] = []
    notes: dict[str, Counter[str]] = {}
    images.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=images.parent) as file:
        waiting = _WaitingImages(file, order)
        for text, folder in sources.items():
            name = BenchmarkName.parse(text)
            benchmark, source = name.benchmark(), f"{folder} ({name.table})"
            limit, noted = benchmark.limit(model_type), Counter[str]()
            for example in benchmark.examples(read_benchmark(folder, name), source, noted, whole=True):
                if example.further and not several:
                    noted[SEVERAL_IMAGES] += 1
                    continue
                example_id = name.table + example.example_id.removeprefix(benchmark.name)
                shown = [waiting.add(image, f"{source}: {example_id}") for image in example.images]
                width, height = waiting.sizes[shown[0]]
                row: dict[str, Any] = {
                    "example_id": example_id,
                    "benchmark": text,
                    "family": benchmark.family,
                    "image": key_of(shown),
                }
                row |= {"images": [_placed(one, waiting.sizes[one]) for one in shown]} if example.further else {}
                row |= {"question": example.question, "prompt": benchmark.prompt(example, style)}
                row |= {"truth": _truth_text(example.truth, seen((width, height))), "category": example.category}
                rows.append(row | {"width": width, "height": height, "max_new_tokens": limit})
            if noted:
                notes[text] = noted
        waiting.write(images)

    rows.sort(key=lambda row: (row["image"], row["example_id"]))
    schema = EXAMPLES.with_metadata({NOTES: json.dumps(notes)}) if notes else EXAMPLES
    with atomic_path(examples) as path:
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return notes


def _placed(image: str, size: Size) -> dict[str, Any]:
    """An image as the column ``images`` has it."""
    return {"image": image, "width": size[0], "height": size[1]}


def _truth_text(truth: Mapping[str, Any], seen: Size) -> str:
    """As it stands in ``examples.parquet``; what is told in pixels is told at the size that the model sees."""
    return json.dumps({**truth, "size": list(seen)} if "size" in truth else truth, sort_keys=True)


def read_notes(examples: Path) -> dict[str, dict[str, int]]:
    """By benchmark, how many questions of ``examples.parquet`` the model is not shown whole or at all."""
    return json.loads((pq.read_schema(examples).metadata or {}).get(NOTES, b"{}"))


class _WaitingImages:
    """Images on their way to ``images.parquet``, each once: on disk until all are known, since they are sorted."""

    def __init__(self, file: BinaryIO, order: Callable[[Size], Any]) -> None:
        self.sizes: dict[str, Size] = {}
        self._file, self._order = file, order
        self._orders: dict[str, Any] = {}
        self._places: dict[str, tuple[int, int]] = {}  # start and length in the file

    def add(self, image: bytes, where: str) -> str:
        """The image's digest; raises :class:`RecordError`, naming ``where``, for a size the model does not take."""
        digest = hashlib.sha256(image).hexdigest()
        if digest not in self.sizes:
            width, height = self.sizes[digest] = image_size(image)
            try:
                self._orders[digest] = self._order((width, height))
            except ValueError as error:
                raise RecordError(
                    f"{where}: an image of {width}x{height} pixels: the model takes no such image ({error}); take its "
                    "rows out of the table"
                ) from None
            self._places[digest] = (self._file.tell(), len(image))
            self._file.write(image)
        return digest

    def write(self, target: Path) -> None:
        """As features are encoded, so that whoever reads one image after the other reads every row group once."""
        digests = sorted(self._places, key=lambda digest: (self._orders[digest], digest))
        with atomic_path(target) as fresh, pq.ParquetWriter(fresh, IMAGES) as writer:
            for _, of_one_order in itertools.groupby(digests, key=self._orders.__getitem__):
                alike = list(of_one_order)
                for first in range(0, len(alike), IMAGES_PER_ROW_GROUP):
                    writer.write_table(self._row_group(alike[first : first + IMAGES_PER_ROW_GROUP]))

    def _row_group(self, digests: list[str]) -> pa.Table:
        content = []
        for digest in digests:
            start, length = self._places[digest]
            self._file.seek(start)
            content.append(self._file.read(length))
        widths, heights = zip(*(self.sizes[digest] for digest in digests), strict=True)
        return pa.table({"image": digests, "width": widths, "height": heights, "bytes": content}, schema=IMAGES)


@dataclass(frozen=True)
class Questions:
    """The examples a sweep asks, and their images in a fixed order."""

    examples: pd.DataFrame
    images: tuple[str, ...]

    def of(self, images: Sequence[str]) -> list[pd.DataFrame]:
        """The examples of each of ``images``."""
        groups = self.examples.groupby("image", sort=False)
        return [groups.get_group(image) for image in images]


def image_line(images: Iterable[str], seed: int) -> list[str]:
    """``images`` in a seeded order: each one's place follows from ``seed`` and its name alone, whatever others there are."""
    return sorted(set(images), key=lambda image: hashlib.sha256(f"{seed} {image}".encode()).hexdigest())


def choose_questions(
    examples: pd.DataFrame, benchmarks: Sequence[str], images: int | Mapping[str, int] | None, seed: int
) -> Questions:
    """Examples of ``benchmarks`` about a seeded subset of each one's images, in file order.

    ``images``: how many of every benchmark, or by benchmark (those that are not named: all); null: all. Subsets are
    nested: the first so many in the seeded line, so that a larger number keeps what a smaller one had. One number takes
    all of a benchmark that has fewer. Raises :class:`SettingsError` when a benchmark has no examples, or there are fewer
    images than asked.
    """
    present = set(examples["benchmark"].unique())
    for name in benchmarks:
        if name not in present:
            raise SettingsError(
                f"sweep.benchmarks: {name!r} is not in the prepared data; it holds {', '.join(sorted(present))}"
            )
    chosen = examples[examples["benchmark"].isin(benchmarks)]
    if images is None:
        return Questions(chosen.reset_index(drop=True), tuple(sorted(chosen["image"].unique())))

    lines = {name: image_line(rows["image"].unique(), seed) for name, rows in chosen.groupby("benchmark")}
    most = max(map(len, lines.values()))
    if isinstance(images, int) and images > most:
        raise SettingsError(f"sweep.images = {images}: no benchmark of the prepared data has more than {most} images")
    counts = dict.fromkeys(lines, images) if isinstance(images, int) else images
    for name, count in counts.items():
        if name in lines and not isinstance(images, int) and count > len(lines[name]):
            raise SettingsError(f"sweep.images.{name} = {count}: the prepared data has {len(lines[name])} images of it")
    taken = {name: set(line[: counts.get(name, len(line))]) for name, line in lines.items()}
    places = zip(chosen["benchmark"].tolist(), chosen["image"].tolist(), strict=True)
    chosen = chosen[[image in taken[name] for name, image in places]]
    return Questions(chosen.reset_index(drop=True), tuple(sorted(chosen["image"].unique())))
