"""Ray without what nothing in a test asks for: raylets, workers and the control store are Ray's own; nobody watches logs,
scales or serves a dashboard. Each of those is a process that imports for seconds and looks around as long as it lives."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import ray
from ray._private.node import Node
from ray.cluster_utils import Cluster

STARTS = 5  # tries of a raylet, to which Ray itself gives thirty seconds: too few where others burn the cores
OBJECTS = 100 * 1024**2  # bytes of a node's object store
BARE = {"include_log_monitor": False, "no_monitor": True, "include_dashboard": False, "object_store_memory": OBJECTS}


def started(start: Callable[[], Any]) -> Any:
    """What ``start`` returns, which starts a raylet; one that came too late for Ray is left to it and another started."""
    for attempt in range(1, STARTS + 1):
        try:
            return start()
        except Exception as error:  # Ray raises nothing narrower
            if "timed out during startup" not in str(error) or attempt == STARTS:
                raise


def add_node(cluster: Cluster, **options: Any) -> Node:
    """A raylet more, or the head of a cluster that has none, with ``options`` of Ray's ``Cluster.add_node``."""
    with patch.object(Node, "start_api_server", _start_nothing):
        return started(lambda: cluster.add_node(**BARE | options))


def _start_nothing(self: Node, **_options: Any) -> None:
    self._webui_url = None


@contextlib.contextmanager
def bare_ray(**options: Any) -> Iterator[None]:
    """This process connected to a head alone, with ``options`` of :func:`add_node`, which ends with the context."""
    cluster = Cluster()
    try:
        add_node(cluster, **options)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()
