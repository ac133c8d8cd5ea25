"""Programs that begin as forks end, speak and die as processes of their own do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest
from warm_workers import VARIABLE, warm_program

HANGS_S = 600
SAYS = "import os, sys; print('torch' in sys.modules, sys.argv[1:], os.getcwd()); print('oh', file=sys.stderr); sys.exit(3)"
STAYS = "import os, pathlib, sys, time; print(os.getpid(), flush=True); time.sleep(3600)"


@pytest.mark.parametrize("answered", [True, False], ids=["a copy", "where nobody answers"])
def test_a_program_says_and_ends_as_it_would_by_itself(warm, answered, tmp_path, monkeypatch):
    if not answered:
        monkeypatch.setenv(VARIABLE, "nobody")
    (tmp_path / "program.py").write_text(SAYS)
    done = subprocess.run(warm_program(tmp_path / "program.py", 1, "b"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.endswith("oh\n")
    assert done.stdout == f"{answered} ['1', 'b'] {Path(tmp_path).resolve()}\n"


def test_a_program_is_killed_with_what_asked_for_it(warm, tmp_path):
    (tmp_path / "program.py").write_text(STAYS)
    with subprocess.Popen(warm_program(tmp_path / "program.py"), stdout=subprocess.PIPE, text=True) as asked:
        copy = psutil.Process(int(asked.stdout.readline()))
        assert copy.pid != asked.pid
        asked.kill()
    copy.wait(HANGS_S)
