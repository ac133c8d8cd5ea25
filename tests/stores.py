"""MLflow databases for tests: making one takes seconds of migrations, so it is made once a run and copied."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from once_a_run import once_a_run

EXPERIMENT = "pruning"
SWEEP = "4f1c9a"


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `Tracker.open(None, ...)` made everything itself."""
    from pipelines.tracking.tracker import Tracker

    def make(folder: Path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            with Tracker.open(None, EXPERIMENT, sweep_id=SWEEP) as tracker:
                assert tracker.on
        return folder

    return once_a_run(tmp_path_factory, "store", make)


def copy_store(new_store: Path, path: Path) -> None:
    """A migrated database of one's own at ``path``, with an experiment that has no runs; artifacts go beside it."""
    with sqlite3.connect(new_store / "mlflow.db") as source, sqlite3.connect(path) as target:
        source.backup(target)
        target.execute("UPDATE experiments SET artifact_location = ?", (str(path.parent / "mlartifacts"),))
    source.close(), target.close()
