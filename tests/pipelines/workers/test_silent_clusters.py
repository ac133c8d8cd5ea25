"""A cluster that is gone, unknown, or something else: one line, before any lock or model."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from pipelines.settings import ClusterSettings
from pipelines.workers import ClusterUnavailable, joining, start_ray

REMEDY = "; start it, or see cluster.address and RAY_ADDRESS"


def refused(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What starting Ray says; ``RAY_ADDRESS`` wins over the settings."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ClusterUnavailable) as caught:
        start_ray(ClusterSettings(address=None, workers=1, cpus=1, gpus=0))
    return str(caught.value)


@pytest.fixture
def mute() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_cluster_that_is_gone(closed, monkeypatch):
    said = refused(f"127.0.0.1:{closed}", monkeypatch)
    assert said.startswith(f"127.0.0.1:{closed}: no Ray cluster answers there (ConnectionRefusedError: ")
    assert said.endswith(REMEDY) and "\n" not in said


def test_a_port_that_takes_connections_and_says_nothing(mute, monkeypatch):
    monkeypatch.setattr(joining, "ANSWER_S", 3.0)
    assert refused(f"127.0.0.1:{mute}", monkeypatch) == (
        f"127.0.0.1:{mute}: no Ray cluster answers there (it takes connections and gives no answer within 3 s){REMEDY}"
    )


def test_a_name_that_is_looked_up_for_ever(monkeypatch):
    held = threading.Event()

    def look_up(*_place: object, **_options: object) -> None:
        held.wait(30)
        raise OSError("left behind")

    monkeypatch.setattr(socket, "create_connection", look_up)
    monkeypatch.setattr(joining, "PROBE_S", 0.2)
    assert refused("unknown.invalid:6379", monkeypatch) == (
        f"unknown.invalid:6379: no Ray cluster answers there (TimeoutError: nothing within 0.2 s){REMEDY}"
    )
    held.set()


@pytest.mark.parametrize("address", ["head", "head:", "head:port", "head:99999"])
def test_an_address_that_is_none(address, monkeypatch):
    said = refused(address, monkeypatch)
    assert "\n" not in said and said.startswith(
        (f"{address}: no Ray cluster", f"cluster.address = {address!r}: allowed")
    )
