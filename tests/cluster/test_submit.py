"""``cluster/submit`` against real servers: a Ray head that grows and loses a machine, and MLflow on PostgreSQL. The short
form of ``make rehearsal``."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pandas as pd
import psutil
import pytest
import yaml
from dvc.repo import Repo
from forked import forked
from mlflow import MlflowClient
from ray._raylet import GcsClient
from rehearsal.project import check_out, run
from rehearsal.servers import (
    DEADLINE_S,
    TOKEN,
    Servers,
    free_port,
    growing_cluster,
    lacking_for_postgres,
    mlflow_on_postgres,
    told,
)
from workers_here import work_here

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
from stages.entry import KEPT, PREDICTIONS, SWEEP, TRIALS
from stages.evaluate import evaluate
from stages.features import features
from stages.inputs import write_inputs
from stages.prepare import prepare
from stages.sweep import sweep

ROOT = Path(__file__).parents[2]
SECRETS = {"HF_TOKEN": "hf_topsecret1", "MLFLOW_TRACKING_TOKEN": "topsecret2", "AWS_SECRET_ACCESS_KEY": "topsecret3"}
SERVICES = (  # a method each of what listens on a head, on a node and in a worker, and for Ray Client
    "JobInfoGcsService/GetAllJobInfo",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "ReporterService/GetTraceback",
    "CoreWorkerService/GetCoreWorkerStats",
    "RayletDriver/ClusterInfo",
)
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
def cluster_address(servers, warm, monkeypatch) -> str:
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
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"]["path"] = "models/tiny"
    params["prepare"] |= {"images": 8, "questions": {"refcoco": 1, "pope": 1}}
    params["features"] |= {"shard_images": 4, "batch_size": 4}
    params["cluster"] |= {"workers": 1}
    params["sweep"] |= {"benchmarks": ["refcoco", "pope"], "images": 8, "unit_images": 4, "budgets": [16]}
    params["sweep"]["grids"] = GRIDS
    top = check_out(tmp_path / "repository", params)
    shutil.copytree(model_folder, top / "models" / "tiny")
    monkeypatch.chdir(top)
    write_inputs()
    prepare(load_settings())
    return top


def kept_in(work: Path) -> dict[Path, int]:
    """Inputs, features and answers of a work folder, and when they were written."""
    held = [*(work / "inputs").iterdir(), *work.glob("cache/**/*.arrow"), *work.glob("cache/**/*.unit.parquet")]
    return {path: path.stat().st_mtime_ns for path in held}


def open_ports(servers: Servers) -> dict[tuple[str, int], psutil.Process]:
    """Addresses of the cluster's processes that others of its network could reach: every node has one of its own, and
    127.0.0.1 alone is this machine's."""
    tops = [psutil.Process(process.pid) for process in servers.running]
    found = {}
    for process in {below for top in tops for below in top.children(recursive=True)}:
        with contextlib.suppress(psutil.NoSuchProcess):
            for held in process.net_connections("inet"):
                address = ipaddress.ip_address(held.laddr.ip.removeprefix("::ffff:")) if held.laddr else None
                if (
                    held.status == psutil.CONN_LISTEN
                    and address is not None
                    and str(address) not in ("127.0.0.1", "::1")
                ):
                    found["127.0.0.1" if address.is_unspecified else str(address), held.laddr.port] = process
    return found


def answered_without_a_token(address: str) -> set[grpc.StatusCode]:
    """How a method of each of Ray's services there ends."""
    with grpc.insecure_channel(address) as channel:
        codes = set()
        for method in SERVICES:
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=30, wait_for_ready=False)
                codes.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.add(error.code())
        return codes


def check_ports(servers: Servers) -> None:
    """Whatever listens answers nobody without the token."""
    services, pages = 0, 0
    for (host, port), process in open_ports(servers).items():
        codes = answered_without_a_token(f"{host}:{port}")
        if codes == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}:
            services += 1
            continue
        assert codes == {grpc.StatusCode.UNAVAILABLE}, process.cmdline()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://{host}:{port}/api/jobs/", timeout=30)
        assert refused.value.code == 401, process.cmdline()
        pages += 1
    # The head's own and those of two nodes: GCS and Ray Client; of each node its manager, its objects and its agent, which
    # has a page too, as the one that makes environments has.
    assert services >= 2 + 3 * 2 and pages >= 2 * 2


def test_a_submitted_sweep_comes_back_to_dvc_and_mlflow(
    servers, cluster_address, mlflow_server, repository, tmp_path, monkeypatch
):
    servers.wait()
    storage = tmp_path / "shared"
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    printed = run(repository, "cluster.submit", "--address", cluster_address, "--storage", storage)
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
    check_ports(servers)
    own = "".join(line for line in processes.splitlines(keepends=True) if str(servers.folder) in line)
    (gcs,) = set(re.findall(r"--gcs-address=(127\.0\.0\.2:\d+)", own))
    stranger = forked(
        lambda: GcsClient(address=gcs)
    )  # this process has no token: Ray asked for one when it was imported
    assert stranger.code == 1 and "InvalidAuthToken" in stranger.err

    # It began with a head alone, which grew; the machine that was taken away cost the unit it was at, and came again.
    assert len(list(servers.folder.glob("*.node"))) == 2
    (taken,) = (servers.folder / "control").glob("preempt *")
    lines = [line.split() for line in (servers.folder / "control" / "units.log").read_text().splitlines()]
    begun, ended = ([unit for what, unit, *_ in lines if what == kind] for kind in ("begin", "end"))
    assert sorted(begun) == sorted([*ended, begun[1]]) and len(set(begun)) == len(ended)
    assert lines[2][0] == "begin" and lines[2][2] == taken.name.split()[1] != lines[-1][2]

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

    # A quiet run on this machine, which finds nothing of the cluster's, ends in the same bytes.
    came = {path: (repository / path).read_bytes() for path in (TRIALS, PREDICTIONS, KEPT)}
    monkeypatch.chdir(repository)
    for path in (*came, SWEEP):
        path.unlink()
    work_here(monkeypatch)
    sweep(load_settings())
    assert {path: path.read_bytes() for path in came} == came


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
