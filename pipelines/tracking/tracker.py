"""MLflow, a view of the sweep: one parent run for the sweep, one child run for each trial.

The Parquet files are the record and MLflow only shows them. Three properties follow, and everything here serves them:

* **Replay.** Every run is found again by a tag (`sweep_id`, `trial_id`, `training_id`), so writing the same tables a
  second time changes nothing, and writing them after an interruption completes what is missing. A sweep that holds one
  trial more writes one run: the others are those of the smaller sweep, tagged with both.
* **An outage never fails a sweep.** All calls pass through one door, `TrackingStore.attempt`. The first that fails warns once,
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

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from mlflow.entities import Run
from pipelines.tracking.machine import machine_metrics
from pipelines.tracking.open_runs import begun, ended
from pipelines.tracking.runs import TrialRun
from pipelines.tracking.store import T, TrackingStore
from pipelines.tracking.views import LINKS, links, view_tags

_RUNS_A_PAGE = 1000


_DIGEST_CHARACTERS = 36
MOST_SWEEPS = 200  # that a run's tag lists, 17 characters each: MLflow's tags hold 8,000 characters, those of old 5,000
# How many sweeps the tag has no room for; with a number behind it: lists of those that had to leave it.
EARLIER = "earlier_sweeps"
_QUESTIONS = ("data", "model", "features")  # tags of a child that say what was asked of what


@dataclass(frozen=True)
class _Child:
    run_id: str
    fingerprint: str | None  # None while the run is not complete


class _Held(NamedTuple):
    """A run below another sweep: ids of the newest sweeps that hold its trial, and of those that ever had to give way to
    newer ones, both in the order in which they came; ``unlisted``: how many more were counted when none was listed."""

    run_id: str
    sweeps: list[str]
    displaced: list[str]
    unlisted: int

    @classmethod
    def of(cls, run_id: str, tags: Mapping[str, str]) -> _Held:
        sweeps = tags.get("sweeps", "").split()
        lists = itertools.takewhile(lambda name: name in tags, (f"{EARLIER}.{number}" for number in itertools.count(1)))
        displaced = " ".join(tags[name] for name in lists).split()
        listed = len(set(displaced) - set(sweeps))
        return cls(run_id, sweeps, displaced, max(0, int(tags.get(EARLIER, 0)) - listed))

    def tags_with(self, sweep_id: str) -> dict[str, str]:
        """The tags that change when ``sweep_id`` holds the trial too, or again: a longer one MLflow would refuse, and with
        it all that follows."""
        names = [*(name for name in self.sweeps if name != sweep_id), sweep_id]
        newest, before = names[-MOST_SWEEPS:], names[:-MOST_SWEEPS]
        displaced = [*self.displaced, *(name for name in before if name not in self.displaced)]
        tags = {"sweeps": " ".join(newest)}
        if displaced:
            number = (len(displaced) - 1) // MOST_SWEEPS  # lists before it are full
            tags[EARLIER] = str(self.unlisted + len(set(displaced) - set(newest)))
            tags[f"{EARLIER}.{number + 1}"] = " ".join(displaced[number * MOST_SWEEPS :])
        return tags


# What was asked, and of other sweeps on that: by trial id and fingerprint.
_Elsewhere = tuple[tuple[str | None, ...], dict[tuple[str | None, str | None], _Held]]


class Tracker:
    """The sweep's parent run and its children. One object, one thread; open it in the driver only.

    Once MLflow has failed (`on` is then False) every method returns without doing anything. Left as a context manager,
    the parent ends as FINISHED, as KILLED after an interrupt, or as FAILED after any other exception.
    """

    def __init__(self, store: TrackingStore, sweep_id: str) -> None:
        self._store = store
        self._sweep_id = sweep_id
        self._parent_id: str | None = None
        self._children: dict[str, list[_Child]] | None = None
        self._elsewhere: _Elsewhere | None = None

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
        return cls(TrackingStore(uri, experiment, artifact_location), sweep_id)

    @property
    def on(self) -> bool:
        """Whether MLflow has answered so far."""
        return self._store.on

    def parent(self, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """Find the sweep's parent run or create it, and return its id (empty when tracking is off).

        Params cannot change in MLflow: a parent found again gets new ones only, and a warning names those that differ.
        What may change between two runs of the same sweep (commit, worker count) belongs in `tags`.
        """
        begun(self._end_as_killed)
        run = self._store.attempt(lambda: self._store.resume_or_create("sweep_id", self._sweep_id, name, params, tags))
        self._parent_id = run.info.run_id if run else None
        self._children = self._elsewhere = None
        return self._parent_id or ""

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log how the sweep stands (trials done, examples a second, seconds left, cache hits) and its machine."""
        self._on_parent(lambda parent: self._store.batch(parent, {**metrics, **machine_metrics()}, step=step))

    def trials(self, rows: Iterable[TrialRun], on_done: Callable[[TrialRun], None] | None = None) -> int:
        """Write one child run a trial and return how many were written.

        A complete child of the same content stays as it is, and one of another sweep on the same questions is taken
        over: a trial has one run for all sweeps that hold it, tagged with the newest `MOST_SWEEPS` of their ids in
        `sweeps` and the number of the others in `earlier_sweeps`, below the one that was written last. Anything else under
        the trial's id (half-written, other content, a duplicate from a repeated request) goes to MLflow's trash and is
        written afresh, because params cannot change and a metric that is gone would stay. `on_done` is called for every
        row, written or found.
        """
        children = self._children
        if children is None:
            children = self._children = self._on_parent(self._load_children)

        written = 0
        for row in rows:
            if children is None or not self.on:
                break
            written += bool(self._on_parent(partial(self._write, row, children)))
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

    def views(self, compared: Sequence[str], note: Callable[[Mapping[str, str]], str]) -> Mapping[str, str]:
        """Have MLflow's pages show the trials sorted, in columns and charts; return the links (empty when tracking is off).

        Args:
            compared: trial ids, of those that ``trials`` has written or found, to stand side by side.
            note: what the parent's page says, in Markdown, of the links.
        """
        children = self._children or {}
        runs = [children[trial][0].run_id for trial in compared if children.get(trial)]

        def write(parent: str) -> Mapping[str, str]:
            experiment = self._store.experiment_id
            for name, value in view_tags(self._sweep_id).items():
                self._store.client.set_experiment_tag(experiment, name, value)
            pages = links(experiment, self._sweep_id, parent, runs)
            self._store.batch(parent, tags={"mlflow.note.content": note(pages), LINKS: json.dumps(pages)})
            return pages

        return self._on_parent(write) or {}

    def dataset(self, name: str, digest: str, rows: int) -> None:
        """Note on the parent which examples were used. MLflow holds 36 characters of a digest; longer ones are cut."""
        self._on_parent(lambda parent: self._store.client.log_inputs(parent, [_dataset_input(name, digest, rows)]))

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Close the parent run. The tracker can be used again after another `parent`."""
        if self._parent_id is not None:
            self._on_parent(lambda parent: self._store.client.set_terminated(parent, status))
            self._parent_id = None
        ended(self._end_as_killed)

    def _end_as_killed(self) -> None:
        """Close the parent even where this process was interrupted while it found or made it."""
        if self._parent_id is None:
            self._parent_id = self._store.attempt(lambda: self._store.running("sweep_id", self._sweep_id))
        self.finish("KILLED")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish("FINISHED")
        elif issubclass(kind, KeyboardInterrupt):
            self._end_as_killed()
        else:
            self.finish("FAILED")

    def _on_parent(self, action: Callable[[str], T]) -> T | None:
        if not self.on:
            return None
        if self._parent_id is None:
            raise RuntimeError("the sweep has no open parent run; call Tracker.parent first")
        parent = self._parent_id
        return self._store.attempt(lambda: action(parent))

    def _load_children(self, parent: str) -> dict[str, list[_Child]]:
        children: dict[str, list[_Child]] = {}
        for run in self._search(f"tags.`mlflow.parentRunId` = '{parent}'"):
            complete = run.info.status == "FINISHED" and "sweeps" in run.data.tags  # absent in runs of old
            child = _Child(run.info.run_id, run.data.tags.get("fingerprint") if complete else None)
            children.setdefault(run.data.tags.get("trial_id", ""), []).append(child)
        return children

    def _search(self, wanted: str) -> Iterator[Run]:
        """The active runs that the filter `wanted` finds, the oldest first."""
        page_token = None
        while True:
            page = self._store.client.search_runs(
                [self._store.experiment_id],
                wanted,
                max_results=_RUNS_A_PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=page_token,
            )
            yield from page
            page_token = page.token
            if not page_token:
                return

    def _take_over(self, row: TrialRun, parent: str) -> _Child | None:
        """The complete run of the same trial, content and questions below another sweep, now below `parent`."""
        questions = tuple(row.tags.get(name) for name in _QUESTIONS)
        if None in questions:
            return None
        if self._elsewhere is None or self._elsewhere[0] != questions:
            same = (f"tags.{name} = '{value}'" for name, value in zip(_QUESTIONS, questions, strict=True))
            runs = self._search(" and ".join([*same, "attributes.status = 'FINISHED'"]))
            tags = {run.info.run_id: run.data.tags for run in runs}
            self._elsewhere = (
                questions,
                {
                    (held.get("trial_id"), held.get("fingerprint")): _Held.of(run_id, held)
                    for run_id, held in tags.items()
                    if held.get("mlflow.parentRunId") != parent
                },
            )

        taken = self._elsewhere[1].pop((row.trial_id, row.fingerprint), None)
        if taken is None:
            return None
        self._store.batch(taken.run_id, tags=taken.tags_with(self._sweep_id) | {"mlflow.parentRunId": parent})
        return _Child(taken.run_id, row.fingerprint)

    def _write(self, row: TrialRun, children: dict[str, list[_Child]], parent: str) -> bool:
        """Leave exactly one active child for the trial, complete and with the row's content; True if it was written."""
        client, fingerprint = self._store.client, row.fingerprint
        known = children.get(row.trial_id, [])
        kept = next((child for child in known if child.fingerprint == fingerprint), None)
        for child in known:
            if child is not kept:
                client.delete_run(child.run_id)
        kept = kept or self._take_over(row, parent)
        if kept is not None:
            children[row.trial_id] = [kept]
            return False

        identity = {"mlflow.parentRunId": parent, "trial_id": row.trial_id, "fingerprint": fingerprint}
        identity["sweeps"] = self._sweep_id
        run = client.create_run(self._store.experiment_id, run_name=row.name, tags={**row.tags, **identity})
        self._store.batch(run.info.run_id, row.metrics, row.params)
        for step, metrics in enumerate(row.steps, start=1):
            self._store.batch(run.info.run_id, metrics, step=step)
        # Complete only now: one that a kill leaves before is half-written, and written afresh.
        client.set_terminated(run.info.run_id)
        children[row.trial_id] = [_Child(run.info.run_id, fingerprint)]
        return True


def _dataset_input(name: str, digest: str, rows: int) -> Any:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    # A dvc:// source would not resolve, so the source only says how large the table is; the digest identifies it.
    dataset = MetaDataset(CodeDatasetSource({"rows": rows}), name=name, digest=digest[:_DIGEST_CHARACTERS])
    return DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "sweep")])
