"""What lies in a folder, links followed."""

from __future__ import annotations

import os
from pathlib import Path


def linked_files(folder: Path, *, folders: str | None = None) -> list[Path]:
    """All files below ``folder`` in order, those behind links to folders too, each folder once.

    ``folders``: an ending; folders whose names have it count as files. Raises ``OSError`` for a folder that may not be
    listed, rather than pass it over.
    """
    files: list[Path] = []
    entered: set[tuple[int, int]] = set()  # links can go round in circles

    def enter(place: Path) -> None:
        state = place.stat()
        if (state.st_dev, state.st_ino) in entered:
            return
        entered.add((state.st_dev, state.st_ino))
        with os.scandir(place) as held:
            names = sorted(entry.name for entry in held)
        for name in names:
            path = place / name
            if path.is_dir() and not (folders and name.endswith(folders)):
                enter(path)
            elif path.exists() or path.is_symlink():
                files.append(path)

    if folder.is_dir():
        enter(folder)
    return sorted(files)
