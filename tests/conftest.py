from __future__ import annotations

import os
from collections.abc import Iterator

# Ray settles on a mode once a process; the tests' instances end with them. tests/cluster has one that asks for a token.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import pytest
from garbage import pytest_collection_finish, pytest_collectstart  # noqa: F401  (hooks)
from isolation import _leaves_nothing_behind, _one_thread, _random_numbers_begin_alike  # noqa: F401  (for all tests)
from running_order import pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401  (hooks)
from stores import new_store  # noqa: F401  (a fixture)
from tiny_families import (  # noqa: F401  (fixtures for all tests)
    families,
    family,
    newer,
    photos,
    tiny_idefics3,
    tiny_internvl,
    tiny_next,
    tiny_onevision,
    tiny_qwen,
    tiny_qwen2,
    tiny_qwen3,
    tiny_smolvlm,
    tiny_vlm,
)
from warm_workers import warm_workers
from wheels import library_wheel  # noqa: F401  (a fixture)

collect_ignore = ["accelerator"]  # changes torch: tests/nuwa/test_device_placement.py gives it a process of its own


@pytest.fixture(scope="session")
def warm() -> Iterator[None]:
    """Workers of Ray are copies of a process that has imported what they need."""
    with warm_workers():
        yield


@pytest.fixture(scope="session")
def scenes():
    from nuwa.testbed.scenes import draw_scene

    rng = np.random.default_rng(5)
    return [draw_scene(rng, "test") for _ in range(8)]
