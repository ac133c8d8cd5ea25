"""The actor of a worker. It builds from a small specification, so that weights are loaded where it runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipelines.files.secrets import load_secrets


class Worker(Protocol):
    def run(self, unit: Any, upcoming: Any | None) -> Any: ...


class WorkerSpec(Protocol):
    def build(self) -> Worker: ...


class Place(NamedTuple):
    """Where a worker runs: Ray's id of the machine, its address, and the accelerators that Ray gave to the worker."""

    node: str
    machine: str
    devices: tuple[str, ...]


class Host:
    """Holds one worker. What fails is raised by the method that was called, never by the actor's making."""

    def __init__(self, spec: WorkerSpec, project: str) -> None:
        # Models and weights are named by paths below the driver's folder, and only code came along.
        if Path(project).is_dir():
            os.chdir(project)
        self.spec = spec

    def place(self) -> Place:
        """Answers once the process runs."""
        import ray

        context = ray.get_runtime_context()
        devices = tuple(f"{kind} {number}" for kind, held in context.get_accelerator_ids().items() for number in held)
        return Place(context.get_node_id(), f"{socket.gethostname()} ({ray.util.get_node_ip_address()})", devices)

    def build(self) -> None:
        """Answers once the worker is built."""
        load_secrets()
        self.worker = self.spec.build()

    def run(self, unit: Any, upcoming: Any | None) -> Any:
        return self.worker.run(unit, upcoming)
