"""What a model is, known again without reading its weights.

The digests of a model take as long as loading it. The sweep leaves them in a memo, beside names, sizes and time stamps
of the folder's files; while these are the same, so is the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from pipelines.atomic import atomic_path

Stamp = list[list]  # name, bytes and time of change in ns of every file


class ModelIdentity(NamedTuple):
    """Digests: of all weights and the prompt format, and of what decides its encoder's signals."""

    model: str
    encoder: str


def folder_stamp(folder: Path, *loaded: str) -> Stamp:
    """What tells a folder that has changed, and how the model was ``loaded`` from it; links are followed."""
    held = sorted((path.relative_to(folder).as_posix(), path.stat()) for path in folder.rglob("*") if path.is_file())
    return [[name, found.st_size, found.st_mtime_ns] for name, found in held] + ([list(loaded)] if held else [])


def remember(memo: Path, stamp: Stamp, identity: ModelIdentity) -> None:
    """``stamp`` is of the folder before the model was loaded from it."""
    with atomic_path(memo) as path:
        path.write_text(json.dumps({"files": stamp, **identity._asdict()}))


def recall(memo: Path, folder: Path, *loaded: str) -> ModelIdentity | None:
    """The identity of the model in ``folder``; ``None`` unless the memo is of these very files, ``loaded`` alike."""
    try:
        held = json.loads(memo.read_text())
        same = held["files"] and held["files"] == folder_stamp(folder, *loaded)  # no files: a model of the hub
        return ModelIdentity(held["model"], held["encoder"]) if same else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
