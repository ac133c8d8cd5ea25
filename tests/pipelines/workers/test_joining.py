"""An instance of Ray as users have it: what tests elsewhere leave out or warm up is here as the product starts it."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import ray
from warm_workers import VARIABLE

from pipelines.settings import ClusterSettings
from pipelines.workers.joining import KEPT_MEMORY, NO_PAGES, ClusterUnavailable, start_ray

HERE = ClusterSettings(address=None, workers=1, cpus=1, gpus=0)
LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


def late(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own start finds its raylet too late, so many times."""
    start, left = ray.init, [None] * times

    def init(**options: Any) -> Any:
        if left:
            left.pop()
            raise Exception(LATE)
        return start(**options)

    monkeypatch.setattr(ray, "init", init)


def test_a_worker_imports_all_itself_and_a_raylet_that_comes_too_late_is_started_again(monkeypatch):
    for name in (VARIABLE, "GLIBC_TUNABLES", "RAY_worker_niceness", *NO_PAGES):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    late(2, monkeypatch)

    def look() -> tuple[bool, int, dict[str, str | None]]:
        warm = "torch" in sys.modules
        import pipelines.features.encoding
        import pipelines.sweep.answers  # noqa: F401  (what a worker imports)

        return warm, os.nice(0), {name: os.environ.get(name) for name in ("GLIBC_TUNABLES", *NO_PAGES)}

    assert start_ray(HERE)
    try:
        warm, niceness, given = ray.get(ray.remote(look).remote())
    finally:
        ray.shutdown()
    assert not warm and niceness == os.nice(0)
    assert given == {"GLIBC_TUNABLES": KEPT_MEMORY} | NO_PAGES


def test_a_raylet_that_never_comes_is_one_line(monkeypatch):
    late(9, monkeypatch)
    with pytest.raises(
        ClusterUnavailable, match=r"^Ray did not start or join on this machine: .*timed out during startup"
    ):
        start_ray(HERE)
