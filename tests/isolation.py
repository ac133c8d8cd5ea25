"""Nothing that one test file leaves behind reaches the next: what is registered, set or started is as it was, or the file
that left it fails by name.

Random numbers begin alike in every test, so that no test depends on how many were drawn before it. What takes seconds to
import is imported by who runs tests: the process that deals files to others reads ``conftest.py`` too.
"""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

# Variables that decide what the project does. Libraries set others once, as they are imported.
WATCHED = re.compile(
    r"(NUWA|AWS|HF|TRANSFORMERS|OMP|CUDA|MLFLOW_TRACKING|RAY_AUTH)_\w+|RAY_ADDRESS|HOME|PATH|PYTHONPATH|COLUMNS|DEEP"
)


def _entries(table: Mapping[str, Any]) -> dict[str, int]:
    return {name: id(entry) for name, entry in table.items()}


def state() -> dict[str, Any]:
    """What files share, by name."""
    import torch

    from nuwa import methods
    from nuwa.benchmarks import BENCHMARKS
    from nuwa.benchmarks.own_tables import RULES
    from nuwa.benchmarks.protocols import PROTOCOLS
    from nuwa.stage1 import METHODS
    from nuwa.stage2 import SCORERS
    from nuwa.vlm import ADAPTERS
    from nuwa.vlm.language import TEXT_FAMILIES
    from nuwa.vlm.shapes import SHAPES
    from pipelines.axes import AXES, COLUMNS

    registries = (METHODS, SCORERS, BENCHMARKS, RULES, PROTOCOLS, ADAPTERS, TEXT_FAMILIES, SHAPES)
    tables: dict[str, Mapping[str, Any]] = {registry.kind: registry for registry in registries}
    tables |= {"method": methods.RECIPES, "axis": AXES, "column": COLUMNS}
    held: dict[str, Any] = {
        f"{kind} {name!r}": entry for kind, table in tables.items() for name, entry in _entries(table).items()
    }
    held |= {f"${name}": value for name, value in os.environ.items() if WATCHED.fullmatch(name)}
    ray = sys.modules.get("ray")
    return held | {
        "the working directory": os.getcwd(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's threads": torch.get_num_threads(),
        "torch's gradients": torch.is_grad_enabled(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "Ray": ray is not None and ray.is_initialized(),
    }


def left_behind(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what differs, sorted."""
    nothing = object()
    return sorted(
        name for name in before.keys() | after.keys() if before.get(name, nothing) != after.get(name, nothing)
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before = state()
    yield
    left = left_behind(before, state())
    assert not left, f"{request.node.nodeid} does not leave as it was: {', '.join(left)}"


@pytest.fixture(autouse=True)
def _random_numbers_begin_alike() -> None:
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if (
        torch.cuda.is_initialized()
    ):  # torch.manual_seed() keeps a call and its stack for every device that is not, each time
        torch.cuda.manual_seed_all(0)
