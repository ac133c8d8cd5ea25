"""Wheels of what is tracked, built as an installer builds them, and laid out as it lays them out; no index is asked."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def build_wheel(project: Path, scratch: Path) -> Path:
    """The wheel of the tracked files below ``project``, made in ``scratch``."""
    source, target = scratch / "source", scratch / "wheel"
    target.mkdir(parents=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=project, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        if name.endswith((".py", ".toml", ".md")) or name == "LICENSE":
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((project / name).read_bytes())
    subprocess.run([sys.executable, "-c", BUILD, str(target)], cwd=source, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


def install(wheel: Path, site: Path) -> None:
    """Code and metadata, entry points among them."""
    zipfile.ZipFile(wheel).extractall(site)


@pytest.fixture(scope="session")
def library_wheel(tmp_path_factory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("library"))
