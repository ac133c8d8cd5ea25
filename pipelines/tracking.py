"""MLflow, a view of the sweep: one parent run for the sweep, one child run for each trial.

The Parquet files are the record and MLflow only shows them. Three properties follow, and everything here serves them:

* **Replay.** Every run is found again by a tag (`sweep_id`, `trial_id`, `training_id`), so writing the same tables a
  second time changes nothing, and writing them after an interruption completes what is missing.
* **An outage never fails a sweep.** All calls pass through one door, `_Store.attempt`. The first that fails warns once,
  with the reason and the command that replays, and tracking is off for the rest of the process.
* **One writer.** Only the driver writes, from one thread, with explicit run ids. Workers never import this module.

A child is written as `create_run` with its tags, one `log_batch`, and `set_terminated`: the status FINISHED comes last
and therefore means "complete". The *Duration* that MLflow shows for a child is the time these writes took.

    with Tracker.open("sqlite:///mlflow.db", "token pruning", sweep_id="4f1c9a") as tracker:
        tracker.parent("default sweep", params={"examples": 600}, tags=git_and_dvc_tags(Path(".")))
        tracker.trials(trial_runs(trials, scores, timings=None, tags={}))
        tracker.artifacts(Path("report"), "report")
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import pandas as pd
import sqlalchemy

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)
T = TypeVar("T")

REPLAY_COMMAND = "python -m stages.track"
DEFAULT_URI = "sqlite:///mlflow.db"
_WEB_SCHEMES = ("http", "https")
_DATABASE_SCHEMES = ("mssql", "mysql", "postgresql", "sqlite")
_URI_EXAMPLES = "sqlite:///mlflow.db, postgresql://user:password@host/database or http://host:5000"

_RUNS_A_PAGE = 1000
_DIGEST_CHARACTERS = 36

# Defaults; a value that the user has set stays. Left alone, MLflow's client retries for four minutes, while the sweep's
# driver stands still (these: about 15 s, once), prints a link for every run it closes and reports usage to its makers.
_CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

_TRIAL_PARAMS = ("method", "preset", "position", "budget", "image_tokens", "stage1_keep")
_TRIAL_PARAMS += ("stage2_layer", "stage2_keep", "stage2_cuts", "stage2_scorer", "stage2_recycling", "seed")
_TRIAL_PARAMS += ("flops_convention",)
_TRIAL_METRICS = ("average_tokens", "flops", "kv_bytes")


@dataclass(frozen=True)
class TrialRun:
    """What MLflow shows of one trial.

    Name, `params` and `metrics` are the content: when they change, the child run is replaced. `tags` say where the run
    came from (a DVC revision, say) and do not count: a child keeps the tags it was written with. `steps` are metrics
    at steps 1, 2, and so on: a curve.
    """

    trial_id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    steps: tuple[Mapping[str, float], ...] = ()

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal characters over name, params, metrics and steps; independent of the order of keys."""
        content = [self.name, dict(self.params), mlflow_metrics(self.metrics), *map(mlflow_metrics, self.steps)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def trial_runs(
    trials: pd.DataFrame, scores: pd.DataFrame, timings: pd.DataFrame | None, tags: Mapping[str, str]
) -> list[TrialRun]:
    """Turn the tables of a sweep into runs, in the order of `trials`.

    Args:
        trials: one row a trial (`trials.parquet`).
        scores: tidy scores (`scores.parquet`). Headline rows become `<benchmark>/<metric>` and
            `<benchmark>/retention`, aggregate rows (benchmark `mean`) `<family>_retention` with `_low` and `_high`
            (95 % interval). Other rows are detail, for the Parquet file on the parent.
        timings: one row a trial, `trial_id` and numeric columns; each becomes `timing/<column>`. None without timings.
        tags: provenance written on every child.

    Returns:
        Runs with MLflow's characters in their metric keys and without NaN or infinite values.
    """
    metrics: dict[str, dict[str, float]] = {trial_id: {} for trial_id in trials["trial_id"]}
    for row in scores[scores["trial_id"].isin(metrics)].to_dict("records"):
        metrics[row["trial_id"]] |= _score_metrics(row)
    if timings is not None:
        for trial_id, row in timings.set_index("trial_id").select_dtypes("number").to_dict("index").items():
            if trial_id in metrics:
                metrics[trial_id] |= {f"timing/{column}": value for column, value in row.items()}
    return [
        TrialRun(
            trial_id=row["trial_id"],
            name=row["label"],
            params=_trial_params(row),
            metrics=mlflow_metrics({name: row[name] for name in _TRIAL_METRICS} | metrics[row["trial_id"]]),
            tags=dict(tags),
        )
        for row in trials.to_dict("records")
    ]


def _score_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    if row["benchmark"] == "mean":
        key = f"{row['family']}_retention"
        return {key: row["score"], f"{key}_low": row["low"], f"{key}_high": row["high"]}
    if row["headline"]:
        key = f"{row['benchmark']}/{row['metric']}"
        return {key: row["score"], f"{row['benchmark']}/retention": row["retention"]}
    return {}


def _trial_params(row: Mapping[str, Any]) -> dict[str, str]:
    """Columns as params, then `method.<name>` for each hyper-parameter off the preset; absent values are left out."""
    columns = {name: row[name] for name in _TRIAL_PARAMS} | {"grids": ",".join(row["grids"])}
    columns |= {f"method.{name}": value for name, value in json.loads(row["params"]).items()}
    return {name: _param_text(value) for name, value in columns.items() if not _is_missing(value)}


def _is_missing(value: object) -> bool:
    return pd.api.types.is_scalar(value) and bool(pd.isna(value))


def _param_text(value: object) -> str:
    """Lists and mappings as JSON. `8.0` reads `8`, because pandas holds an integer column with nulls as floats."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool | list | tuple | Mapping):
        return json.dumps(value, sort_keys=True, default=str)
    return str(value)


def metric_key(name: str) -> str:
    """Spell a metric's name with the characters MLflow allows: `acc@0.5` → `acc_at_0.5`, others → `_`."""
    return re.sub(r"[^/\w.\- ]", "_", name.replace("@", "_at_"))


def mlflow_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as MLflow can hold them: allowed keys, Python floats, finite (it would store infinity as 1.8e308)."""
    values = {metric_key(name): float(value) for name, value in metrics.items() if value is not None}
    return {key: value for key, value in values.items() if math.isfinite(value)}


def checked_uri(uri: str | None) -> str:
    """Check a tracking URI without connecting, and make a SQLite path absolute.

    Args:
        uri: `sqlite:///<file>`, another database, or a server; None for `mlflow.db` in the current folder.

    Raises:
        ValueError: unknown scheme (among them `file:`, a store that MLflow 3 refuses), no host, no database file, or a
            database driver that is not installed.
    """
    uri = uri or DEFAULT_URI
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme in _WEB_SCHEMES:
        if not urlsplit(uri).hostname:
            raise _bad_uri(uri, "no host")
        return uri
    if scheme not in _DATABASE_SCHEMES:
        raise _bad_uri(uri, f"scheme {scheme!r} is not one of {', '.join(_WEB_SCHEMES + _DATABASE_SCHEMES)}")
    try:
        url = sqlalchemy.make_url(uri)
        url.get_dialect().import_dbapi()
    except ImportError as error:
        raise _bad_uri(uri, f"its database driver is not installed ({error})") from error
    except (ValueError, sqlalchemy.exc.ArgumentError) as error:
        raise _bad_uri(uri, str(error)) from error
    if scheme != "sqlite":
        return uri
    if url.host or url.database in (None, "", ":memory:"):
        raise _bad_uri(uri, "no database file (three slashes come before a relative path, four make it absolute)")
    return url.set(database=str(Path(url.database).absolute())).render_as_string(hide_password=False)


def _bad_uri(uri: str, problem: str) -> ValueError:
    return ValueError(_without_password(f"MLflow tracking URI {uri!r}: {problem}") + f"; use {_URI_EXAMPLES}")


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", text)


class _Store:
    """An experiment in a tracking store, behind the one door that turns an outage into a warning."""

    def __init__(self, uri: str | None, experiment: str, artifact_location: str | None) -> None:
        self.uri = checked_uri(uri)
        if not experiment.strip():
            raise ValueError("MLflow experiment name is empty; give the experiment a name")
        self.on = True
        for name, value in _CLIENT_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.client: MlflowClient = self.attempt(lambda: _connect(self.uri))
        self.experiment_id: str = self.attempt(lambda: self._find_or_create_experiment(experiment, artifact_location))

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
                _without_password(self.uri),
                _reason(error),
                REPLAY_COMMAND,
            )
            return None

    def _find_or_create_experiment(self, name: str, artifact_location: str | None) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        return self.client.create_experiment(name, artifact_location or _default_artifacts(self.uri))

    def resume_or_create(
        self, tag: str, value: str, name: str, params: Mapping[str, object], tags: Mapping[str, str]
    ) -> Run:
        """The active run whose `tag` is `value`, set RUNNING and brought up to date, else a new one."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{tag}` = '{value}'", max_results=1, order_by=["attributes.start_time ASC"]
        )
        texts = {key: _param_text(param) for key, param in params.items()}
        if not found:
            run = self.client.create_run(self.experiment_id, run_name=name, tags={**tags, tag: value})
            self.batch(run.info.run_id, params=texts)
            return run
        run = found[0]
        self.client.update_run(run.info.run_id, status="RUNNING", name=name)
        known = run.data.params
        changed = sorted(key for key in texts if key in known and known[key] != texts[key])
        if changed:
            logger.warning("MLflow keeps the first value of these params of run %r: %s", name, ", ".join(changed))
        self.batch(run.info.run_id, params={key: texts[key] for key in texts if key not in known}, tags=tags)
        return run

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
    return _without_password(f"{type(error).__name__}: {first_line[:300]}")


