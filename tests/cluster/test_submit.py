"""``cluster/submit`` against real servers: a Ray head with a further raylet, and MLflow on PostgreSQL."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from dvc.repo import Repo
from forked import forked
from mlflow import MlflowClient
from ray._raylet import GcsClient
from rehearsal import faults
from rehearsal.servers import (
    BIN,
    DEADLINE_S,
    TOKEN,
    Servers,
    free_port,
    growing_cluster,
    lacking_for_postgres,
    mlflow_on_postgres,
    told,
)

from cluster.job import enter_project
from cluster.submit import (
    SubmissionFailed,
    choose_authentication,
    connect,
    inputs_of,
    main,
    passed_on,
    upload_inputs,
)
from pipelines.settings import load_settings
from stages.evaluate import evaluate
from stages.features import features
from stages.inputs import write_inputs
from stages.prepare import prepare
from stages.sweep import sweep

ROOT = Path(__file__).parents[2]
SECRETS = {"HF_TOKEN": "hf_topsecret1", "MLFLOW_TRACKING_TOKEN": "topsecret2", "AWS_SECRET_ACCESS_KEY": "topsecret3"}
GRIDS = [{"name": "methods", "method": ["nuwa", "random"], "position": ["perc", "pesp"]}]


@pytest.fixture
def servers() -> Iterator[Servers]:
    with Servers() as held:
        yield held


@pytest.fixture
def mlflow_server(servers, monkeypatch) -> str:
    """MLflow on PostgreSQL, expected by ``servers``."""
    if lacking := lacking_for_postgres():
        pytest.skip(f"PostgreSQL is not installed: no {', '.join(lacking)}; `apt-get install postgresql` brings it")
    pytest.importorskip(
        "psycopg2", reason="psycopg2-binary is not installed; `pip install -r requirements-test.txt` does"
    )
    address = mlflow_on_postgres(servers)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.fixture
def cluster_address(servers, monkeypatch) -> str:
    """A head alone, whose autoscaler starts a node for one worker, and another when the first is taken away while it is at
    its second unit; expected by ``servers``."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(servers.folder / "token"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    control = servers.folder / "control"
    control.mkdir()
    (control / "1.preempt.2").touch()
    return growing_cluster(servers, 2, NUWA_REHEARSAL=str(control))


