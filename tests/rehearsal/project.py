"""A user's checkout of this repository, with parameters of its own and a plugin in which things go wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rehearsal import faults
from rehearsal.servers import BIN, DEADLINE_S

ROOT = Path(__file__).parents[2]
PLUGINS = {"plugins": ["faults"]}
LEFT_OUT = ("tests/", "docs/", "models/testbed")


def check_out(top: Path, params: Mapping[str, Any]) -> Path:
    """Copy what git knows here to ``top``, as a repository of its own, or bring one there up to date.

    ``params``: what its ``params.yaml`` says.
    """
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if not name.startswith(LEFT_OUT) and name != "dvc.lock" and (ROOT / name).exists():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, top / name)
    shutil.copy(faults.__file__, top / "faults.py")
    (top / "params.yaml").write_text(yaml.safe_dump({**params, **PLUGINS}))
    who = ["-c", "user.name=user", "-c", "user.email=user@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "--allow-empty", "-m", "a sweep"]):
        subprocess.run(["git", *command], cwd=top, check=True)
    return top


def run(top: Path, module: str, *arguments: str | Path, deadline_s: float = DEADLINE_S, **environment: str) -> str:
    """What ``python -m module`` says in the project; raises ``RuntimeError`` with all of it where that fails."""
    held = os.environ | {"PYTHONPATH": "", "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | environment
    command = [BIN / "python", "-m", module, *arguments]
    done = subprocess.run(
        list(map(str, command)), cwd=top, env=held, capture_output=True, text=True, timeout=deadline_s
    )
    if done.returncode:
        raise RuntimeError(f"{module} ended as {done.returncode}:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}")
    return done.stdout