@dataclass(frozen=True)
class _Child:
    run_id: str
    fingerprint: str | None  # None while the run is not complete


class Tracker:
    """The sweep's parent run and its children. One object, one thread; open it in the driver only.

    Once MLflow has failed (`on` is then False) every method returns without doing anything. Left as a context manager,
    the parent ends as FINISHED, as KILLED after an interrupt, or as FAILED after any other exception.
    """

    def __init__(self, store: _Store, sweep_id: str) -> None:
        self._store = store
        self._sweep_id = sweep_id
        self._parent_id: str | None = None
        self._children: dict[str, list[_Child]] | None = None

    @classmethod
    def open(cls, uri: str | None, experiment: str, artifact_location: str | None = None, *, sweep_id: str) -> Tracker:
        """Connect, creating database and experiment where they are missing.

        Args:
            uri: see `checked_uri`. None means `mlflow.db` in the current folder, with artifacts under `mlartifacts`.
            experiment: name of the MLflow experiment.
            artifact_location: folder or object store for artifacts; counts when the experiment is created.
            sweep_id: identity of the sweep, the value of the tag under which its parent run is found again.

        Raises:
            ValueError: the URI or the experiment's name is malformed. A store that does not answer is no error.
        """
        return cls(_Store(uri, experiment, artifact_location), sweep_id)

    @property
    def on(self) -> bool:
        """Whether MLflow has answered so far."""
        return self._store.on

    def parent(self, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """Find the sweep's parent run or create it, and return its id (empty when tracking is off).

        Params cannot change in MLflow: a parent found again gets new ones only, and a warning names those that differ.
        What may change between two runs of the same sweep (commit, worker count) belongs in `tags`.
        """
        run = self._store.attempt(lambda: self._store.resume_or_create("sweep_id", self._sweep_id, name, params, tags))
        self._parent_id = run.info.run_id if run else None
        self._children = None
        return self._parent_id or ""

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log how the sweep stands (trials done, examples a second, seconds left, cache hits) on the parent."""
        self._on_parent(lambda parent: self._store.batch(parent, metrics, step=step))

    def trials(self, rows: Iterable[TrialRun], on_done: Callable[[TrialRun], None] | None = None) -> int:
        """Write one child run a trial and return how many were written.

        A complete child of the same content stays as it is. Anything else under the trial's id (half-written, other
        content, a duplicate from a repeated request) goes to MLflow's trash and is written afresh, because params
        cannot change and a metric that is gone would stay. `on_done` is called for every row, written or found.
        """
        if self._children is None:
            self._children = self._on_parent(self._load_children)
        written = 0
        for row in rows:
            if not self.on:
                break
            written += bool(self._on_parent(lambda parent, row=row: self._write(parent, row)))
            if on_done is not None and self.on:
                on_done(row)
        return written

    def artifacts(self, folder_or_file: Path, artifact_path: str | None) -> None:
        """Copy a file, or what is in a folder, to the parent's artifacts under `artifact_path` (None: the root).

        Raises:
            FileNotFoundError: there is no such file or folder.
        """
        path = Path(folder_or_file)
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {str(path)!r} to log as an MLflow artifact")
        method = "log_artifacts" if path.is_dir() else "log_artifact"
        self._on_parent(lambda parent: getattr(self._store.client, method)(parent, str(path), artifact_path))

    def dataset(self, name: str, digest: str, rows: int) -> None:
        """Note on the parent which examples were used. MLflow holds 36 characters of a digest; longer ones are cut."""
        self._on_parent(lambda parent: self._store.client.log_inputs(parent, [_dataset_input(name, digest, rows)]))

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Close the parent run. The tracker can be used again after another `parent`."""
        if self._parent_id is not None:
            self._on_parent(lambda parent: self._store.client.set_terminated(parent, status))
            self._parent_id = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _on_parent(self, action: Callable[[str], T]) -> T | None:
        if not self.on:
            return None
        if self._parent_id is None:
            raise RuntimeError("the sweep has no open parent run; call Tracker.parent first")
        parent = self._parent_id
        return self._store.attempt(lambda: action(parent))

    def _load_children(self, parent: str) -> dict[str, list[_Child]]:
        children: dict[str, list[_Child]] = {}
        page_token = None
        while True:
            page = self._store.client.search_runs(
                [self._store.experiment_id],
                f"tags.`mlflow.parentRunId` = '{parent}'",
                max_results=_RUNS_A_PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=page_token,
            )
            for run in page:
                complete = run.info.status == "FINISHED"
                child = _Child(run.info.run_id, run.data.tags.get("fingerprint") if complete else None)
                children.setdefault(run.data.tags.get("trial_id", ""), []).append(child)
            page_token = page.token
            if not page_token:
                return children

    def _write(self, parent: str, row: TrialRun) -> bool:
        """Leave exactly one active child for the trial, complete and with the row's content; True if it was written."""
        client, fingerprint = self._store.client, row.fingerprint
        known = self._children.get(row.trial_id, [])
        kept = next((child for child in known if child.fingerprint == fingerprint), None)
        for child in known:
            if child is not kept:
                client.delete_run(child.run_id)
        if kept is not None:
            self._children[row.trial_id] = [kept]
            return False
        identity = {"mlflow.parentRunId": parent, "trial_id": row.trial_id, "fingerprint": fingerprint}
        run = client.create_run(self._store.experiment_id, run_name=row.name, tags={**row.tags, **identity})
        self._store.batch(run.info.run_id, row.metrics, row.params)
        for step, metrics in enumerate(row.steps, start=1):
            self._store.batch(run.info.run_id, metrics, step=step)
        client.set_terminated(run.info.run_id)
        self._children[row.trial_id] = [_Child(run.info.run_id, fingerprint)]
        return True


