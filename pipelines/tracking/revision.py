"""The code and data revision of a checkout."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def git_and_dvc_tags(repo: Path) -> dict[str, str]:
    """The code and data revision of a checkout.

    Returns:
        `git_commit` (40 hexadecimal characters), `git_dirty` (`true` if a tracked file differs from the commit) and
        `dvc_lock` (SHA-256 of `dvc.lock`, which names every input and output by hash: the DVC revision). Outside git,
        or before the first commit, `git_commit` is `unversioned` and `git_dirty` is absent. Without a `dvc.lock` file,
        `dvc_lock` is `unversioned`.
    """
    tags = {"git_commit": _git(repo, "rev-parse", "--verify", "HEAD") or "unversioned"}
    if tags["git_commit"] != "unversioned":
        tags["git_dirty"] = "true" if _git(repo, "status", "--porcelain", "--untracked-files=no") else "false"
    lock = Path(repo) / "dvc.lock"
    tags["dvc_lock"] = hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "unversioned"
    return tags


def _git(repo: Path, *arguments: str) -> str | None:
    """Standard output of a git command, or None when git is missing or refuses."""
    try:
        result = subprocess.run(["git", "-C", str(repo), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
