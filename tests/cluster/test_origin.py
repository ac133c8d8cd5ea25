"""What a submitted job was made of: results are recorded for that and for nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cluster.job import OUTPUTS, runs_folder
from cluster.submit import ORIGIN_MANIFEST, TRACKED_STAGES, SubmissionFailed, bring_back, made_of, refuse_changes

ROOT = Path(__file__).parents[2]
JOB = "nuwa-1f2e3d4c"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A small project with the repository's own ``dvc.yaml`` and ``params.yaml``."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("nuwa/grid.py", "pipelines/sweep/units.py", "stages/sweep.py", "stages/report.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("data/examples.parquet", "data/features.json", "models/testbed/config.json", "models/pruner/lpm.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def storage(project) -> str:
    """A storage with a job that was submitted of ``project`` as it is."""
    place = str(project / "shared")
    runs_folder(place, JOB).write(ORIGIN_MANIFEST, json.dumps(made_of(TRACKED_STAGES)).encode())
    return place


def edit(name: str, *keys: str, value: object) -> None:
    params = yaml.safe_load(Path(name).read_text())
    section = params
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    Path(name).write_text(yaml.safe_dump(params))


CHANGES = {
    "params.yaml: sweep.images": lambda: edit("params.yaml", "sweep", "images", value=50),
    "params.yaml: features.dtype": lambda: edit("params.yaml", "features", "dtype", value="float16"),
    "nuwa/grid.py": lambda: Path("nuwa/grid.py").write_text("SIZE = 1\n"),
    "nuwa/new.py": lambda: Path("nuwa/new.py").write_text("SIZE = 1\n"),
    "pipelines/sweep/units.py": lambda: Path("pipelines/sweep/units.py").unlink(),
    "data/examples.parquet": lambda: Path("data/examples.parquet").write_text("other questions"),
    "models/testbed/config.json": lambda: Path("models/testbed/config.json").write_text("{}"),
    "models/pruner/lpm.json": lambda: Path("models/pruner/lpm.json").write_text("{}"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_results_of_something_else_are_refused_by_name(storage, name):
    refuse_changes(storage, JOB)
    CHANGES[name]()
    for refused in (refuse_changes, bring_back):
        with pytest.raises(SubmissionFailed) as raised:
            refused(storage, JOB)
        assert str(raised.value) == (
            f"changed since job {JOB} was submitted: {name}; its results would be recorded as of what is here now: put "
            "that back and attach again, or submit again, finished units are kept"
        )
    assert not Path("dvc.lock").exists()


def test_what_decides_no_result_is_not_refused(storage):
    """Other stages' files and parameters, layout and comments of params.yaml, and what the stages make themselves."""
    edit("params.yaml", "evaluate", "resamples", value=200)
    edit("params.yaml", "cluster", "workers", value=7)
    Path("stages/report.py").write_text("")
    Path("nuwa/__pycache__").mkdir()
    Path("nuwa/__pycache__/grid.pyc").write_bytes(b"compiled")
    for path in OUTPUTS:
        path.write_text("of the job")
    refuse_changes(storage, JOB)


def test_many_changes_are_one_line(storage):
    edit("params.yaml", "sweep", "grids", value=[])
    for number in range(6):
        Path(f"nuwa/new{number}.py").write_text("")
    with pytest.raises(
        SubmissionFailed, match=r"params\.yaml: sweep\.grids, nuwa/new0\.py, .*new3\.py and 2 more; its"
    ):
        refuse_changes(storage, JOB)


def test_a_job_of_which_nothing_is_known_is_refused(project):
    with pytest.raises(
        SubmissionFailed, match=r"has no origin\.json, so what job nuwa-1f2e3d4c was made of is not known"
    ):
        bring_back(str(project / "shared"), JOB)
