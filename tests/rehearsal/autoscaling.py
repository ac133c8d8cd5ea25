"""Machines that Ray's autoscaler may start: raylets of this machine, each with an address, a folder and processes of its own.

Ray calls it a node provider of type ``external``; the autoscaler itself, which decides what is needed, is Ray's.
"""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any, NamedTuple

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from rehearsal.servers import HEAD, OBJECTS, end_tree, free_port, ray_start

FIRST = 10  # last byte of the first node's address


class Machine(NamedTuple):
    """``process``: null for the head, which others started."""

    process: subprocess.Popen | None
    tags: dict[str, str]
    address: str


class Raylets(NodeProvider):
    """One process of ``ray start`` a node; a node whose process is gone is terminated, as one that a cloud took away."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.folder, self.gcs = Path(provider_config["folder"]), provider_config["gcs"]
        self.lock = threading.RLock()
        head = {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_USER_NODE_TYPE: "head",
            TAG_RAY_NODE_NAME: "head",
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }
        self.machines = {"head": Machine(None, head, HEAD)}

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self.lock:
            return [
                name
                for name, machine in self.machines.items()
                if self.is_running(name) and tag_filters.items() <= machine.tags.items()
            ]

    def is_running(self, node_id: str) -> bool:
        with self.lock:
            machine = self.machines.get(node_id)
            return machine is not None and (machine.process is None or machine.process.poll() is None)

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        with self.lock:
            return dict(self.machines[node_id].tags)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self.lock:
            self.machines[node_id].tags.update(tags)

    def internal_ip(self, node_id: str) -> str:
        return self.machines[node_id].address

    def external_ip(self, node_id: str) -> str:
        return self.internal_ip(node_id)

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        for _ in range(count):
            with self.lock:
                number = len(self.machines)
                name, address = f"node{number}", f"127.0.0.{FIRST + number}"
                command = [*ray_start(), "--address", self.gcs, "--node-ip-address", address]
                command += ["--temp-dir", self.folder / f"ray{number}", "--num-cpus", "1", "--num-gpus", "0"]
                command += ["--object-store-memory", OBJECTS, "--disable-usage-stats"]
                command += ["--dashboard-agent-listen-port", free_port()]
                with open(self.folder / f"{name}.log", "wb") as log:
                    process = subprocess.Popen(
                        [str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, cwd=self.folder
                    )
                (self.folder / f"{name}.node").write_text(str(process.pid))  # for who ends all of it
                held = {**tags, TAG_RAY_NODE_NAME: name, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
                self.machines[name] = Machine(process, held, address)

    def terminate_node(self, node_id: str) -> None:
        with self.lock:
            machine = self.machines[node_id]
        if machine.process is not None:
            end_tree(machine.process.pid)
            machine.process.wait()
