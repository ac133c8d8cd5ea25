"""dvc.yaml names what each stage really reads, and the stages refuse what is wrong before they write."""

from __future__ import annotations

import ast
import importlib
import os
import runpy
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import yaml
from forked import Ended, forked

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Read by every stage to start; it decides whether a stage runs, not what it writes.
VALIDATION = {"stages/entry.py"}


# The stages import much the same: a file is read and parsed once for all of them.
@cache
def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


@cache
def module_file(name: str) -> str | None:
    for candidate in (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"):
        if (ROOT / candidate).exists():
            return candidate
    return None


@cache
def imports(path: str) -> set[str]:
    found = set()
    for node in ast.walk(tree_of(path)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {
            file
            for name in names
            if name.split(".")[0] in ("nuwa", "pipelines", "stages") and (file := module_file(name))
        }
    return found


def reads(start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        path = todo.pop()
        if path in seen or path in VALIDATION:
            continue
        seen.add(path)
        todo += imports(path)
    return {path for path in seen if tree_of(path).body and not _only_docstring(path)}


def _only_docstring(path: str) -> bool:
    body = tree_of(path).body
    return len(body) == 1 and isinstance(body[0], ast.Expr)


# `inputs` always runs, so that it needs no dependencies.
@pytest.mark.parametrize("stage", [name for name in STAGES if name != "inputs"])
def test_dependencies_cover_what_the_stage_imports(stage):
    deps = [dep for dep in STAGES[stage].get("deps", []) if not dep.startswith(("data/", "$"))]
    assert all((ROOT / dep).exists() for dep in deps)
    missing = {
        path for path in reads(f"stages/{stage}.py") if not any(path == d or path.startswith(f"{d}/") for d in deps)
    }
    assert not missing


def test_stages_stand_in_the_papers_order():
    assert list(STAGES) == [
        "inputs",
        "prepare",
        "testbed",
        "pruner",
        "features",
        "sweep",
        "evaluate",
        "profile",
        "search",
        "report",
    ]
    assert [name for name, stage in STAGES.items() if stage.get("frozen")] == ["testbed", "profile", "search"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> dict[str, tuple[Ended, Path]]:
    """How every stage ended that was asked to run with a wrong parameter, and its folder.

    Each is a process of its own, forked once all are imported: what they import takes longer than what they do.
    """
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["sweep"]["budgets"] = "many"
    folders = {name: tmp_path_factory.mktemp(name) for name in ("plan", *STAGES) if name != "inputs"}
    for name, folder in folders.items():
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        importlib.import_module(f"stages.{name}")

    def start(name: str, folder: Path) -> None:
        os.chdir(folder)
        sys.argv = [name]
        runpy.run_module(f"stages.{name}", run_name="__main__")

    return {name: (forked(partial(start, name, folder)), folder) for name, folder in folders.items()}


# `inputs` reads no settings: it must be quick, and says nothing of what is wrong.
@pytest.mark.parametrize("stage", ["plan", *(name for name in STAGES if name != "inputs")])
def test_bad_parameters_end_as_one_line_and_write_nothing(stage, refused):
    ended, folder = refused[stage]
    assert ended.code == 2
    assert ended.err.splitlines()[-1] == "error: params.yaml: sweep.budgets = 'many': Input should be a valid list"
    assert [path.name for path in folder.iterdir()] == ["params.yaml"]
