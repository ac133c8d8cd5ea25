"""What travels to a cluster: the project's code, plugins in its folder included, and nothing else.

``.rayignore`` in the project folder is the rule; it has gitignore's syntax. Files that git ignores stay at home too.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

from nuwa.errors import UserError

RULES = ".rayignore"
LIMIT_BYTES = 5_000_000


class CodeTooLarge(UserError, ValueError):
    """What the rule takes for code is too large to be that."""


def code_files(project: Path) -> dict[str, int]:
    """Files that travel, by path below ``project``, and their bytes; raises :class:`CodeTooLarge`.

    Links that lead out of the project stay at home: what they lead to is no code of it.
    """
    from pathspec import PathSpec

    rules = project / RULES
    ignored = PathSpec.from_lines("gitwildmatch", rules.read_text().splitlines() if rules.is_file() else [])
    sizes = {}
    for name in _candidates(project):
        path = project / name
        parts = Path(name).parts
        # Ray looks into no folder that a line excludes, whatever lines below it would bring back.
        folders = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        inside = path.is_file() and path.resolve().is_relative_to(project.resolve())
        if inside and not any(ignored.match_file(folder) for folder in folders):
            sizes[name] = path.stat().st_size

    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise CodeTooLarge(
            f"{project}: the code for the cluster would take {total / 1e6:.1f} MB, the limit is {LIMIT_BYTES / 1e6:g} MB; "
            f"largest: {largest} ({sizes[largest] / 1e6:.1f} MB); name what is no code in {RULES}"
        )
    return sizes


def _candidates(project: Path) -> list[str]:
    """All files that git does not ignore; outside a checkout all but hidden ones."""
    command = ["git", "-C", str(project), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    with contextlib.suppress(OSError):  # no git on this machine
        listed = subprocess.run(command, capture_output=True, text=True)
        if listed.returncode == 0:
            return sorted(filter(None, listed.stdout.split("\0")))
    return sorted(
        path.relative_to(project).as_posix()
        for path in project.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(project).parts)
    )


def stage_code(project: Path, target: Path) -> int:
    """Copy the code of ``project`` into the folder ``target``; returns its bytes."""
    sizes = code_files(project)
    for name in sizes:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(project / name, target / name)
    return sum(sizes.values())
