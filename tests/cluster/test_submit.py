"""``cluster/submit`` against real servers: a Ray head with a further raylet, and MLflow on PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
import yaml
from dvc.repo import Repo
from forked import forked
from mlflow import MlflowClient
from ray._raylet import GcsClient

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
BIN = Path(sys.executable).parent
DEADLINE_S = 900  # for what hangs; on a machine whose cores others burn, seven minutes were too few
TOKEN = "5" * 40  # of the test's cluster
SECRETS = {"HF_TOKEN": "hf_topsecret1", "MLFLOW_TRACKING_TOKEN": "topsecret2", "AWS_SECRET_ACCESS_KEY": "topsecret3"}
GRIDS = [{"name": "methods", "method": ["nuwa", "random"], "position": ["perc", "pesp"]}]


def postgres_tool(name: str) -> Path | None:
    found = shutil.which(name) or next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    return Path(found) if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def wait_for(what: str, ready, process: subprocess.Popen) -> None:
    """Until ``ready()``; fails when ``process`` ends or time runs out."""
    until = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"{what} did not start; it ended as {process.poll()}")
        pause.wait(0.1)


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def told(dashboard: str, what: str) -> str:
    """What the cluster's API answers to one who has the token."""
    question = urllib.request.Request(f"{dashboard}/{what}", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(question, timeout=DEADLINE_S) as response:
        return response.read().decode()


def alive_nodes(dashboard: str) -> int:
    try:
        nodes = json.loads(told(dashboard, "nodes?view=summary"))["data"]["summary"]
    except (urllib.error.URLError, OSError):
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


class Servers:
    """Processes of a test, ended by their ids in the opposite order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running, self.awaited = folder, [], []

    def start(self, name: str, command: list, **options) -> subprocess.Popen:
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, cwd=self.folder, **options
            )
        self.running.append(process)
        return process

    def expect(self, what: str, ready, process: subprocess.Popen) -> None:
        """``process`` is needed later, and others may start beside it."""
        self.awaited.append((what, ready, process))

    def wait(self) -> None:
        """Until all that is expected is there."""
        for what in self.awaited:
            wait_for(*what)

    def stop(self) -> None:
        for process in reversed(self.running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def servers():
    # Ray's sockets lie below its folder, and a socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="nw-", dir="/tmp"))
    held = Servers(folder)
    yield held
    held.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def mlflow_on_postgres(servers, monkeypatch) -> str:
    """A server that keeps its tables in PostgreSQL: started, and expected by ``servers``."""
    tools = {name: postgres_tool(name) for name in ("initdb", "postgres", "pg_isready")}
    lacking = [name for name, path in tools.items() if path is None]
    if lacking:
        pytest.skip(f"PostgreSQL is not installed: no {', '.join(lacking)}; `apt-get install postgresql` brings it")
    pytest.importorskip(
        "psycopg2", reason="psycopg2-binary is not installed; `pip install -r requirements-test.txt` does"
    )
    data, port = servers.folder / "pg", free_port()
    data.mkdir()
    who = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(data, "postgres")
        servers.folder.chmod(0o755)
        who = {"user": "postgres", "group": "postgres", "extra_groups": []}
    initialise = [tools["initdb"], "-D", data, "-U", "mlflow", "--auth=trust", "--no-sync", "-E", "UTF8"]
    subprocess.run(initialise, check=True, capture_output=True, cwd=servers.folder, **who)
    database = servers.start(
        "postgres", [tools["postgres"], "-D", data, "-h", "127.0.0.1", "-p", port, "-k", data, "-F"], **who
    )
    ready = [tools["pg_isready"], "-q", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow"]
    wait_for("PostgreSQL", lambda: subprocess.run(ready).returncode == 0, database)

    # Its jobs, for scorers of its own, take eight more processes, which nothing here has work for.
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    web = free_port()
    serve = [BIN / "mlflow", "server", "--host", "127.0.0.1", "--port", web, "--workers", "1"]
    backend = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    stores = ["--backend-store-uri", backend, "--artifacts-destination", servers.folder / "artifacts"]
    server = servers.start("mlflow", [*serve, *stores])
    servers.expect("MLflow", lambda: answers(f"http://127.0.0.1:{web}/health"), server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{web}")
    return f"http://127.0.0.1:{web}"


@pytest.fixture
def cluster_address(servers, monkeypatch) -> str:
    """A head without a processor for work and a raylet with one, so that what runs, runs where the job does not: started,
    and expected by ``servers``."""
    token = servers.folder / "token"
    token.write_text(TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_agent_register_timeout_ms", str(1000 * DEADLINE_S))  # a busy machine is not a broken one
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port, dashboard = free_port(), free_port()
    begin = [BIN / "ray", "start", "--block", "--object-store-memory", 100 * 1024**2, "--disable-usage-stats"]
    board = ["--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard]

    def node(number: int, *options) -> subprocess.Popen:
        # Every node has a loopback address of its own; 127.0.0.1 itself Ray would take for this machine's outer one.
        place = ["--node-ip-address", f"127.0.0.{number}", "--dashboard-agent-listen-port", free_port()]
        own = ["--temp-dir", servers.folder / f"ray{number}"]  # as machines have; else nodes unpack over each other
        return servers.start(f"node{number}", [*begin, *place, *own, "--num-gpus", "0", *options])

    head = node(2, "--head", "--port", port, "--num-cpus", "0", *board)
    wait_for("node 2", lambda: listens("127.0.0.2", port), head)  # a raylet joins before there is a dashboard
    raylet = node(3, "--address", f"127.0.0.2:{port}", "--num-cpus", "1")
    servers.expect("node 3", lambda: alive_nodes(f"http://127.0.0.1:{dashboard}") == 2, raylet)
    return f"http://127.0.0.1:{dashboard}"


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
    servers, cluster_address, mlflow_on_postgres, repository, tmp_path, monkeypatch
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
    client = MlflowClient(mlflow_on_postgres)
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