@pytest.fixture
def repository(tmp_path, model_folder, monkeypatch) -> Path:
    """A user's checkout with a tiny model and a tiny sweep, its data prepared."""
    top = tmp_path / "repository"
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines():
        if not name.startswith(("tests/", "docs/", "models/testbed")) and name != "dvc.lock" and (ROOT / name).exists():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, top / name)
    shutil.copytree(model_folder, top / "models" / "tiny")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"]["path"] = "models/tiny"
    params["prepare"] |= {"images": 8, "questions": {"refcoco": 1, "pope": 1}}
    params["features"] |= {"shard_images": 4, "batch_size": 4}
    params["sweep"] |= {"benchmarks": ["refcoco", "pope"], "images": 8, "unit_images": 4, "budgets": [16]}
    params["sweep"]["grids"] = GRIDS
    params["plugins"] = ["faults"]
    shutil.copy(faults.__file__, top / "faults.py")
    (top / "params.yaml").write_text(yaml.safe_dump(params))
    who = ["-c", "user.name=user", "-c", "user.email=user@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "a sweep"]):
        subprocess.run(["git", *command], cwd=top, check=True)
    monkeypatch.chdir(top)
    write_inputs()
    prepare(load_settings())
    return top


def run(top: Path, *arguments: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": "", "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def kept_in(work: Path) -> dict[Path, int]:
    """Inputs, features and answers of a work folder, and when they were written."""
    held = [*(work / "inputs").iterdir(), *work.glob("cache/**/*.arrow"), *work.glob("cache/**/*.unit.parquet")]
    return {path: path.stat().st_mtime_ns for path in held}


def test_a_submitted_sweep_comes_back_to_dvc_and_mlflow(
    servers, cluster_address, mlflow_server, repository, tmp_path, monkeypatch
):
    servers.wait()
    storage = tmp_path / "shared"
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    printed = run(repository, "-m", "cluster.submit", "--address", cluster_address, "--storage", storage)
    assert "results are in data/ and dvc.lock; `dvc repro` scores them and makes the report" in printed

    megabytes = float(re.search(r"^code: ([\d.]+) MB$", printed, re.MULTILINE)[1])
    assert 0.2 < megabytes <= 5
    # Nothing that a cluster's API, which `ray job list` prints, or a process list shows holds a secret, and nobody without
    # the token is answered.
    jobs = told(cluster_address, "api/jobs/")
    assert "cluster.job" in jobs and "MLFLOW_TRACKING_URI" in jobs
    processes = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    for secret in (*SECRETS.values(), TOKEN):
        assert secret not in jobs and secret not in processes
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster_address}/api/jobs/", timeout=DEADLINE_S)
    assert refused.value.code in (401, 403)
    own = "".join(line for line in processes.splitlines(keepends=True) if str(servers.folder) in line)
    (gcs,) = set(re.findall(r"--gcs-address=(127\.0\.0\.2:\d+)", own))
    stranger = forked(
        lambda: GcsClient(address=gcs)
    )  # this process has no token: Ray asked for one when it was imported
    assert stranger.code == 1 and "InvalidAuthToken" in stranger.err

    trials = pd.read_parquet(repository / "data" / "trials.parquet")
    examples = pd.read_parquet(repository / "data" / "examples.parquet")
    predictions = pd.read_parquet(repository / "data" / "predictions.parquet")
    assert len(trials) == 5
    asked = {(trial, example) for trial in trials["trial_id"] for example in examples["example_id"]}
    assert set(zip(predictions["trial_id"], predictions["example_id"], strict=True)) == asked
    assert len(predictions) == len(asked)

    # DVC takes what came back for the stages' own outputs: nothing of them would run again.
    with Repo(str(repository)) as dvc:
        assert not {"features", "sweep"} & set(dvc.status(targets=["features", "sweep"]))

    evaluate(load_settings())
    client = MlflowClient(mlflow_server)
    runs = client.search_runs([client.get_experiment_by_name("nuwa-testbed").experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert {run.data.tags["trial_id"] for run in children} == set(trials["trial_id"])
    assert len(children) == len(trials)
    assert len(runs) == len(trials) + 1

    # The work folder outlives the job: another job of the same sweep finds its inputs and answers there, wherever it runs.
    settings = load_settings()
    work = storage / "work"
    held = kept_in(work)
    assert {"".join(path.suffixes[-2:]) for path in held} >= {".unit.parquet", ".safetensors"}
    upload_inputs(str(storage), "again", inputs_of(settings))
    enter_project(str(storage), work, "again")
    features(settings)
    sweep(settings)
    assert kept_in(work) == held
    pd.testing.assert_frame_equal(predictions, pd.read_parquet(Path("data/predictions.parquet")))


@pytest.mark.parametrize(
    ("environment", "file", "mode"),
    [
        ({"RAY_AUTH_MODE": "token"}, True, "token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "t"}, True, "disabled"),
        ({"RAY_AUTH_MODE": "disabled"}, False, "disabled"),
        ({"RAY_AUTH_TOKEN": "t"}, False, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "/t"}, False, "token"),
        ({}, True, "token"),
    ],
)
def test_authentication_is_by_token_unless_it_is_said_otherwise(environment, file, mode, tmp_path):
    if file:
        (tmp_path / "token").write_text("t")
    assert choose_authentication(environment, tmp_path / "token") == mode


def test_no_token_is_no_reason_to_go_without(tmp_path):
    with pytest.raises(SubmissionFailed, match=r"no token for the cluster: put the one it was started with into"):
        choose_authentication({}, tmp_path / "token")


def test_variables_that_hold_secrets_stay_at_home(capsys):
    environment = SECRETS | {"HF_HOME": "/shared/hf", "MLFLOW_TRACKING_URI": "postgresql://mlflow:pw@db/mlflow"}
    assert passed_on(environment) == {"HF_HOME": "/shared/hf"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("not sent, because the cluster's job list would show it: HF_TOKEN, MLFLOW_TRACKING_TOKEN, ")
    assert "MLFLOW_TRACKING_URI" in line and "~/.nuwa/secrets.env" in line


def refusal(monkeypatch, capsys, *arguments: str) -> str:
    """The last line that ``cluster/submit`` says when it refuses its arguments."""
    monkeypatch.setattr(sys, "argv", ["submit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("storage", ["s3://key:secret@bucket/x", "s3://bucket/x?access_key=a&secret_key=b"])
def test_a_storage_uri_with_credentials_is_refused(storage, monkeypatch, capsys):
    line = refusal(monkeypatch, capsys, "--work", "/shared", "--storage", storage)
    assert "holds credentials, which the cluster's job list would show" in line and "secret@" not in line


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SubmissionFailed) as raised:
        connect(address)
    assert str(raised.value).startswith(f"{address}: ")
    assert "see that `ray dashboard` or a port forward leads there" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_uri_without_a_work_folder_is_refused(monkeypatch, capsys):
    assert refusal(monkeypatch, capsys, "--storage", "s3://bucket/x").endswith(
        "error: --work is needed: --storage is a URI, and features and units need a folder that every node sees"
    )
