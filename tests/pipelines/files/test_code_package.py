"""Only code travels to a cluster: what is taken, what stays, and that Ray itself reads the rule alike."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipelines.files.code_package import LIMIT_BYTES, CodeTooLarge, code_files, stage_code

ROOT = Path(__file__).parents[3]
STAYS = [
    "models/llava-hf/llava-1.5-7b-hf/model-00001-of-00003.safetensors",
    "models/llava-hf/llava-1.5-7b-hf/modeling.py",
    "tables/GQA/testdev.parquet",
    "data/examples.parquet",
    "cache/results/one.unit.parquet",
    "elsewhere/weights.safetensors",
    "hub/models--x/blobs/0a1b2c",
    "photo.jpg",
    ".env",
]
TRAVELS = ["nuwa/grid.py", "params.yaml", "myplugin/method.py", "single_file_plugin.py", "cluster/submit"]


@pytest.fixture
def project(tmp_path) -> Path:
    for name in (*STAYS, *TRAVELS):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "project" / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    return tmp_path / "project"


@pytest.mark.parametrize("checkout", [False, True])
def test_code_and_plugins_travel_and_nothing_else(project, tmp_path, checkout):
    if checkout:
        subprocess.run(["git", "init", "-q", project], check=True)
    assert sorted(code_files(project)) == sorted(TRAVELS)
    assert stage_code(project, tmp_path / "staged") == sum(map(len, TRAVELS))
    staged = [path.relative_to(tmp_path / "staged") for path in (tmp_path / "staged").rglob("*") if path.is_file()]
    assert sorted(map(str, staged)) == sorted(TRAVELS)


def test_ray_reads_the_rule_alike(project):
    """A working directory handed to Ray by hand: its own walk over the same files."""
    from ray._private.runtime_env.packaging import create_package

    package = project.parent / "package.zip"
    create_package(str(project), package, include_gitignore=True)
    import zipfile

    names = [name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")]
    assert sorted(names) == sorted(TRAVELS)


def test_what_git_ignores_and_links_that_lead_out_stay(project, tmp_path):
    subprocess.run(["git", "init", "-q", project], check=True)
    (project / ".gitignore").write_text("/scratch.py\n")
    (project / "scratch.py").write_text("")
    (tmp_path / "outside.py").write_text("")
    (project / "link.py").symlink_to(tmp_path / "outside.py")
    assert sorted(code_files(project)) == sorted(TRAVELS)


def test_a_package_above_the_limit_is_one_line_that_names_the_largest_file(project):
    (project / "myplugin" / "table.csv").write_bytes(b"0" * (LIMIT_BYTES + 1))
    with pytest.raises(CodeTooLarge, match=r"would take 5\.0 MB, the limit is 5 MB; largest: myplugin/table\.csv"):
        code_files(project)


def test_this_repository_travels_in_a_few_megabytes():
    sizes = code_files(ROOT)
    assert sum(sizes.values()) <= LIMIT_BYTES
    assert {"nuwa/source.py", "params.yaml", "cluster/job.py", "pipelines/report/page.css"} <= sizes.keys()
    assert not [name for name in sizes if name.startswith(("models/", "data/", "tests/"))]
