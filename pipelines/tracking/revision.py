"""The code and data revision of a checkout, and what it takes to run it again."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pipelines.files.secrets import is_secret


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


PARAMETERS = ("params.yaml", "dvc.yaml", "dvc.lock")
PATCH = "uncommitted.patch"
SOURCES = (".py", ".yaml", ".j2", ".toml")  # of new files these alone: another may be data, or a secret
CONFIGURATION = ("*.yaml", "*.toml")  # where people write passwords; in code the like is code
LARGEST_PATCH = 4 * 2**20  # bytes; what is larger is data, which git should not have seen
_SETTING = re.compile(r"""^\s*(?:export\s+)?["']?(\w+)["']?\s*[:=]\s*\S""", re.MULTILINE)
_PLAINLY_SECRET = ("api_key", "password", "secret", "token")


def source_tags(revision: Mapping[str, str], command: str) -> dict[str, str]:
    """``revision`` (of :func:`git_and_dvc_tags`) and the command, under the tags that MLflow's own pages look for."""
    return {
        "mlflow.source.name": command,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": revision["git_commit"],
    }


def write_reproduction(repo: Path, folder: Path) -> None:
    """Put into ``folder`` what a run needs beside its commit: parameters, stages, lock, and changes not committed.

    ``git checkout <commit> && git apply uncommitted.patch`` makes the tree that ran, new ``SOURCES`` that git does not
    ignore among it. A patch above ``LARGEST_PATCH`` bytes is left out, and so is new configuration that names secrets.
    A password in a URI that the commit does not hold reads ``***``.
    """
    for name in PARAMETERS:
        if (Path(repo) / name).is_file():
            (folder / name).write_bytes(_without_passwords((Path(repo) / name).read_bytes()))

    new = (_git(repo, "ls-files", "--others", "--exclude-standard", "-z") or "").split("\0")
    code = [".", *(f":(exclude){pattern}" for pattern in CONFIGURATION)]
    changes = [_git_bytes(repo, "diff", "--binary", "HEAD", "--", *code)]
    changes += [_added_without_passwords(_git_bytes(repo, "diff", "--binary", "HEAD", "--", *CONFIGURATION))]
    for name in new:
        if name.endswith(SOURCES) and not _names_secrets(Path(repo) / name):
            change = _git_bytes(repo, "diff", "--binary", "--no-index", "/dev/null", name)
            changes.append(_added_without_passwords(change) if _is_configuration(name) else change)
    patch = b"".join(changes)
    if 0 < len(patch) <= LARGEST_PATCH:
        (folder / PATCH).write_bytes(patch)


def _is_configuration(name: str) -> bool:
    return any(name.endswith(pattern.removeprefix("*")) for pattern in CONFIGURATION)


def _names_secrets(path: Path) -> bool:
    if not _is_configuration(path.name):
        return False
    names = _SETTING.findall(path.read_text(errors="replace"))
    return any(is_secret(name) or name.lower() in _PLAINLY_SECRET for name in names)


def _without_passwords(text: bytes) -> bytes:
    return re.sub(rb"//[^/@\s]*@", b"//***@", text)


def _added_without_passwords(patch: bytes) -> bytes:
    """What a patch removes, or leaves, has to stay as the commit has it."""
    lines = patch.splitlines(keepends=True)
    return b"".join(_without_passwords(line) if line.startswith(b"+") else line for line in lines)


def _git_bytes(repo: Path, *arguments: str) -> bytes:
    """Standard output of a git command as it is; a diff between two files ends with 1 where they differ."""
    try:
        return subprocess.run(["git", "-C", str(repo), *arguments], capture_output=True, check=False).stdout
    except OSError:
        return b""


def _git(repo: Path, *arguments: str) -> str | None:
    """Standard output of a git command, or None when git is missing or refuses."""
    try:
        result = subprocess.run(["git", "-C", str(repo), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
