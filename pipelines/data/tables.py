"""Where the published tables of a benchmark lie: Parquet files in a folder, or a dataset of the hub at a commit."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from nuwa.benchmarks import check_schema
from nuwa.benchmarks.own_tables import JsonLines
from nuwa.benchmarks.rows import ParquetFiles, Source
from nuwa.errors import UserError, in_one_line
from pipelines.addresses import BenchmarkName, hub_address
from pipelines.files.folders import linked_files

VERSIONED = {  # by their logs
    "_delta_log": "a Delta table",
    "metadata/*.metadata.json": "an Iceberg table",
    ".hoodie": "a Hudi table",
}
UNFINISHED = "_temporary"  # where Spark writes before it is done


class MissingTables(UserError, FileNotFoundError):
    """No Parquet files of a benchmark are where they should be."""


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
        reason = in_one_line(error)
        raise MissingTables(f"{location}: could not be fetched: {type(error).__name__}: {reason}") from None
    return Path(home) / address.folder


def _published_files(name: BenchmarkName) -> list[str]:
    """What :func:`read_benchmark` looks for, as patterns of ``fnmatch``, whose ``*`` crosses folders."""
    parts = name.benchmark().parts
    if name.split is None:
        return [f"{name.name}.parquet"] if not parts else [f"{name.name}_{part}.parquet" for part in parts]
    split = glob.escape(name.split)
    homes = [""] if not parts else [f"{split}_balanced_{part}/" for part in parts]
    files = [f"{split}.parquet", f"{split}-[0-9a-f]*.parquet"]
    return [f"{above}{home}{file}" for above in ("", "*/") for home in homes for file in files]


def read_benchmark(folder: Path, name: BenchmarkName) -> Source:
    """The published table of ``name`` under ``folder``; GQA's two tables are joined.

    Without a split: ``<benchmark>.parquet``. With one: ``<split>.parquet`` or all of ``<split>-00000-of-00003.parquet``
    and on, in any sub-folder; or else ``<benchmark>.jsonl`` or ``<split>.jsonl``. GQA's lie in ``<split>_balanced_instructions`` and ``<split>_balanced_images``. Each may be
    a link, or a folder of parts as Spark, Dask and others write it, whose sub-folders may name columns
    (``category=count``). Raises :class:`MissingTables`, ``SchemaError`` or ``UnreadableTable``.
    """
    if (lines := _json_lines(folder, name)) is not None:
        check_schema(lines.schema, name.benchmark(), str(lines.path))
        return lines
    tables, join = table_files(folder, name), name.benchmark().join
    if join is not None:
        return join(*tables)
    (table,) = tables
    for number, path in enumerate(table.files):
        check_schema(table.schema_of(number), name.benchmark(), str(path))
    return table


def table_files(folder: Path, name: BenchmarkName) -> list[ParquetFiles]:
    """The Parquet files that :func:`read_benchmark` reads, before they are looked into, none where it reads JSON Lines.

    Raises :class:`MissingTables`.
    """
    if _json_lines(folder, name) is not None:
        return []
    parts = name.benchmark().parts
    if name.split is None:
        names = [f"{name.name}_{part}" for part in parts] or [name.name]
        return [_parquet([folder / f"{one}.parquet"], name) for one in names]
    homes: list[str | None] = [f"{name.split}_balanced_{part}" for part in parts]
    homes = homes or [None]
    return [_parquet(_split_files(folder, name.split, name, home), name) for home in homes]


def _json_lines(folder: Path, name: BenchmarkName) -> JsonLines | None:
    """The table as JSON Lines, where there is one and no Parquet file beside it."""
    path = folder / f"{name.split or name.name}.jsonl"
    return JsonLines(path) if path.is_file() and not path.with_suffix(".parquet").exists() else None


def _parquet(places: list[Path], name: BenchmarkName) -> ParquetFiles:
    """Files as they are, folders as the parts in them."""
    files: list[Path] = []
    partitions: list[dict[str, str]] = []
    for place in places:
        if not place.exists():
            where = f"a link to {place.readlink()}, which is not there" if place.is_symlink() else "no such file"
            raise MissingTables(f"{place}: {where}; it should hold the published table of {name.table}")
        if not place.is_dir():
            files.append(place)
            partitions.append({})
            continue

        held = _parts(place, name)
        if not held:
            raise MissingTables(f"{place}: a folder without parts; it should hold the published table of {name.table}")
        # Spark's and Hive's folders say what a column holds by their names.
        for path in held:
            between = path.parent.relative_to(place).parts
            partitions.append(dict(folder.split("=", 1) for folder in between if "=" in folder))
            files.append(path)
    return ParquetFiles(files, partitions)


def _parts(place: Path, name: BenchmarkName) -> list[Path]:
    """The parts in a folder; what its writers keep beside them (``_SUCCESS``, ``.part-0.crc``) is passed over, in folders
    too, as Spark and Arrow do.

    Raises :class:`MissingTables` where not all that lies there is of the table.
    """
    for log, kind in VERSIONED.items():
        if next(place.glob(log), None) is not None:
            raise MissingTables(
                f"{place}: {kind}, of whose files only its own library knows which count; write the table of {name.table} "
                "as Parquet with it"
            )
    if (place / UNFINISHED).exists():
        raise MissingTables(f"{place}: {UNFINISHED} in it shows that it was not written to its end; write it again")
    return [path for path in linked_files(place) if not any(map(_beside, path.relative_to(place).parts))]


def _beside(part: str) -> bool:
    return part[0] in "._" and "=" not in part


def _split_files(folder: Path, split: str, name: BenchmarkName, parent: str | None = None) -> list[Path]:
    """All files of ``split``, in order and complete, from the one folder (called ``parent``, if given) that has them."""
    pattern = re.compile(re.escape(split) + r"(-(\d+)-of-(\d+))?(-[0-9a-f]{16})?\.parquet")
    by_folder: dict[Path, dict[int, Path]] = {}
    expected: dict[Path, int] = {}
    for path in linked_files(folder, folders=".parquet"):
        match = pattern.fullmatch(path.name)
        if match and parent in (None, path.parent.name):
            number = int(match[2] or 0)
            if (other := by_folder.setdefault(path.parent, {}).setdefault(number, path)) != path:
                raise MissingTables(
                    f"{path.parent}: {other.name} and {path.name} both are part {number} of {name.table}; keep one of them"
                )
            expected[path.parent] = int(match[3] or 1)

    where = f"{folder}/**/{parent or ''}".rstrip("/")
    if not by_folder:
        raise MissingTables(
            f"{where}: no {split}.parquet or {split}-00000-of-*.parquet for {name.table}; "
            "give the folder that holds the published files"
        )
    if len(by_folder) > 1:
        raise MissingTables(
            f"{name.table}: several folders hold the split {split}: {', '.join(sorted(map(str, by_folder)))}; name one, "
            "of a dataset of the hub as hub:organisation/dataset/folder@commit"
        )

    ((home, files),) = by_folder.items()
    lost = sorted(set(range(expected[home])) - set(files))
    if lost:
        raise MissingTables(f"{home}: part {lost[0]} of {expected[home]} of {name.table} is missing; fetch it again")
    return [files[number] for number in sorted(files)]
