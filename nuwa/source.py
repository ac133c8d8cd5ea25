"""Fingerprint of the code that decides answers, so that cached results never outlive the method they came from."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

# Everything between an encoded image and an answer. Scoring and the testbed's training do not decide answers.
ANSWERING = (
    "grid",
    "signals",
    "selection",
    "layout",
    "positions",
    "schedule",
    "methods",
    "decoder",
    "stage1",
    "stage2",
    "vlm",
)


def _meaning(source: str) -> str:
    """The program without comments, layout and docstrings: editing those makes no result stale."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return ast.unparse(tree)


@functools.cache
def code_fingerprint(parts: tuple[str, ...] = ANSWERING) -> str:
    """Digest of the meaning of every module of ``parts`` (modules or folders of this package)."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for name in parts:
        files = sorted((root / name).glob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
        for path in files:
            digest.update(f"{path.relative_to(root).as_posix()}\n{_meaning(path.read_text())}\n".encode())
    return digest.hexdigest()
