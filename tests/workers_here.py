"""Work units in this process, for tests of what a stage does with its answers. That Ray's workers give the same bytes is
shown by tests/pipelines/test_sweep.py; without it a test is spared a Ray instance and workers that import everything anew.
"""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.features import encoding
from pipelines.sweep import answers
from pipelines.workers import GivenUp, run_units
from stages import search


def _run_units_here(*what: Any, **how: Any) -> GivenUp:
    return run_units(*what, **how | {"in_process": True})


def work_here(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone, features are encoded and units answered by one worker in this process."""
    for room in (encoding, answers):
        patch.setattr(room, "run_units", _run_units_here)
    patch.setattr(search, "start_ray", lambda cluster: False)
