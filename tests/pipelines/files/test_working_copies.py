"""One place for all working copies of a repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipelines.files.working_copies import main_copy
from pipelines.settings import load_settings
from pipelines.tracking.address import checked_uri
from stages.entry import places


@pytest.fixture
def repository(tmp_path) -> Path:
    top = tmp_path / "repository"
    top.mkdir()
    who = ["-c", "user.name=user", "-c", "user.email=user@localhost"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "begun"]):
        subprocess.run(["git", *command], cwd=top, check=True)
    return top


def test_a_repository_is_its_own_home(repository, tmp_path, monkeypatch):
    assert main_copy(repository) == repository
    assert main_copy(tmp_path) == tmp_path, "no repository at all"
    monkeypatch.chdir(repository)
    assert main_copy() == Path()


def test_worktrees_and_experiments_share_the_repositorys_places(repository, tmp_path, monkeypatch, params_file):
    worktree = tmp_path / "beside"
    subprocess.run(["git", "worktree", "add", "-q", worktree, "-b", "other"], cwd=repository, check=True)
    temporary = repository / ".dvc" / "tmp" / "exps" / "standalone" / "tmpab12"  # dvc exp run --temp
    temporary.mkdir(parents=True)
    subprocess.run(["git", "clone", "-q", repository, temporary], check=True)
    of_worktree = worktree / ".dvc" / "tmp" / "exps" / "tmpcd34"
    of_worktree.mkdir(parents=True)

    for folder in (worktree, temporary, of_worktree):
        monkeypatch.chdir(folder)
        assert main_copy() == repository
        settings = load_settings(params_file)
        assert places(settings).features == repository / "cache" / "features"
        assert places(settings).results == repository / "cache" / "results"
        assert checked_uri(None) == f"sqlite:///{repository}/mlflow.db"
        assert checked_uri("sqlite:///runs/a.db") == f"sqlite:///{repository}/runs/a.db"
        assert checked_uri("sqlite:////elsewhere/a.db") == "sqlite:////elsewhere/a.db"


def test_a_clone_is_a_repository_of_its_own(repository, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", repository, clone], check=True)
    assert main_copy(clone) == clone


@pytest.fixture
def params_file() -> Path:
    return Path(__file__).parents[3] / "params.yaml"
