"""Starting Ray on this machine or joining a cluster, and what a cluster has and could bring."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuwa.errors import UserError
from pipelines.files.code_package import stage_code
from pipelines.workers.policy import reason

if TYPE_CHECKING:  # the settings know all methods, which a worker's process should not have to import
    from pipelines.settings import ClusterSettings

OBJECT_STORE_BYTES = 200 * 1024**2  # results travel as files, so the store stays small
# Layers take and give back the same megabytes over and over. By itself glibc hands them to the system and gets them page
# by page, zeroed: a sixth of a sweep's time on a CPU.
KEPT_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"trim_threshold": 2**30, "mmap_threshold": 2**25, "hugetlb": 1}.items()
)
# Ray's pages of figures for Prometheus listen on every interface and ask for no token; with these variables none does: the
# nodes' own are an option of Ray's, and no server listens on port -1, which is a line in the log of autoscaler and dashboard.
STARTS = 3  # tries of an instance on this machine
TOO_LATE = "timed out during startup"  # what Ray says of a raylet that it waited for in vain
NO_PAGES = {"RAY_enable_metrics_collection": "0", "AUTOSCALER_METRIC_PORT": "-1", "DASHBOARD_METRIC_PORT": "-1"}
PROBE_S = 10.0  # for a connection; Ray itself would try for minutes
ANSWER_S = 60.0  # for a first answer of the cluster, the import of Ray included
ASK = """
import sys
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient
GcsClient(address=canonicalize_bootstrap_address(sys.argv[1]) or sys.exit(NOTHING_RUNS)).get_all_node_info()
"""
NOTHING_RUNS = 3
TOKEN_FILE = Path("~/.ray/auth_token")
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # on the head of a launcher's cluster: its node types


class ClusterUnavailable(UserError, RuntimeError):
    """Ray did not start, the cluster could not be joined, or it has no place for a worker."""


def start_ray(cluster: ClusterSettings) -> bool:
    """Connect to ``cluster`` unless this process is connected; True when the caller should shut Ray down."""
    address = cluster.resolved_address
    _settle_authentication(address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray lets workers yield to everything else on the machine, 15 steps down; here they are what the machine is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("GLIBC_TUNABLES", KEPT_MEMORY)  # of workers on this machine; a cluster's have their own
    for name, value in NO_PAGES.items():
        os.environ.setdefault(name, value)
    if address is not None:
        probe(address)
    import ray

    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.WARNING, "log_to_driver": False}
    if address is None:
        room = (os.cpu_count() or 1) if cluster.workers == "auto" else cluster.workers * cluster.cpus
        options |= {"address": "local", "num_cpus": max(room, cluster.cpus), "object_store_memory": OBJECT_STORE_BYTES}
        if cluster.gpus == 0:
            options["num_gpus"] = 0
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(own_sigterm())
            if address is not None:
                staged = stack.enter_context(tempfile.TemporaryDirectory())
                size = stage_code(Path(), Path(staged))
                print(f"joining {address}; code: {size / 1e6:.1f} MB", file=sys.stderr, flush=True)
                options |= {"address": address, "runtime_env": {"working_dir": staged}}
            _begin(options)
    except UserError:
        raise
    except Exception as error:  # Ray raises bare Exceptions here
        where = address or "on this machine"
        raise ClusterUnavailable(
            f"Ray did not start or join {where}: {reason(error)}; see cluster.address and RAY_ADDRESS"
        ) from error
    return True


def _begin(options: Mapping[str, Any]) -> None:
    """``ray.init``, anew where a raylet of this machine came too late for Ray: on busy cores half a minute is not enough."""
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises bare Exceptions here
            if not left or TOO_LATE not in str(error):
                raise
            ray.shutdown()


@contextlib.contextmanager
def own_sigterm() -> Iterator[None]:
    """Around ``ray.init``, which takes the signal for itself and ends the process: the caller's handler, which ends what
    it began in order, is put back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not before and before is not None:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, before)


def _settle_authentication(address: str | None) -> None:
    """Ray asks for a token only where it is told to, before its import; without one anyone on the network runs code."""
    mode = os.environ.get("RAY_AUTH_MODE") or ("token" if "ray" not in sys.modules else _mode_of_import())
    os.environ["RAY_AUTH_MODE"] = mode
    held = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if mode != "token" or held:
        return
    if address is None:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # an instance of this process and its workers
    elif not TOKEN_FILE.expanduser().exists():
        raise ClusterUnavailable(
            f"{address}: no token for the cluster: put the one it was started with into {TOKEN_FILE} "
            "(`ray get-auth-token` there shows it); RAY_AUTH_MODE=disabled is for a cluster on this machine's loopback"
        )


def _mode_of_import() -> str:
    """The mode Ray was imported with, which nothing changes afterwards."""
    from ray._raylet import (  # type: ignore[attr-defined]  # compiled, and its stub is not complete
        AuthenticationMode,
        get_authentication_mode,
    )

    return "token" if get_authentication_mode() == AuthenticationMode.TOKEN else "disabled"


def probe(address: str) -> None:
    """Have the cluster's head answer once; raises :class:`ClusterUnavailable` after ``PROBE_S`` or ``ANSWER_S`` seconds."""
    host, colon, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not colon and address.startswith("local"):
        return
    if not colon and address != "auto":
        raise ClusterUnavailable(f"cluster.address = {address!r}: allowed are auto and host:port (RAY_ADDRESS wins)")
    if colon:
        _connect(address, host.strip("[]"), port)
    if not address.startswith("ray://"):  # a server of Ray Client, which is asked in another way
        _ask(address)


