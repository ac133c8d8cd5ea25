"""Where the published tables of a benchmark lie: Parquet files in a folder, or a dataset of the hub at a commit.

A benchmark is named ``<benchmark>[/<split>][:<variant>]``: ``pope``, ``refcoco/testA``, ``textvqa/validation:ocr``.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from nuwa.benchmarks import Benchmark, check_schema, get_benchmark
from nuwa.benchmarks.gqa import join_images
from nuwa.benchmarks.protocol import Source

HUB = "hub:"
PARTS = {"gqa": ("instructions", "images")}  # benchmarks published as two tables


class MissingTables(FileNotFoundError):
    """No Parquet files of a benchmark are where they should be."""


@dataclass(frozen=True)
class BenchmarkName:
    """``table``: name without the variant, which starts every example's id."""

    name: str
    split: str | None
    variant: str | None

    @classmethod
    def parse(cls, text: str) -> BenchmarkName:
        table, _, variant = text.partition(":")
        name, _, split = table.partition("/")
        return cls(name, split or None, variant or None)

    @property
    def table(self) -> str:
        return f"{self.name}/{self.split}" if self.split else self.name

    def benchmark(self) -> Benchmark:
        """Raises ``ValueError`` that lists what exists."""
        return get_benchmark(self.name, self.variant)


class HubAddress(NamedTuple):
    """``folder``: where in the dataset to look, ``""`` for all of it."""

    dataset: str
    folder: str
    commit: str


def hub_address(location: str) -> HubAddress | None:
    """The parts of ``hub:organisation/dataset/folder@commit``, the folder optional; None for a folder of this machine.

    Raises ``ValueError`` where the commit is missing: a dataset that moves is no record of a run.
    """
    if not location.startswith(HUB):
        return None
    name = r"\w[\w.-]*"
    match = re.fullmatch(rf"({name}/{name})((?:/\w[^/@]*)*)@({name})", location.removeprefix(HUB))
    if match is None:
        raise ValueError(
            f"{location!r} should read hub:organisation/dataset@commit, or hub:organisation/dataset/folder@commit where "
            "the dataset holds several configurations"
        )
    dataset, folder, commit = match.groups()
    return HubAddress(dataset, folder.removeprefix("/"), commit)


def fetch_tables(location: str, name: BenchmarkName) -> Path:
    """The folder that holds the tables of ``name``; of a hub dataset its files are downloaded once, and no others."""
    address = hub_address(location)
    if address is None:
        return Path(location)
    from huggingface_hub import snapshot_download

    base = f"{glob.escape(address.folder)}/" if address.folder else ""
    wanted = [base + pattern for pattern in _published_files(name)]
    try:
        home = snapshot_download(address.dataset, repo_type="dataset", revision=address.commit, allow_patterns=wanted)
    except (OSError, ValueError, RuntimeError) as error:  # what huggingface_hub and its HTTP client raise
        reason = " ".join(str(error).split())[:200]
        raise MissingTables(f"{location}: could not be fetched: {type(error).__name__}: {reason}") from None
    return Path(home) / address.folder


def _published_files(name: BenchmarkName) -> list[str]:
    """What :func:`read_benchmark` looks for, as patterns of ``fnmatch``, whose ``*`` crosses folders."""
    parts = PARTS.get(name.name)
    if name.split is None:
        return [f"{name.name}.parquet"] if parts is None else [f"{name.name}_{part}.parquet" for part in parts]
    split = glob.escape(name.split)
    homes = [""] if parts is None else [f"{split}_balanced_{part}/" for part in parts]
    files = [f"{split}.parquet", f"{split}-[0-9a-f]*.parquet"]
    return [f"{above}{home}{file}" for above in ("", "*/") for home in homes for file in files]


def read_benchmark(folder: Path, name: BenchmarkName) -> Source:
    """The published table of ``name`` under ``folder``; GQA's two tables are joined.

    Without a split: ``<benchmark>.parquet``. With one: ``<split>.parquet`` or all of ``<split>-00000-of-00003.parquet``
    and on, in any sub-folder; GQA's lie in ``<split>_balanced_instructions`` and ``<split>_balanced_images``.
    Raises :class:`MissingTables` or ``SchemaError``.
    """
    parts = PARTS.get(name.name)
    if parts is None:
        files = [folder / f"{name.name}.parquet"] if name.split is None else _split_files(folder, name.split, name)
        return _open(files, name)
    if name.split is None:
        tables = [_existing(folder / f"{name.name}_{part}.parquet", name) for part in parts]
        return join_images(*(pq.read_table(path) for path in tables))
    tables = [_split_files(folder, name.split, name, f"{name.split}_balanced_{part}") for part in parts]
    return join_images(*(pq.read_table(files) for files in tables))


def _open(files: list[Path], name: BenchmarkName) -> Source:
    for path in files:
        check_schema(pq.read_schema(_existing(path, name)), name.benchmark(), str(path))
    return ds.dataset([str(path) for path in files], format="parquet")


def _existing(path: Path, name: BenchmarkName) -> Path:
    if not path.exists():
        raise MissingTables(f"{path}: no such file; it should hold the published table of {name.table}")
    return path


def _split_files(folder: Path, split: str, name: BenchmarkName, parent: str | None = None) -> list[Path]:
    """All files of ``split``, in order and complete, from the one folder (called ``parent``, if given) that has them."""
    pattern = re.compile(re.escape(split) + r"(-(\d+)-of-(\d+))?(-[0-9a-f]{16})?\.parquet")
    found: dict[Path, dict[int, Path]] = {}
    expected: dict[Path, int] = {}
    for path in sorted(folder.rglob("*.parquet")):
        match = pattern.fullmatch(path.name)
        if match and parent in (None, path.parent.name):
            found.setdefault(path.parent, {})[int(match[2] or 0)] = path
            expected[path.parent] = int(match[3] or 1)
    where = f"{folder}/**/{parent or ''}".rstrip("/")
    if not found:
        raise MissingTables(
            f"{where}: no {split}.parquet or {split}-00000-of-*.parquet for {name.table}; "
            "give the folder that holds the published files"
        )
    if len(found) > 1:
        raise MissingTables(
            f"{name.table}: several folders hold the split {split}: {', '.join(sorted(map(str, found)))}; name one, "
            "of a dataset of the hub as hub:organisation/dataset/folder@commit"
        )
    ((home, files),) = found.items()
    lost = sorted(set(range(expected[home])) - set(files))
    if lost:
        raise MissingTables(f"{home}: part {lost[0]} of {expected[home]} of {name.table} is missing; fetch it again")
    return [files[number] for number in sorted(files)]
