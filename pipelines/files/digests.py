"""Digests of files and folders, remembered while sizes and time stamps stand still."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pipelines.files.atomic import atomic_path
from pipelines.files.folders import linked_files

BLOCK = 2**20  # bytes read at once


class DigestMemo:
    """What was read once is not read again: path → size, time of change in ns, and digest, kept in ``memo``.

    A memo that is absent or damaged costs reading the files again and nothing else.
    """

    def __init__(self, memo: Path) -> None:
        self.memo = memo
        self._known: dict[str, list] = {}
        self._used: dict[str, list] = {}
        try:
            held = json.loads(memo.read_text())
            self._known = held if isinstance(held, dict) else {}
        except (FileNotFoundError, ValueError):
            pass

    def of(self, place: Path) -> str | None:
        """SHA-256 of a file's content, or of a folder's files and their names; null where there is neither."""
        if place.is_file():
            return self._file(place)
        if not place.is_dir():
            return None
        whole = hashlib.sha256()
        for path in (path for path in linked_files(place) if path.is_file()):
            whole.update(f"{path.relative_to(place).as_posix()} {self._file(path)}\n".encode())
        return whole.hexdigest()

    def _file(self, path: Path) -> str:
        state, name = path.stat(), str(path.absolute())
        known = self._known.get(name)
        if not (isinstance(known, list) and known[:2] == [state.st_size, state.st_mtime_ns]):
            digest = hashlib.sha256()
            with path.open("rb") as content:
                while block := content.read(BLOCK):
                    digest.update(block)
            known = [state.st_size, state.st_mtime_ns, digest.hexdigest()]
        self._used[name] = known
        return str(known[2])

    def save(self) -> None:
        """Remember what was asked for since; files that were not asked for are forgotten."""
        with atomic_path(self.memo) as fresh:
            fresh.write_text(json.dumps(self._used))
