"""What code comes to, remembered on this machine: a plan would walk it for longer than all else it does.

Remembered are digests by file. They hold for the same source files of this project, the same Python and the same versions
of the libraries whose values code may hold. Code from elsewhere is never remembered, and with plug-ins a plan does not ask.
Nor do sweeps: what they store is known by the code that they run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nuwa.own_folder import own_folder
from nuwa.vlm.checkpoint import MEMORY, keep_json
from nuwa.vlm.remembered import LIBRARIES
from pipelines.features.identity import code_by_file

ROOT = Path(__file__).parents[2]
PACKAGES = ("nuwa", "pipelines", "stages")
Pieces = Mapping[str, str]  # as nuwa.source.closure gives them


class CodeMemory:
    """Digests by file of the project below ``root``, as its files stand; ``memory``: the machine's folder for such."""

    def __init__(self, memory: Path, root: Path = ROOT) -> None:
        place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:24]
        self._memo = own_folder(memory) / f"{place}.code.json"
        self._known: dict[str, Any] = {"stamp": _stamp(root), "code": {}}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            held = json.loads(self._memo.read_text())
            if held["stamp"] == self._known["stamp"]:
                self._known = held

    def of(self, key: str, walk: Callable[[], Pieces]) -> dict[str, str]:
        """What ``walk`` says of ``key``, gathered by file."""
        code: dict[str, dict[str, str]] = self._known["code"]
        if key in code:
            return code[key]
        pieces = walk()
        digests = code_by_file(pieces)
        if all(_is_here(name) for name in pieces):
            code[key] = digests
        return digests

    def save(self) -> None:
        """Keep what is known; a place that cannot be written to costs the next plan some seconds."""
        keep_json(self._memo, self._known)


_memories: list[CodeMemory] = []  # the innermost last


@contextlib.contextmanager
def remembered_code(memory: Path = MEMORY) -> Iterator[None]:
    """While it lasts code is asked of this machine's memory, and what was not known is kept in the end."""
    _memories.append(CodeMemory(memory))
    try:
        yield
        _memories[-1].save()
    finally:
        _memories.pop()


def known_code(key: tuple[Any, ...], walk: Callable[[], Pieces]) -> dict[str, str]:
    """The code that ``walk`` reaches, by file; ``key``: everything beside the project's files that decides it."""
    return _memories[-1].of(repr(key), walk) if _memories else code_by_file(walk())


def _is_here(piece: str) -> bool:
    """Whether a piece of a closure, or the entry of a registry, is of this project's own files."""
    module = piece.partition(":")[0]
    return module not in sys.modules or module.partition(".")[0] in PACKAGES


def _stamp(root: Path) -> str:
    digest = hashlib.sha256(f"{sys.version} {[_version(name) for name in LIBRARIES]}".encode())
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
