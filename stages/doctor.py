"""What is wrong or missing before anything runs, one line each with its remedy: model folder, tables, instruction data,
weights of grids, stores, cluster, tracking, rights and room on disks.

``make plan`` shows it and exits with code 2 where one is an error; a warning costs nothing now and may be meant. Nothing
large is read: of a table its columns, first and last row with their images. ``make plan DEEP=1`` reads everything: every
row, every image, every tensor.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import torch

from nuwa.benchmarks import RecordError
from nuwa.benchmarks.own_tables import JsonLines
from nuwa.benchmarks.rows import ParquetFiles
from nuwa.errors import UserError
from nuwa.images import ImageError, read_image
from nuwa.vlm import adapter_class
from nuwa.vlm.folder import folder_faults
from nuwa.vlm.remembered import folder_memory
from nuwa.vlm.text_tower import TextTower
from pipelines.addresses import BenchmarkName, hub_address
from pipelines.data.tables import MissingTables, read_benchmark, table_files
from pipelines.files.storage import Folder, is_uri
from pipelines.files.surroundings import surroundings
from pipelines.settings import SCENES, Settings
from pipelines.tracking.address import checked_uri
from stages.entry import CACHE, DATA, REPORT, check_tracking, feature_store, published, result_store

REACH_S = 5.0  # for a server to take a connection
SQLITE = b"SQLite format 3\0"
ACTIVATIONS = 0.2  # what a worker needs beside its weights, as a share of them
LITTLE_ROOM = 1_000_000_000  # bytes below which a disk is nearly full


class Finding(NamedTuple):
    level: Literal["error", "warning"]
    line: str

    def __str__(self) -> str:
        return f"{self.level}: {self.line}"


def examine(settings: Settings, *, deep: bool = False) -> list[Finding]:
    """Everything that can be known before a stage runs, errors first."""
    checks = (_rights, _model, _text_tower, _tables, _lessons, _weights, _stores, _cluster, _tracking, _revision)
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(settings, deep)
        except UserError as error:
            findings.append(Finding("error", str(error)))
        except OSError as error:
            if (told := surroundings(error)) is None:
                raise
            findings.append(Finding("error", told))
    return sorted(findings, key=lambda finding: finding.level)


def room_for(settings: Settings, features: int, results: int) -> Iterator[Finding]:
    """Whether what a sweep stores, in bytes, fits on the disks it is stored on, and leaves something."""
    needed: dict[int, tuple[int, Path]] = {}
    for store, default, size in (
        (settings.features.store, feature_store(), features),
        (settings.sweep.store, result_store(), results),
    ):
        if store is None or not is_uri(store):
            place = _existing(Path(store or default))
            disk = place.stat().st_dev
            needed[disk] = (needed.get(disk, (0, place))[0] + size, place)

    for size, place in needed.values():
        free = shutil.disk_usage(place).free
        if size > free:
            yield Finding(
                "warning",
                f"{place}: features and results of the whole grid need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                "make room, set features.dtype: float16, or name other places in features.store and sweep.store",
            )
        elif free - size < LITTLE_ROOM:
            yield Finding("warning", f"{place}: {max(0, free - size) / 1e9:.1f} GB would be left free; make room")


def memory_for(settings: Settings, numbers: int, *, gpu: int | None, machine: int) -> Iterator[Finding]:
    """Whether a model of so many ``numbers`` fits each worker, where workers run on this machine.

    ``gpu``: bytes of one GPU here; null where there is none, and nothing is known. ``machine``: bytes of memory.
    """
    cluster, dtype = settings.cluster, settings.model.dtype
    weights = numbers * getattr(torch, dtype).itemsize
    told = f"model.path = {settings.model.path!r}: its weights take {weights / 1e9:.1f} GB in {dtype}"
    if cluster.resolved_address is not None:
        return

    if cluster.gpus and gpu is not None and weights > gpu * cluster.gpus:
        count = math.ceil(weights * (1 + ACTIVATIONS) / gpu)
        yield Finding(
            "warning",
            f"{told}, and a worker has {gpu * cluster.gpus / 1e9:.1f} GB (cluster.gpus = {cluster.gpus:g}); set cluster.gpus: "
            f"{count}, over which its layers are spread, or take a smaller model",
        )
    workers = 1 if cluster.workers == "auto" else cluster.workers
    if not cluster.gpus and weights * workers > machine:
        yield Finding(
            "warning",
            f"{told}, {weights * workers / 1e9:.1f} GB for cluster.workers = {workers}, and this machine has "
            f"{machine / 1e9:.1f} GB; take fewer workers or a smaller model",
        )


def memory_here() -> dict[str, Any]:
    """``gpu`` and ``machine`` of :func:`memory_for`, of this machine; of unlike GPUs the smallest."""
    sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return {"gpu": min(sizes, default=None), "machine": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


def _rights(_settings: Settings, _deep: bool) -> Iterator[Finding]:
    for folder in (Path(), DATA, CACHE, REPORT):
        if folder.is_symlink() and not os.path.exists(folder):
            yield Finding(
                "error",
                f"{folder}: a link to {folder.readlink()}, which is not there; make that folder, or take the link away",
            )
            continue
        place = _existing(folder)
        if not place.is_dir():
            yield Finding("error", f"{place}: a file stands where a folder should be; move it away")
        elif not _writable(place):
            yield Finding(
                "error", f"{place.absolute()}: may not be written; give yourself the rights (`ls -ld` shows them)"
            )


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=True)


def _existing(place: Path) -> Path:
    """``place``, or the nearest folder above it that is there."""
    place = place.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _model(settings: Settings, deep: bool) -> Iterator[Finding]:
    path = Path(settings.model.path)
    if path.is_dir():
        faults = folder_faults(path, adapter_class, deep=True) if deep else folder_memory(path).faults(adapter_class)
        for fault in faults:
            yield Finding("error", f"model.path = {settings.model.path!r}: {fault.removeprefix(f'{path}: ')}")
    elif published(settings.model.path) != settings.model.path:
        hub_id = published(settings.model.path)
        yield Finding(
            "warning", f"model.path = {settings.model.path!r}: not here yet; `hf download {hub_id} --local-dir {path}`"
        )


def _text_tower(settings: Settings, _deep: bool) -> Iterator[Finding]:
    path = settings.model.text_tower
    if path is not None and Path(path).exists():
        TextTower(path)  # refuses what is no CLIP model
    elif path is not None:
        yield Finding(
            "warning", f"model.text_tower = {path!r}: not here yet; fetch the CLIP model that the encoder is of"
        )


def _tables(settings: Settings, deep: bool) -> Iterator[Finding]:
    for text, location in (settings.prepare.tables or {}).items():
        if hub_address(location) is not None:
            continue  # fetched by `prepare`, which names what is wrong

        name, folder = BenchmarkName.parse(text), Path(location)
        try:
            if not folder.exists():
                yield Finding(
                    "warning", f"prepare.tables.{text}: {location}: not here yet; put the published files there"
                )
            elif deep:
                yield from _every_row(name, folder)
            else:
                _ends(name, folder)

        except (UserError, OSError) as error:
            told = str(error) if isinstance(error, UserError) else surroundings(error)
            if told is None:
                raise
            empty = isinstance(error, MissingTables) and not any(folder.iterdir())
            yield Finding("warning" if empty else "error", f"prepare.tables.{text}: {told}")


def _ends(name: BenchmarkName, folder: Path) -> None:
    """Columns of every file, and first and last row; of a benchmark of several tables their columns."""
    benchmark = name.benchmark()
    if benchmark.join is not None:
        for files in table_files(folder, name):
            files.schema  # noqa: B018 (opens it)
        return
    table = read_benchmark(folder, name)
    assert isinstance(table, (ParquetFiles, JsonLines))
    ends = table.ends(benchmark.schema)
    if not ends:
        raise RecordError(f"{folder}: no question of {name.table} in it; fetch the table again")
    for row in ends:
        for example in benchmark.questions_of(row):
            for image in example.images:
                _look_at(image, f"{row.place}: row {row.number} of {benchmark.name}")


def _every_row(name: BenchmarkName, folder: Path) -> Iterator[Finding]:
    seen: set[bytes] = set()
    for example in name.benchmark().examples(read_benchmark(folder, name), f"{folder} ({name.table})", whole=True):
        for image in example.images:
            key = image[:64] + image[-64:] + len(image).to_bytes(8, "little")
            if key in seen:
                continue
            seen.add(key)
            try:
                _look_at(image, example.example_id)
            except UserError as error:  # all of them, not the first
                yield Finding("error", f"prepare.tables.{name.table}: {error}")


def _look_at(image: bytes, place: str) -> None:
    try:
        read_image(image)
    except ImageError as error:
        raise ImageError(f"{place}: {error}; mend or drop the row, or fetch the file again") from None


def _lessons(settings: Settings, deep: bool) -> Iterator[Finding]:
    recipe = settings.pruner
    if recipe.data == SCENES:
        return
    path = Path(recipe.data)
    if not path.is_file():
        yield Finding("warning", f"pruner.data = {recipe.data!r}: no such file yet; fetch the instruction data")
    elif deep:
        from nuwa.pruner.instructions import read_instructions

        read_instructions(path, Path(recipe.images_folder or path.parent), recipe.seed, recipe.share)
    else:
        with path.open("rb") as content:
            if content.read(64).lstrip()[:1] != b"[":
                yield Finding(
                    "error", f"pruner.data = {recipe.data!r}: no list of conversations in JSON; fetch it again"
                )


def _weights(settings: Settings, _deep: bool) -> Iterator[Finding]:
    """Trained modules that grids name by file: whole, whatever encoder they are of."""
    from nuwa.stage1.learnpruner import WeightsError, read_lpm

    for path in dict.fromkeys(_named_weights([entry.model_dump() for entry in settings.sweep.grids])):
        try:
            read_lpm(Path(path))
        except WeightsError as error:
            yield Finding("error", str(error))


def _named_weights(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, held in value.items():
            if key == "weights":
                yield from (one for one in (held if isinstance(held, list) else [held]) if isinstance(one, str))
            else:
                yield from _named_weights(held)
    elif isinstance(value, list):
        for held in value:
            yield from _named_weights(held)


def _stores(settings: Settings, _deep: bool) -> Iterator[Finding]:
    for key, store in (("features.store", settings.features.store), ("sweep.store", settings.sweep.store)):
        if store is None:
            continue
        if is_uri(store):
            Folder.at(store).sizes()
            continue
        place = _existing(Path(store))
        if not place.is_dir() or not _writable(place):
            yield Finding("error", f"{key} = {str(store)!r}: {place} may not be written; name another place")


def _cluster(settings: Settings, _deep: bool) -> Iterator[Finding]:
    if settings.cluster.resolved_address is not None:
        importlib.import_module("pipelines.workers.joining").probe(settings.cluster.resolved_address)
    elif settings.cluster.gpus:
        import torch

        if not torch.cuda.is_available():
            yield Finding("warning", f"cluster.gpus = {settings.cluster.gpus:g}: torch sees no GPU on this machine")


def _tracking(settings: Settings, _deep: bool) -> Iterator[Finding]:
    check_tracking(settings)
    yield from _database(checked_uri(settings.tracking.resolved_uri))
    server = urlsplit(settings.tracking.resolved_uri or "")
    if server.scheme in ("http", "https"):
        port = server.port or (443 if server.scheme == "https" else 80)
        try:
            with socket.create_connection((server.hostname or "", port), timeout=REACH_S) as line:
                if server.scheme == "http":  # some take every connection and never say a word
                    line.sendall(f"GET /health HTTP/1.0\r\nHost: {server.hostname}\r\n\r\n".encode())
                    line.recv(1)
        except OSError as error:
            yield Finding(
                "warning",
                f"tracking.uri: {server.hostname}:{port} does not answer ({error.strerror or error}); results are kept all "
                "the same, and `make track` shows them once it does",
            )


def _database(uri: str) -> Iterator[Finding]:
    """Whether MLflow can open the SQLite file of ``uri``, where it is one, or make it."""
    scheme, _, rest = uri.partition(":///")
    path = Path(rest.partition("?")[0])
    if not scheme.startswith("sqlite"):
        return
    kept = "results are kept all the same, and `make track` shows them once it can be used"
    if path.is_dir():
        yield Finding("warning", f"tracking.uri: {path} is a folder and no database; move it away: {kept}")
    elif not path.exists():
        if not _writable(_existing(path.parent)):
            yield Finding("warning", f"tracking.uri: {path} may not be made there; name another file: {kept}")
    elif not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        yield Finding("warning", f"tracking.uri: {path} may not be read and written; give yourself the rights: {kept}")
    elif path.stat().st_size and not _begins(path, SQLITE):
        yield Finding("warning", f"tracking.uri: {path} is no SQLite database; move it away: {kept}")


def _begins(path: Path, mark: bytes) -> bool:
    with path.open("rb") as content:
        return content.read(len(mark)) == mark


def _revision(_settings: Settings, _deep: bool) -> Iterator[Finding]:
    if shutil.which("git") is None:
        yield Finding("warning", "git is not installed: runs are logged without a revision; install git")
