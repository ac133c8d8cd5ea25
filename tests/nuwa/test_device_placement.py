"""Models on accelerators that there are not: ``tests/accelerator`` changes torch, so it runs in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_accelerators_answer_as_the_cpu_does():
    command = [sys.executable, "-m", "pytest", "tests/accelerator", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
