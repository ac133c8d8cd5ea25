"""What a submitted job was made of, so that its results are never recorded as those of something else.

``dvc.lock`` holds the results of a stage beside the parameters, code and inputs that ``dvc.yaml`` names for it. A job
reads them as they were when it was submitted; by the time its results come back they may have been edited.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.settings import PARAMS_FILE

DVC_FILE = Path("dvc.yaml")


def made_of(stages: Sequence[str]) -> dict[str, str | None]:
    """Every parameter, code file and input of ``stages``, as ``dvc.yaml`` names them → its digest (null: not there).

    Parameters are named by their keys, ``params.yaml: sweep.images``, files by their paths. What one of the stages
    makes for another is no input.
    """
    params = yaml.safe_load(Path(PARAMS_FILE).read_text())
    defined = yaml.safe_load(DVC_FILE.read_text())["stages"]
    outputs = {path for name in stages for path in _paths(defined[name].get("outs", []), params)}

    parts: dict[str, str | None] = {}
    for name in stages:
        for key in defined[name].get("params", []):
            for leaf, value in _leaves(key, _looked_up(params, key)):
                parts[f"{PARAMS_FILE}: {leaf}"] = _digest(json.dumps(value, sort_keys=True).encode())
        for path in set(_paths(defined[name].get("deps", []), params)) - outputs:
            parts |= _files(Path(path))
    return parts


def differences(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """The names of what is not the same, parameters first."""
    changed = [name for name in {*before, *now} if before.get(name, "") != now.get(name, "")]
    return sorted(changed, key=lambda name: (not name.startswith(str(PARAMS_FILE)), name))


def _paths(entries: Sequence[Any], params: Mapping[str, Any]) -> Iterator[str]:
    """Paths of a list of dvc.yaml, in which an entry may have options and name a parameter."""
    for entry in entries:
        path = next(iter(entry)) if isinstance(entry, dict) else str(entry)
        while "${" in path:
            before, _, rest = path.partition("${")
            key, _, after = rest.partition("}")
            path = f"{before}{_looked_up(params, key)}{after}"
        yield path


def _looked_up(params: Mapping[str, Any], key: str) -> Any:
    value: Any = params
    for part in key.split("."):
        value = (value or {}).get(part)
    return value


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values below ``key`` that are no mappings, by their full keys."""
    if isinstance(value, dict) and value:
        for name, held in value.items():
            yield from _leaves(f"{key}.{name}", held)
    else:
        yield key, value


def _files(path: Path) -> dict[str, str | None]:
    """The file ``path``, or all below the folder ``path``, without what Python compiles."""
    if not path.is_dir():
        return {path.as_posix(): _file_digest(path) if path.exists() else None}
    files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.as_posix(): _file_digest(file) for file in files}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_digest(path: Path) -> str:
    """Of a file of any size."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
