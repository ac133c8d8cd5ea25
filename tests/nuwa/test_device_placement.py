"""Models on accelerators that there are not: ``tests/accelerator`` changes torch, so it runs in a process of its own, a copy
of this one: what takes seconds to import is there.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from forked import forked

ROOT = Path(__file__).parents[2]


def test_accelerators_answer_as_the_cpu_does(tmp_path):
    said = tmp_path / "said"

    def run() -> None:
        with contextlib.chdir(ROOT), said.open("w") as file:  # more than a pipe holds, where it fails
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            raise SystemExit(int(pytest.main(["tests/accelerator", "-p", "no:cacheprovider"])))

    done = forked(run)
    assert done.code == 0, said.read_text()
