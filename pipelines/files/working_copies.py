"""Which working copy of a repository is the main one, so that all of them share what was computed.

A repository is worked on in several folders: its own, git's worktrees, and the folders that `dvc exp run --temp` and
DVC's queue make below ``.dvc/tmp/exps`` and remove in the end.
"""

from __future__ import annotations

from pathlib import Path

EXPERIMENTS = (".dvc", "tmp", "exps")  # where DVC copies a repository to, below its top


def main_copy(folder: Path | None = None) -> Path:
    """The top of the main working copy of the repository that ``folder`` (null: the current one) belongs to.

    ``Path()`` where the current folder is it, or belongs to no repository.
    """
    here = (folder or Path()).absolute()
    top = _experiments_home(here) or _worktrees_home(here)
    if top is None or top == here:
        return folder or Path()
    return _worktrees_home(top) or top


def _experiments_home(here: Path) -> Path | None:
    """The repository whose experiment runs in ``here``; null where none does."""
    for place in range(len(here.parts) - len(EXPERIMENTS)):
        if here.parts[place : place + len(EXPERIMENTS)] == EXPERIMENTS:
            return Path(*here.parts[:place])
    return None


def _worktrees_home(here: Path) -> Path | None:
    """The top of the repository that has a worktree of git at ``here``; null where that is no worktree."""
    link = here / ".git"
    if not link.is_file():
        return None
    named = link.read_text().strip().removeprefix("gitdir:").strip()
    gitdir = (here / named).resolve()
    try:
        common = (gitdir / (gitdir / "commondir").read_text().strip()).resolve()
    except FileNotFoundError:  # a submodule, which is a repository of its own
        return None
    return common.parent if common.name == ".git" else None
