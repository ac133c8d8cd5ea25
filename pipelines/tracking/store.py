"""An experiment in a tracking store, behind the one door that turns an outage into a warning."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run
from nuwa.errors import UserError
from pipelines.tracking.address import checked_uri, without_password
from pipelines.tracking.runs import mlflow_metrics, param_text

logger = logging.getLogger(__name__)


T = TypeVar("T")


REPLAY_COMMAND = "python -m stages.track"


# Defaults; a value that the user has set stays. Left alone, MLflow's client retries for four minutes, while the sweep's
# driver stands still (these: about 15 s, once), prints a link for every run it closes and reports usage to its makers.
_CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "PGCONNECT_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class BadExperiment(UserError, ValueError):
    """An experiment that MLflow cannot hold."""


class TrackingStore:
    """An experiment in a tracking store, behind the one door that turns an outage into a warning."""

    def __init__(self, uri: str | None, experiment: str, artifact_location: str | None) -> None:
        self.uri = checked_uri(uri)
        if not experiment.strip():
            raise BadExperiment("MLflow experiment name is empty; give the experiment a name")
        self.on = True
        for name, value in _CLIENT_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.client: MlflowClient = self.attempt(lambda: _connect(self.uri))
        # Without an answer it stays empty, and nothing asks for it.
        self.experiment_id = self.attempt(lambda: self._find_or_create_experiment(experiment, artifact_location)) or ""

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Run one exchange with MLflow. After the first failure: warn, and do nothing from then on."""
        if not self.on:
            return None
        try:
            return action()
        except Exception as error:  # MLflow passes on what database drivers and object stores raise: no common ancestor
            self.on = False
            logger.warning(
                "MLflow at %s is off for the rest of this run: %s. No result is lost: the Parquet files are the "
                "record. Once MLflow answers, replay them with: %s",
                without_password(self.uri),
                _reason(error),
                REPLAY_COMMAND,
            )
            return None

    def _find_or_create_experiment(self, name: str, artifact_location: str | None) -> str:
        known = self.client.get_experiment_by_name(name)
        if known is not None:
            self._follow_the_database(known, artifact_location)
            return known.experiment_id
        return self.client.create_experiment(name, artifact_location or _default_artifacts(self.uri))

    def _follow_the_database(self, experiment: Experiment, wanted: str | None) -> None:
        """Artifacts of a project that was moved or copied lie beside its own database.

        MLflow keeps the absolute place of the day an experiment was made. Left alone, a copy would write into the
        original, and a moved project would make the old folder again. What the database says of an experiment and its
        runs is set to the folder beside it, where the old place is gone, or belongs to another database beside it.
        """
        here = _default_artifacts(self.uri)
        if wanted is not None or not self.uri.startswith("sqlite") or here is None:
            return
        there = experiment.artifact_location.removeprefix("file://")
        if there == here or Path(there).name != Path(here).name:
            return
        database = Path(sqlalchemy.make_url(self.uri).database or "")

        if Path(there).exists() and not Path(there).with_name(database.name).exists():
            return  # a place that someone chose
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            number, old = experiment.experiment_id, experiment.artifact_location
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (here, number))
            connection.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                (here, len(old) + 1, number, len(old), old),
            )
        logger.warning("MLflow: this project was moved or copied; artifacts of %r are in %s now", experiment.name, here)

    def resume_or_create(
        self, tag: str, value: str, name: str, params: Mapping[str, object], tags: Mapping[str, str]
    ) -> Run:
        """The active run whose `tag` is `value`, set RUNNING and brought up to date, else a new one."""
        runs = self.client.search_runs(
            [self.experiment_id], f"tags.`{tag}` = '{value}'", max_results=1, order_by=["attributes.start_time ASC"]
        )
        texts = {key: param_text(param) for key, param in params.items()}
        if not runs:
            run = self.client.create_run(self.experiment_id, run_name=name, tags={**tags, tag: value})
            self.batch(run.info.run_id, params=texts)
            return run

        run = runs[0]
        self.client.update_run(run.info.run_id, status="RUNNING", name=name)

        known = run.data.params
        changed = sorted(key for key in texts if key in known and known[key] != texts[key])
        if changed:
            logger.warning("MLflow keeps the first value of these params of run %r: %s", name, ", ".join(changed))
        self.batch(run.info.run_id, params={key: texts[key] for key in texts if key not in known}, tags=tags)
        return run

    def running(self, tag: str, value: str) -> str | None:
        """The id of the active run whose `tag` is `value`, where it is still RUNNING."""
        runs = self.client.search_runs(
            [self.experiment_id], f"tags.`{tag}` = '{value}' and attributes.status = 'RUNNING'", max_results=1
        )
        return runs[0].info.run_id if runs else None

    def batch(
        self,
        run_id: str,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int = 0,
    ) -> None:
        """Write to a run in one `log_batch`, which the client splits where a limit of MLflow asks for it."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        self.client.log_batch(
            run_id,
            [Metric(key, value, now, step) for key, value in mlflow_metrics(metrics or {}).items()],
            [Param(key, value) for key, value in (params or {}).items()],
            [RunTag(key, value) for key, value in (tags or {}).items()],
        )


def _connect(uri: str) -> MlflowClient:
    """A client for `uri`. A new SQLite database is created and migrated here (seconds), before any worker starts."""
    from mlflow import MlflowClient  # two seconds of imports, which only a process that tracks should pay

    if uri.startswith("sqlite"):
        path = Path(sqlalchemy.make_url(uri).database)
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            # Readers (the web page) and the writer then do not lock each other out; the file remembers the mode.
            connection.execute("PRAGMA journal_mode=WAL")
    client = MlflowClient(uri)
    # This logger prints a stack trace for each database error that `attempt` is about to report in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return client


def _default_artifacts(uri: str) -> str | None:
    """`mlartifacts` beside the SQLite file, or in the current folder for other databases; a server decides itself."""
    if uri.startswith("http"):
        return None
    folder = Path(sqlalchemy.make_url(uri).database).parent if uri.startswith("sqlite") else Path.cwd()
    return str(folder / "mlartifacts")


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line: `ConnectionRefusedError: [Errno 111] Connection refused`."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    first_line = str(error).strip().partition("\n")[0].rstrip(".")
    return without_password(f"{type(error).__name__}: {first_line[:300]}")
