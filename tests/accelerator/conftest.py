"""These tests change torch for their whole process; ``tests/nuwa/test_device_placement.py`` gives them one."""

from __future__ import annotations

from collections.abc import Callable

import pretended_device  # noqa: F401  (before anything runs)
import pytest

from nuwa.vlm import Adapter


@pytest.fixture
def tiny(request) -> Callable[[str], Adapter]:
    """A tiny family by its fixture's name, on the CPU."""
    return request.getfixturevalue
