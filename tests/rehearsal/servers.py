"""The servers of a real day on one machine: MLflow on PostgreSQL, and a Ray cluster that begins with a head and grows."""

from __future__ import annotations

import contextlib
import json
import os
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
from collections.abc import Callable
from pathlib import Path

import psutil
import warm_workers
import yaml

BIN = Path(sys.executable).parent
TESTS = Path(__file__).parents[1]
DEADLINE_S = 900  # for what hangs; on a machine whose cores others burn, seven minutes were too few
TOKEN = "5" * 40  # of the cluster
OBJECTS = 100 * 1024**2  # bytes of a node's object store
HEAD = "127.0.0.2"  # every node has a loopback address of its own; 127.0.0.1 itself Ray would take for the machine's outer one
TOOLS = ("initdb", "postgres", "pg_isready")


def postgres_tool(name: str) -> Path | None:
    found = shutil.which(name) or next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    return Path(found) if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def wait_for(what: str, ready, process: subprocess.Popen) -> None:
    """Until ``ready()``; raises ``RuntimeError`` when ``process`` ends or time runs out."""
    until = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{what} did not start; it ended as {process.poll()}")
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


def ray_start() -> list[str | Path]:
    """The command that starts a node, whose log nobody sends to a driver; with warm workers where there are any."""
    begin = [sys.executable, warm_workers.__file__, "--ray"] if warm_workers.VARIABLE in os.environ else [BIN / "ray"]
    return [*begin, "start", "--block", "--include-log-monitor", "false"]


def alive_nodes(dashboard: str) -> int:
    try:
        nodes = json.loads(told(dashboard, "nodes?view=summary"))["data"]["summary"]
    except (urllib.error.URLError, OSError):
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


class Servers:
    """Processes of a run in a new folder below ``/tmp``, ended by their ids in the opposite order, with the folder.

    Ray's sockets lie below its folder, and a socket's path is short.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nw-", dir="/tmp"))
        self.running: list[subprocess.Popen] = []
        self.awaited: list[tuple[str, Callable[[], bool], subprocess.Popen]] = []

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
        # What the autoscaler started is not a child of ours.
        for note in sorted(self.folder.glob("*.node")):
            with contextlib.suppress(psutil.NoSuchProcess):
                machine = psutil.Process(int(note.read_text()))
                if any(str(self.folder) in word for word in machine.cmdline()):  # not another one's of the same number
                    end_tree(machine.pid)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def end_tree(pid: int) -> None:
    """Kill a process and all below it, as a machine that is taken away does."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for process in [top, *top.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def lacking_for_postgres() -> list[str]:
    """What is not installed of what :func:`mlflow_on_postgres` needs."""
    return [name for name in TOOLS if postgres_tool(name) is None]


def mlflow_on_postgres(servers: Servers) -> str:
    """The address of a server that keeps its tables in PostgreSQL: started, and expected by ``servers``."""
    tools = {name: postgres_tool(name) for name in TOOLS}
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
    web = free_port()
    serve = [BIN / "mlflow", "server", "--host", "127.0.0.1", "--port", web, "--workers", "1"]
    backend = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    stores = ["--backend-store-uri", backend, "--artifacts-destination", servers.folder / "artifacts"]
    server = servers.start(
        "mlflow", [*serve, *stores], env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    )
    servers.expect("MLflow", lambda: answers(f"http://127.0.0.1:{web}/health"), server)
    return f"http://127.0.0.1:{web}"


def growing_cluster(servers: Servers, most: int, **environment: str) -> str:
    """The address of the job server of a cluster that is a head without a processor for work, and grows.

    Its autoscaler starts up to ``most`` nodes with one processor each when workers wait, by
    :class:`rehearsal.autoscaling.Raylets`, so what runs, runs where the job does not. Every node has ``environment`` and a
    folder of its own, as machines have; else nodes unpack code over each other.
    """
    from pipelines.workers.joining import NO_PAGES  # the autoscaler's process reads this file too, without the project

    token, types = servers.folder / "token", servers.folder / "types.yaml"
    token.write_text(TOKEN)
    port, dashboard = free_port(), free_port()
    node_types = {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": most},
    }
    provider = {
        "type": "external",
        "module": "rehearsal.autoscaling.Raylets",
        "folder": str(servers.folder),
        "gcs": f"{HEAD}:{port}",
        "disable_node_updaters": True,  # no machine to reach by SSH
        "disable_launch_config_check": True,
    }
    config = {
        "cluster_name": "rehearsal",
        "max_workers": most,
        "provider": provider,
        "available_node_types": node_types,
    }
    config |= {"head_node_type": "head", "idle_timeout_minutes": 30, "upscaling_speed": 9.0, "auth": {}, "docker": {}}
    for commands in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"):
        config[f"{commands}_commands"] = []
    types.write_text(yaml.safe_dump(config | {"file_mounts": {}, "cluster_synced_files": []}))

    told_to_nodes = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        **NO_PAGES,
        "RAY_agent_register_timeout_ms": str(1000 * DEADLINE_S),  # a busy machine is not a broken one
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_HEARTBEAT_TIMEOUT_S": str(DEADLINE_S),
        "NUWA_NODE_TYPES": str(types),  # where the launcher would leave them on the head
        "PYTHONPATH": str(TESTS),  # of the autoscaler's provider
    }
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        told_to_nodes.pop(name, None)
    begin = [*ray_start(), "--head", "--node-ip-address", HEAD, "--port", port, "--num-cpus", "0"]
    begin += ["--num-gpus", "0", "--object-store-memory", OBJECTS, "--disable-usage-stats", "--temp-dir"]
    begin += [
        servers.folder / "ray0",
        "--autoscaling-config",
        types,
        "--dashboard-host",
        "127.0.0.1",
        "--dashboard-port",
    ]
    begin += [dashboard, "--dashboard-agent-listen-port", free_port()]
    head = servers.start("head", begin, env=told_to_nodes | environment)
    address = f"http://127.0.0.1:{dashboard}"
    servers.expect("the head", lambda: alive_nodes(address) >= 1, head)
    return address
