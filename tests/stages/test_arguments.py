"""``--help`` of every stage is quick and touches nothing; arguments that a stage does not know are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages import USAGE

ROOT = Path(__file__).parents[2]
STAGES = sorted(
    path.stem for path in (ROOT / "stages").glob("*.py") if path.stem not in ("__init__", "entry", "ending")
)


def run(stage: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", f"stages.{stage}", *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.parametrize("stage", STAGES)
def test_help_says_what_the_stage_does_before_anything_is_imported(stage, tmp_path):
    done = run(stage, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m stages.{stage}")
    assert len(done.stdout.splitlines()) >= 4
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "stages" in imported and not imported & {"torch", "ray", "mlflow", "pandas", "nuwa", "pipelines"}
    assert not list(tmp_path.iterdir())


def test_unknown_arguments_are_refused_before_work_starts(tmp_path):
    for stage, argument, usage in (
        ("sweep", "--dry-run", ""),
        ("evaluate", "all", ""),
        ("plan", "-n", " [EXPERIMENT]"),
    ):
        done = run(stage, argument, folder=tmp_path)
        assert done.returncode == 2
        message = f"error: {argument!r} is not an argument of this stage; usage: python -m stages.{stage}{usage}"
        assert message in done.stderr.splitlines()
    assert not list(tmp_path.iterdir())


def test_stages_that_read_arguments_are_given_them():
    """What Make hands on, a port to the dashboard among it, is refused unless the stage is named."""
    reading = {stage for stage in STAGES if "sys.argv" in (ROOT / f"stages/{stage}.py").read_text()}
    assert reading == set(USAGE)