def _dataset_input(name: str, digest: str, rows: int) -> Any:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    # A dvc:// source would not resolve, so the source only says how large the table is; the digest identifies it.
    dataset = MetaDataset(CodeDatasetSource({"rows": rows}), name=name, digest=digest[:_DIGEST_CHARACTERS])
    return DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "sweep")])


@contextlib.contextmanager
def training_log(
    uri: str | None,
    experiment: str,
    run_name: str,
    *,
    training_id: str,
    params: Mapping[str, object] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yield `log(step, metrics)` for the curves of one training run.

    The run is found again by `training_id` (identity of the recipe) and continues: steps that a curve already has are
    skipped, because a training resumed from its last checkpoint repeats them. Outages are handled as for a sweep, and
    the run ends as FINISHED, KILLED or FAILED.

    Raises:
        ValueError: the URI or the experiment's name is malformed.
    """
    store = _Store(uri, experiment, artifact_location=None)
    run = store.attempt(lambda: store.resume_or_create("training_id", training_id, run_name, params or {}, tags or {}))
    run_id = run.info.run_id if run else ""
    logged = store.attempt(
        lambda: {key: store.client.get_metric_history(run_id, key)[-1].step for key in run.data.metrics}
    )

    def log(step: int, metrics: Mapping[str, float]) -> None:
        fresh = {key: value for key, value in mlflow_metrics(metrics).items() if step > (logged or {}).get(key, -1)}
        store.attempt(lambda: store.batch(run_id, fresh, step=step))

    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        store.attempt(lambda: store.client.set_terminated(run_id, status))


def git_and_dvc_tags(repo: Path) -> dict[str, str]:
    """The code and data revision of a checkout.

    Returns:
        `git_commit` (40 hexadecimal characters), `git_dirty` (`true` if a tracked file differs from the commit) and
        `dvc_lock` (SHA-256 of `dvc.lock`, which names every input and output by hash: the DVC revision). Outside git,
        or before the first commit, `git_commit` is `unversioned` and `git_dirty` is absent. Without a `dvc.lock` file,
        `dvc_lock` is `unversioned`.
    """
    tags = {"git_commit": _git(repo, "rev-parse", "--verify", "HEAD") or "unversioned"}
    if tags["git_commit"] != "unversioned":
        tags["git_dirty"] = "true" if _git(repo, "status", "--porcelain", "--untracked-files=no") else "false"
    lock = Path(repo) / "dvc.lock"
    tags["dvc_lock"] = hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "unversioned"
    return tags


def _git(repo: Path, *arguments: str) -> str | None:
    """Standard output of a git command, or None when git is missing or refuses."""
    try:
        result = subprocess.run(["git", "-C", str(repo), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