def _connect(address: str, host: str, port: str) -> None:
    """A name is looked up without a deadline, so this happens in a thread that may be left behind."""
    faults: list[Exception] = []

    def connect() -> None:
        try:
            socket.create_connection((host, int(port)), timeout=PROBE_S).close()
        except (OSError, ValueError, OverflowError) as error:
            faults.append(error)

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(PROBE_S)
    if attempt.is_alive():
        faults.append(TimeoutError(f"nothing within {PROBE_S:g} s"))
    if faults:
        raise _silent(address, reason(faults[0]))


def _ask(address: str) -> None:
    """Ray waits for a head that does not answer for minutes, so a process of its own asks, which can be stopped."""
    command = [sys.executable, "-c", ASK.replace("NOTHING_RUNS", str(NOTHING_RUNS)), address]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        raise _silent(address, f"it takes connections and gives no answer within {ANSWER_S:g} s") from None
    if answer.returncode == NOTHING_RUNS:
        raise _silent(address, "no Ray runs on this machine")
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise _silent(address, last[:200])


def _silent(address: str, why: str) -> ClusterUnavailable:
    return ClusterUnavailable(
        f"{address}: no Ray cluster answers there ({why}); start it, or see cluster.address and RAY_ADDRESS"
    )


def worker_shape(cluster: ClusterSettings) -> dict[str, float]:
    return {key: need for key, need in (("CPU", cluster.cpus), ("GPU", cluster.gpus)) if need}


def fits(shape: dict[str, float], resources: dict[str, float]) -> int:
    """How many workers of ``shape`` a machine with ``resources`` holds."""
    return min(int(resources.get(key, 0) / need + 1e-9) for key, need in shape.items())


class Capacity:
    """What the cluster has and could bring, for workers of one shape; ``retired``: machines that get none."""

    def __init__(self, cluster: ClusterSettings) -> None:
        self.shape = worker_shape(cluster)
        self.retired: set[str] = set()

    @staticmethod
    def _alive() -> list[dict[str, Any]]:
        import ray

        return [node for node in ray.nodes() if node["Alive"]]

    def now(self) -> int:
        """Workers that machines of the cluster hold."""
        return sum(fits(self.shape, node["Resources"]) for node in self._alive() if node["NodeID"] not in self.retired)

    def machines(self) -> int:
        return sum(node["NodeID"] not in self.retired for node in self._alive())

    def to_come(self) -> int:
        """Workers that machines which an autoscaler may still start would hold; 0 where nothing is known of any."""
        kinds = self.kinds()
        return sum(fits(self.shape, resources) * count for resources, count in kinds.values())

    def kinds(self) -> dict[str, tuple[dict[str, float], int]]:
        """Node types of the launcher's file on this head → resources, and how many there may be."""
        try:
            import yaml

            held = yaml.safe_load((Path(os.environ.get("NUWA_NODE_TYPES") or BOOTSTRAP)).expanduser().read_text())
            return {
                name: (kind.get("resources", {}), int(kind.get("max_workers", 0)))
                for name, kind in held["available_node_types"].items()
                if name != held.get("head_node_type")
            }
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return {}

    def autoscales(self) -> bool:
        """Whether an autoscaler with node types of its own runs: Ray's monitor otherwise mirrors the nodes there are."""
        report = self._report()
        return bool(self.kinds()) or any(
            not name.startswith(("local-", "node_")) for name in report.get("active_nodes", {})
        )

    @staticmethod
    def _report() -> dict[str, Any]:
        """What the autoscaler last said, empty where there is none."""
        from ray.experimental.internal_kv import _internal_kv_get

        with contextlib.suppress(Exception):  # Ray raises what its server raises
            status = _internal_kv_get(b"__autoscaling_status")
            return (json.loads(status) if status else {}).get("autoscaler_report") or {}
        return {}

    def refuse_impossible(self) -> None:
        """Refuse workers that no machine can ever hold; Ray would wait for one without a word."""
        if self.now():
            return
        alive, kinds = self._alive(), self.kinds()
        if kinds and any(fits(self.shape, resources) and count for resources, count in kinds.values()):
            return
        if not kinds and self.autoscales():
            return  # its node types are not known here: they are awaited
        for key, name in (("CPU", "cpus"), ("GPU", "gpus")):
            most = max((node["Resources"].get(key, 0) for node in alive), default=0)
            most = max([most, *(resources.get(key, 0) for resources, _ in kinds.values())])
            if self.shape.get(key, 0) > most:
                raise ClusterUnavailable(f"cluster.{name} = {self.shape[key]:g}: no node has more than {most:g}")
        raise ClusterUnavailable(f"no node has {self._shape()} together")

    def _shape(self) -> str:
        return ", ".join(f"{need:g} {key}" for key, need in self.shape.items())

    def says(self) -> str:
        """One line: what is asked, what is there, what is pending."""
        alive = self._alive()
        there = {key: sum(node["Resources"].get(key, 0) for node in alive) for key in ("CPU", "GPU")}
        pending = [entry[2] for entry in self._report().get("pending_nodes", [])]
        wait = f"; starting: {', '.join(sorted(set(pending)))} ({len(pending)})" if pending else "; none is starting"
        return (
            f"a worker needs {self._shape()}; there: {len(alive)} machines with {there['CPU']:g} CPU, "
            f"{there['GPU']:g} GPU{wait if self.autoscales() else ''}"
        )
