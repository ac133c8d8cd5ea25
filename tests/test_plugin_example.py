"""``examples/plugin`` beside the library's wheel alone, in a process of its own: what it registers stays out of other tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from wheels import build_wheel, install

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "plugin"
OFFERED_AND_TESTED = """
import pathlib, sys, nuwa.plugins
print(pathlib.Path(nuwa.__file__).parents[1])
print(nuwa.plugins.load_plugins(), "loudest" in [one.name for one in nuwa.methods()], flush=True)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_the_example_passes_its_own_test_beside_the_wheel_alone(library_wheel, tmp_path):
    """Two wheels as an installer lays them out, no repository on the path; the plugin's entry point is found."""
    site = tmp_path / "site"
    for wheel in (library_wheel, build_wheel(PLUGIN, tmp_path / "plugin")):
        install(wheel, site)
    shutil.copy(PLUGIN / "test_plugin.py", tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(site),
        "NUWA_MODEL": str(ROOT / "models" / "testbed"),
        "OMP_NUM_THREADS": "1",
    }

    tests = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_plugin.py"]
    command = [sys.executable, "-c", OFFERED_AND_TESTED, *tests]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found, loaded, passed, *_ = ran.stdout.splitlines()
    assert (found, loaded) == (str(site), "('nuwa_loudest',) True")
    assert passed.startswith("....."), "five tests"
