"""Commands in this process: what ``python -m stages.experiment NAME`` says, writes and exits with, without the seconds that
a process needs to import everything anew. That a command works as a process of its own is shown for each stage by
tests/stages/test_arguments.py and tests/stages/test_pipeline_definition.py."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

ROOT = Path(__file__).parents[1]


def run_here(module: str, *arguments: str, folder: Path) -> CompletedProcess[str]:
    """``python -m module arguments`` in ``folder``: exit code, output and errors."""
    file, code = ROOT.joinpath(*module.split(".")).with_suffix(".py"), 0
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        patch.object(sys, "argv", [str(file), *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
            if isinstance(stopped.code, str):
                print(stopped.code, file=sys.stderr)
    return CompletedProcess([module, *arguments], code, out.getvalue(), err.getvalue())
