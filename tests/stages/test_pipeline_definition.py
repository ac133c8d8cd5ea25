"""dvc.yaml names what each stage really reads, and the stages refuse what is wrong before they write."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Read by every stage to check params.yaml and to name files; they decide whether a stage runs, not what it writes.
VALIDATION = {"stages/entry.py", "pipelines/settings.py"}


def module_file(name: str) -> str | None:
    for candidate in (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"):
        if (ROOT / candidate).exists():
            return candidate
    return None


def imports(path: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
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
    return {path for path in seen if (ROOT / path).read_text().strip() and not _only_docstring(path)}


def _only_docstring(path: str) -> bool:
    body = ast.parse((ROOT / path).read_text()).body
    return len(body) == 1 and isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("stage", STAGES)
def test_dependencies_cover_what_the_stage_imports(stage):
    deps = [dep for dep in STAGES[stage]["deps"] if not dep.startswith(("data/", "$"))]
    assert all((ROOT / dep).exists() for dep in deps)
    missing = {
        path for path in reads(f"stages/{stage}.py") if not any(path == d or path.startswith(f"{d}/") for d in deps)
    }
    assert not missing


def test_stages_stand_in_the_papers_order():
    assert list(STAGES) == [
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


@pytest.mark.parametrize("stage", ["plan", *STAGES])
def test_bad_parameters_end_as_one_line_and_write_nothing(stage, tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["sweep"]["budgets"] = "many"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == ("error: params.yaml: sweep.budgets = 'many': Input should be a valid list")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
