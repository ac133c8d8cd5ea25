"""Outputs are written whole and beside what is there: DVC's cache behind a link keeps its bytes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.files.atomic import atomic_folder, atomic_path


@pytest.fixture
def linked(tmp_path) -> tuple[Path, Path]:
    """An output that DVC has linked to its cache (``cache.type: symlink``), and what lies there."""
    cached = tmp_path / "dvc/files/md5/ab/cdef"
    cached.parent.mkdir(parents=True)
    cached.write_text("cached")
    cached.chmod(0o444)
    out = tmp_path / "data/out.csv"
    out.parent.mkdir()
    out.symlink_to(cached)
    return out, cached


def test_a_file_behind_a_link_keeps_its_bytes(linked):
    out, cached = linked
    with atomic_path(out) as fresh:
        fresh.write_text("new")
    assert (out.read_text(), cached.read_text(), out.is_symlink()) == ("new", "cached", False)


def test_a_hard_link_keeps_its_bytes(tmp_path):
    (tmp_path / "cached").write_text("cached")
    os.link(tmp_path / "cached", tmp_path / "out")
    with atomic_path(tmp_path / "out") as fresh:
        fresh.write_text("new")
    assert ((tmp_path / "out").read_text(), (tmp_path / "cached").read_text()) == ("new", "cached")


def test_a_folder_of_links_is_replaced_and_the_cache_is_not_touched(linked):
    out, cached = linked
    (out.parent / "old.txt").write_text("of an earlier run")
    with atomic_folder(out.parent) as fresh:
        (fresh / "deep").mkdir()
        (fresh / "deep/new.txt").write_text("new")
        assert out.exists(), "what is there goes last"
    assert sorted(path.name for path in out.parent.rglob("*")) == ["deep", "new.txt"]
    assert cached.read_text() == "cached"
    assert sorted(path.name for path in out.parent.parent.iterdir()) == ["data", "dvc"]


def test_a_folder_that_fails_leaves_what_was_there(linked):
    out, _ = linked
    with pytest.raises(RuntimeError), atomic_folder(out.parent) as fresh:
        (fresh / "half.txt").write_text("half")
        raise RuntimeError
    assert [path.name for path in out.parent.iterdir()] == ["out.csv"]
    assert sorted(path.name for path in out.parent.parent.iterdir()) == ["data", "dvc"]


def test_a_link_to_a_folder_elsewhere_stays(tmp_path):
    (tmp_path / "scratch/data").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "scratch/data")
    with atomic_folder(tmp_path / "data") as fresh:
        (fresh / "new.txt").write_text("new")
    assert (tmp_path / "data").is_symlink() and (tmp_path / "scratch/data/new.txt").read_text() == "new"


def test_rights_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "out") as fresh:
            fresh.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_the_stage_that_digests_inputs_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path / "params.yaml").write_text("prepare: {tables: [")
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "stages.inputs"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: params.yaml: not YAML: while parsing")
