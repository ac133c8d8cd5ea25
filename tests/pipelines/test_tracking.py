"""The MLflow view against a real SQLite store: what arrives, replay, interruption, outage, bad configuration."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pandas as pd
import pytest
from bench import ROOT
from forked import Ended, forked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from mlflow.utils.validation import _validate_metric_name
from stores import EXPERIMENT, SWEEP, copy_store

from pipelines.files.lock import exclusive
from pipelines.tracking import tracker as tracking
from pipelines.tracking.address import checked_uri
from pipelines.tracking.revision import git_and_dvc_tags, source_tags, write_reproduction
from pipelines.tracking.runs import TrialRun, metric_key, mlflow_metrics, trial_runs
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.training import training_log
from pipelines.workers.joining import own_sigterm
from stages import dashboard
from stages.entry import run_stage


@pytest.fixture(autouse=True)
def quick_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting on a store that is down, and no trace of the tracker's environment defaults in other tests."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def database(new_store: Path, tmp_path: Path) -> Path:
    """A migrated database of one's own, with an experiment that has no runs."""
    path = tmp_path / "mlflow.db"
    copy_store(new_store, path)
    return path


@pytest.fixture
def uri(database: Path) -> str:
    return f"sqlite:///{database}"


@pytest.fixture
def closed_port() -> int:
    """A loopback port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_of(trial_id: str, metrics: dict[str, float] | None = None, params: dict[str, str] | None = None) -> TrialRun:
    """A small trial run; the metrics default to one value."""
    return TrialRun(trial_id, f"label {trial_id}", params or {"method": "nuwa"}, metrics or {"score": 0.5}, {})


def write(uri: str, rows: list[TrialRun], sweep_id: str = SWEEP) -> int:
    with Tracker.open(uri, EXPERIMENT, sweep_id=sweep_id) as tracker:
        tracker.parent("sweep", {}, {})
        return tracker.trials(rows)


def parent_of(uri: str, sweep_id: str = SWEEP) -> Run:
    (run,) = _search(uri, f"tags.sweep_id = '{sweep_id}'")
    return run


def children_of(uri: str, sweep_id: str = SWEEP) -> dict[str, Run]:
    """The active children by trial id; fails when two share one."""
    runs = _search(uri, f"tags.`mlflow.parentRunId` = '{parent_of(uri, sweep_id).info.run_id}'")
    children = {run.data.tags["trial_id"]: run for run in runs}
    assert len(children) == len(runs)
    return children


def _search(uri: str, filter_string: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    return list(client.search_runs([experiment], filter_string, max_results=5000))


def test_steps_become_a_curve_and_count_as_content(uri: str) -> None:
    row = replace(run_of("p"), steps=({"rung/vqa": 0.5}, {"rung/vqa": 0.75}))
    assert write(uri, [row]) == 1
    child = children_of(uri)["p"].info.run_id
    points = MlflowClient(uri).get_metric_history(child, "rung/vqa")
    assert [(point.step, point.value) for point in points] == [(1, 0.5), (2, 0.75)]
    assert write(uri, [row]) == 0, "it is there already"
    assert write(uri, [replace(row, steps=({"rung/vqa": 0.5},))]) == 1, "another curve is another run"


# --- tables to runs ---------------------------------------------------------------------------------------------------


def tables() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Two trials, unpruned and Nüwa at 16 tokens; two benchmarks, one of them with a detail metric."""
    shared = {"preset": "released", "image_tokens": 144, "seed": 0, "flops_convention": "FLOP, all counted"}
    shared |= {"stage2_recycling": False}
    unpruned = {"trial_id": "u", "label": "unpruned", "grids": ["main"], "method": "unpruned", "position": "pesp"}
    unpruned |= {"budget": None, "average_tokens": 144.0, "stage1_keep": 144, "stage2_layer": None}
    unpruned |= {"stage2_keep": None, "stage2_cuts": None, "stage2_scorer": None, "params": "{}"}
    unpruned |= {"flops": 9e9, "kv_bytes": 8192.0}
    nuwa = {"trial_id": "n", "label": "Nüwa 16", "grids": np.array(["main", "ablation"]), "method": "nuwa"}
    nuwa |= {"position": "perc", "budget": 16.0, "average_tokens": 15.75, "stage1_keep": 24, "stage2_layer": 4}
    nuwa |= {"stage2_cuts": "4:8", "flops": 1e9, "kv_bytes": 1024.0}
    nuwa |= {"stage2_keep": 8, "stage2_scorer": "attention", "params": json.dumps({"alpha": 0.25, "sizes": [3, 4]})}
    trials = pd.DataFrame([unpruned | shared, nuwa | shared])

    columns = ["trial_id", "benchmark", "family", "metric", "score", "low", "high", "headline", "retention"]
    scores = pd.DataFrame(
        [
            ["n", "refcoco", "grounding", "acc@0.5", 0.5, 0.4, 0.6, True, 0.625],
            ["n", "refcoco", "grounding", "iou", 0.3, 0.2, 0.4, False, np.nan],
            ["n", "pope", "vqa", "f1", 0.75, 0.7, 0.8, True, np.nan],
            ["n", "mean", "grounding", "retention", 0.625, 0.5, np.inf, False, 0.625],
            ["u", "refcoco", "grounding", "acc@0.5", 0.8, 0.7, 0.9, True, 1.0],
            ["gone", "refcoco", "grounding", "acc@0.5", 0.1, 0.0, 0.2, True, 0.1],
        ],
        columns=columns,
    )
    timings = pd.DataFrame({"trial_id": ["n", "gone"], "seconds": [2.5, 9.0], "worker": ["w0", "w1"]})
    return trials, scores, timings


def test_tables_become_runs_with_params_and_headline_metrics_only() -> None:
    shared = {"preset": "released", "image_tokens": "144", "seed": "0", "flops_convention": "FLOP, all counted"}
    shared |= {"stage2_recycling": "false"}
    assert trial_runs(*tables(), tags={"dvc_lock": "d1"}) == [
        TrialRun(
            "u",
            "unpruned",
            {"method": "unpruned", "position": "pesp", "stage1_keep": "144", "grids": "main"} | shared,
            {"average_tokens": 144.0, "flops": 9e9, "kv_bytes": 8192.0}
            | {"refcoco/acc_at_0.5": 0.8, "refcoco/retention": 1.0},
            {"dvc_lock": "d1"},
        ),
        TrialRun(
            "n",
            "Nüwa 16",
            {"method": "nuwa", "position": "perc", "budget": "16", "stage1_keep": "24", "stage2_layer": "4"}
            | {"stage2_keep": "8", "stage2_cuts": "4:8", "stage2_scorer": "attention", "grids": "main,ablation"}
            | {"method.alpha": "0.25", "method.sizes": "[3, 4]"}
            | shared,
            # the NaN retention of pope and the infinite upper bound are left out, and so is the detail metric iou
            {"average_tokens": 15.75, "flops": 1e9, "kv_bytes": 1024.0}
            | {"refcoco/acc_at_0.5": 0.5, "refcoco/retention": 0.625, "pope/f1": 0.75}
            | {"grounding_retention": 0.625, "grounding_retention_low": 0.5, "timing/seconds": 2.5},
            {"dvc_lock": "d1"},
        ),
    ]


def test_runs_show_what_was_asked_and_scores_by_group() -> None:
    trials, scores, _ = tables()
    columns = ["trial_id", "family", "benchmark", "kind", "group", "score"]
    groups = pd.DataFrame(
        [
            ["n", "grounding", "", "size", "smallest third, up to 5.7 %", 0.25],
            ["n", "vqa", "pope", "category", "adversarial", 0.5],
            ["n", "vqa", "", "limit", "ran into it", 0.0],
            ["gone", "vqa", "pope", "category", "popular", 0.5],
        ],
        columns=columns,
    )
    plain = trial_runs(trials, scores, None, {})
    unpruned, nuwa = trial_runs(trials, scores, None, {}, groups=groups, asked={"images": 200, "protocol": "testbed"})
    shared = {"images": "200", "protocol": "testbed"}
    assert unpruned.metrics == plain[0].metrics and unpruned.params == plain[0].params | shared
    assert nuwa.params == plain[1].params | shared
    assert nuwa.metrics == plain[1].metrics | {"grounding/size/smallest_third": 0.25, "pope/category/adversarial": 0.5}


def test_runs_do_not_depend_on_the_order_of_the_scores() -> None:
    trials, scores, _ = tables()
    assert trial_runs(trials, scores[::-1], None, {}) == trial_runs(trials, scores, None, {})


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("refcoco/acc@0.5", "refcoco/acc_at_0.5"),
        ("layer=4", "layer_4"),
        ("a,b;c", "a_b_c"),
        ("vqa_retention", "vqa_retention"),
    ],
)
def test_metric_keys(name: str, key: str) -> None:
    assert metric_key(name) == key


@given(st.text(min_size=1, max_size=50).filter(lambda text: "/" not in text and text not in (".", "..")))
def test_mlflow_accepts_every_metric_key(metric: str) -> None:
    _validate_metric_name(metric_key(f"refcoco/{metric}"))


def test_values_that_mlflow_cannot_hold_are_left_out() -> None:
    values = {"nan": np.nan, "up": np.inf, "down": -np.inf, "none": None, "zero": 0, "float32": np.float32(0.5)}
    assert mlflow_metrics(values) == {"zero": 0.0, "float32": 0.5}


def test_fingerprint_covers_name_params_and_metrics_but_neither_tags_nor_order() -> None:
    base = TrialRun("t", "name", {"a": "1", "b": "2"}, {"x": 0.1, "y": 0.2}, {"git_commit": "c1"})
    same = TrialRun("t", "name", {"b": "2", "a": "1"}, {"y": 0.2, "x": 0.1, "z": np.nan}, {"git_commit": "c2"})
    assert base.fingerprint == same.fingerprint
    changed = [replace(base, name="n"), replace(base, params={"a": "1"}), replace(base, metrics={"x": 0.1})]
    changed.append(replace(base, metrics={"x": np.nextafter(0.1, 1), "y": 0.2}))
    assert len({base.fingerprint, *(run.fingerprint for run in changed)}) == 5


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_none_makes_a_wal_database_and_artifact_folder_in_the_current_folder(new_store: Path) -> None:
    with sqlite3.connect(new_store / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    experiment = MlflowClient(f"sqlite:///{new_store / 'mlflow.db'}").get_experiment_by_name(EXPERIMENT)
    assert experiment.artifact_location == str(new_store / "mlartifacts")


def test_children_carry_params_metrics_and_tags_under_their_parent(uri: str) -> None:
    rows = trial_runs(*tables(), tags={"dvc_lock": "d1"})
    with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
        parent_id = tracker.parent("default sweep", {"examples": 600, "budgets": [16, 32], "warm": True}, {"who": "me"})
        assert tracker.trials(rows) == 2

    parent = parent_of(uri)
    assert (parent.info.run_id, parent.info.run_name, parent.info.status) == (parent_id, "default sweep", "FINISHED")
    assert parent.data.params == {"examples": "600", "budgets": "[16, 32]", "warm": "true"}
    assert parent.data.tags == {"mlflow.runName": "default sweep", "sweep_id": SWEEP, "who": "me"}
    children = children_of(uri)
    assert set(children) == {"u", "n"}
    for row in rows:
        child = children[row.trial_id]
        assert (child.info.run_name, child.info.status) == (row.name, "FINISHED")
        assert (child.data.params, child.data.metrics) == (row.params, row.metrics)
        expected = {"dvc_lock": "d1", "trial_id": row.trial_id, "fingerprint": row.fingerprint, "sweeps": SWEEP}
        assert child.data.tags == expected | {"mlflow.parentRunId": parent_id, "mlflow.runName": row.name}


def test_progress_is_a_curve_on_the_parent_without_infinite_values(uri: str) -> None:
    with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
        parent_id = tracker.parent("sweep", {}, {})
        tracker.progress(0, {"trials_done": 0, "seconds_left": float("inf")})
        tracker.progress(8, {"trials_done": 8, "seconds_left": 30.0})
    client = MlflowClient(uri)
    history = {key: client.get_metric_history(parent_id, key) for key in ("trials_done", "seconds_left")}
    assert [(m.step, m.value) for m in history["trials_done"]] == [(0, 0.0), (8, 8.0)]
    assert [(m.step, m.value) for m in history["seconds_left"]] == [(8, 30.0)]


def test_progress_shows_the_machine_on_mlflows_page_of_system_metrics(uri: str) -> None:
    with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
        tracker.parent("sweep", {}, {})
        tracker.progress(0, {"trials_done": 0})
    shown = {key: value for key, value in parent_of(uri).data.metrics.items() if key.startswith("system/")}
    assert set(shown) == {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/system_memory_usage_percentage",
    }
    assert (
        shown["system/system_memory_usage_megabytes"] > 0 and 0 < shown["system/system_memory_usage_percentage"] < 100
    )


def test_pages_open_on_sorted_trials_on_charts_and_on_the_headline_side_by_side(uri: str) -> None:
    """What MLflow's client finds by the search, order and columns that stand in the links."""
    client = MlflowClient(uri)
    kept = {"u": 1.0, "n": 0.7, "v": 0.1}
    rows = [
        run_of(
            trial, {"grounding_retention": share, "vqa_retention": share, "average_tokens": 16.0}, {"method": method}
        )
        for (trial, share), method in zip(kept.items(), ("unpruned", "nuwa", "visionzip"), strict=True)
    ]
    write(uri, [run_of("of another sweep")], sweep_id="another")
    with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
        parent = tracker.parent("sweep", {}, {})
        tracker.trials(rows)
        pages = tracker.views(["u", "n", "gone"], lambda pages: "\n".join(pages.values()))

    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    found = {}
    for key in (SWEEP, f"{SWEEP}-over-budget"):
        view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
        order = [f"{view['orderByKey']} {'ASC' if view['orderByAsc'] else 'DESC'}"]
        runs = client.search_runs([experiment.experiment_id], view["searchFilter"], order_by=order)
        found[key] = [run.data.tags["trial_id"] for run in runs]
        columns = [name.removeprefix("metrics.").strip("`") for name in view["selectedColumns"]]
        assert columns[:2] == ["grounding_retention", "vqa_retention"] and set(columns) <= set(runs[0].data.metrics)
        axes = {(chart["xaxis"]["key"], chart["yaxis"]["key"]) for chart in view["compareRunCharts"]}
        assert axes == {("average_tokens", "grounding_retention"), ("average_tokens", "vqa_retention")}
    assert found == {SWEEP: ["u", "n", "v"], f"{SWEEP}-over-budget": ["n", "v"]}

    kind = "workflowType=machine_learning"
    runs = f"#/experiments/{experiment.experiment_id}/runs"
    trials, charts, itself, side_by_side = pages.values()
    assert trials == f"{runs}?{kind}&viewStateShareKey={SWEEP}"
    assert charts == f"{runs}?{kind}&viewStateShareKey={SWEEP}-over-budget&compareRunsMode=CHART"
    assert itself == f"{runs}/{parent}?{kind}"
    asked = parse_qs(side_by_side.partition("?")[2])
    children = children_of(uri)
    assert json.loads(asked["runs"][0]) == [children["u"].info.run_id, children["n"].info.run_id]
    tags = parent_of(uri).data.tags
    assert json.loads(tags["links"]) == pages and tags["mlflow.note.content"] == "\n".join(pages.values())


def test_artifacts_and_dataset_are_on_the_parent(uri: str, tmp_path: Path) -> None:
    (tmp_path / "report" / "charts").mkdir(parents=True)
    (tmp_path / "report" / "index.html").write_text("<h1>Report</h1>")
    (tmp_path / "report" / "charts" / "a.svg").write_text("<svg/>")
    (tmp_path / "scores.parquet").write_bytes(b"PAR1")
    digest = hashlib.sha256(b"examples").hexdigest()
    for _ in range(2):  # a replay repeats both
        with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
            parent_id = tracker.parent("sweep", {}, {})
            tracker.artifacts(tmp_path / "report", "report")
            tracker.artifacts(tmp_path / "scores.parquet", None)
            tracker.dataset("testbed", digest, rows=3600)

    stored = tmp_path / "mlartifacts" / parent_id / "artifacts"
    files = {path.relative_to(stored).as_posix(): path.read_bytes() for path in stored.rglob("*") if path.is_file()}
    assert files == {
        "report/index.html": b"<h1>Report</h1>",
        "report/charts/a.svg": b"<svg/>",
        "scores.parquet": b"PAR1",
    }
    (logged,) = MlflowClient(uri).get_run(parent_id).inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("testbed", digest[:36])
    assert json.loads(logged.dataset.source) == {"tags": {"rows": 3600}}


def test_batches_over_the_limits_of_mlflow_are_split(uri: str) -> None:
    metrics = {f"m{number}": float(number) for number in range(1001)}
    texts = {f"k{number}": str(number) for number in range(101)}
    with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
        tracker.parent("sweep", texts, {})
        tracker.progress(0, metrics)
        tracker.parent("sweep", texts, texts)  # tags of a parent found again go through a batch, too
        assert tracker.trials([run_of("t", metrics, texts)]) == 1
    parent, child = parent_of(uri), children_of(uri)["t"]
    logged = {key: value for key, value in parent.data.metrics.items() if not key.startswith("system/")}
    assert (logged, parent.data.params) == (metrics, texts)
    assert texts.items() <= parent.data.tags.items()
    assert (child.data.metrics, child.data.params) == (metrics, texts)


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (RuntimeError("boom"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_the_parent_ends_as_the_sweep_did(uri: str, error: BaseException | None, status: str) -> None:
    def sweep() -> None:
        with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
            tracker.parent("sweep", {}, {})
            assert parent_of(uri).info.status == "RUNNING"
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            sweep()
    else:
        sweep()
    assert parent_of(uri).info.status == status


# --- told to end ------------------------------------------------------------------------------------------------------

WATCHED = ("pipelines/tracking/", "pipelines/files/lock.py", "tracking/sqlalchemy_store.py")


def told_to_end_at(line: int, stage: Callable[[], None], told_by: int = signal.SIGTERM) -> Ended:
    """A process that runs ``stage`` as stages are run, and is told to end when it has come to the ``line``-th line of
    what tracks, locks and stores; it prints how many it came to."""

    def one(_settings: object) -> None:
        stage()

    def run() -> None:
        seen = 0

        def trace(frame: FrameType, event: str, _argument: object) -> Any:
            nonlocal seen
            if not any(part in frame.f_code.co_filename for part in WATCHED):
                return None
            if event == "line":
                seen += 1
                if seen == line:
                    os.kill(os.getpid(), told_by)
            return trace

        for number in (
            signal.SIGTERM,
            signal.SIGHUP,
        ):  # as a shell starts a process; Ray leaves its own handler in ours
            signal.signal(number, signal.SIG_DFL)
        sys.settrace(trace)
        run_stage(one, needs_model=False)
        sys.settrace(None)
        print(seen)

    return forked(run)


def statuses(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return [status for (status,) in connection.execute("SELECT status FROM runs")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sweep_that_is_told_to_end_at_any_moment_leaves_no_run_open_and_no_lock(database, uri, project):
    """Moments from its first line to its last, before, while and after the parent run is found or made."""

    def sweep() -> None:
        with exclusive(project / "cache"), Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
            tracker.parent("sweep", {"trials": 3}, {"git": "abc"})
            tracker.progress(1, {"progress/trials_done": 1.0})

    whole = told_to_end_at(0, sweep)
    assert whole.code == 0 and statuses(database) == ["FINISHED"]
    lines, ended_as = int(whole.out), set()
    for line in range(1, lines, lines // 6):
        with sqlite3.connect(database) as connection:  # every other time the run is there already
            connection.execute("DELETE FROM runs" if line % 2 else "UPDATE runs SET status = 'FINISHED'")
        connection.close()
        ended = told_to_end_at(line, sweep)
        assert ended.code == 128 + signal.SIGTERM, ended.err
        assert ended.err == "SIGTERM: finished work is kept; run the same command again to go on\n"
        ended_as |= {found := tuple(statuses(database))}
        assert found in ((), ("KILLED",), ("FINISHED",)), f"line {line} of {lines}"
        with exclusive(project / "cache"):
            pass
    assert ("KILLED",) in ended_as


@pytest.mark.parametrize("told_by", [signal.SIGTERM, signal.SIGHUP])
def test_a_sweep_that_is_told_to_end_while_it_starts_ray_is_killed_in_mlflow(database, uri, project, told_by):
    """Ray takes the signal for itself while it starts; the sweep has it back when it is up."""

    def sweep() -> None:
        with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
            tracker.parent("sweep", {}, {})
            with own_sigterm():
                signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
            os.kill(os.getpid(), told_by)

    ended = told_to_end_at(0, sweep, told_by)
    assert ended.code == 128 + told_by and statuses(database) == ["KILLED"]


def test_a_training_that_is_told_to_end_while_its_run_is_made_leaves_none_open(database, uri, project):
    def train() -> None:
        with training_log(uri, EXPERIMENT, "training", training_id="t1", params={"lr": 0.1}) as log:
            log(1, {"loss": 1.0})

    whole = told_to_end_at(0, train)
    assert statuses(database) == ["FINISHED"]
    lines = int(whole.out)
    for line in range(1, lines, lines // 3):
        with sqlite3.connect(database) as connection:
            connection.execute("DELETE FROM runs")
        connection.close()
        assert told_to_end_at(line, train).code == 128 + signal.SIGTERM
        assert set(statuses(database)) <= {"KILLED", "FINISHED"}, f"line {line} of {lines}"


# --- replay -----------------------------------------------------------------------------------------------------------


def test_writing_twice_creates_nothing_new_and_reports_every_row_as_done(uri: str) -> None:
    rows = [run_of("a"), run_of("b")]
    assert write(uri, rows) == 2
    before = {trial: run.info.run_id for trial, run in children_of(uri).items()}
    done = []
    with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
        parent_id = tracker.parent("sweep", {}, {})
        assert tracker.trials([replace(row, tags={"git_commit": "later"}) for row in rows], done.append) == 0
    assert [row.trial_id for row in done] == ["a", "b"]
    assert {trial: run.info.run_id for trial, run in children_of(uri).items()} == before
    assert parent_of(uri).info.run_id == parent_id
    assert "git_commit" not in children_of(uri)["a"].data.tags


def test_children_are_recognised_across_calls_and_pages(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_RUNS_A_PAGE", 2)
    rows = [run_of(trial) for trial in "abcde"]
    with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
        tracker.parent("sweep", {}, {})
        assert [tracker.trials(rows[:3]), tracker.trials(rows), tracker.trials(rows)] == [3, 2, 0]
    assert write(uri, rows) == 0
    assert len(children_of(uri)) == 5


@pytest.mark.parametrize(
    "changed",
    [
        run_of("a", {"score": 0.25}),
        run_of("a", {"other": 0.5}),
        run_of("a", params={"method": "random"}),
        replace(run_of("a"), name="new label"),
    ],
    ids=["value", "metric gone", "param", "name"],
)
def test_changed_content_replaces_the_child(uri: str, changed: TrialRun) -> None:
    write(uri, [run_of("a"), run_of("b")])
    before = children_of(uri)
    assert write(uri, [changed, run_of("b")]) == 1
    after = children_of(uri)
    assert after["b"].info.run_id == before["b"].info.run_id
    assert after["a"].info.run_name == changed.name
    assert (after["a"].data.metrics, after["a"].data.params) == (changed.metrics, changed.params)


def test_a_sweep_killed_half_way_is_completed_without_duplicates(uri: str) -> None:
    rows = [run_of(trial, {"score": index / 4}) for index, trial in enumerate("abcd")]
    write(uri, rows[:2])
    first = children_of(uri)
    client, parent_id = MlflowClient(uri), parent_of(uri).info.run_id
    # What a kill between `create_run` and `set_terminated` leaves: for c, and for b a second run beside the good one.
    for row in rows[1:3]:
        tags = {"mlflow.parentRunId": parent_id, "trial_id": row.trial_id, "fingerprint": row.fingerprint}
        client.create_run(first["a"].info.experiment_id, tags=tags)

    assert write(uri, rows) == 2
    children = children_of(uri)
    assert {trial: run.data.metrics for trial, run in children.items()} == {row.trial_id: row.metrics for row in rows}
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert [children[trial].info.run_id for trial in "ab"] == [first[trial].info.run_id for trial in "ab"]


_SWEEP_NUMBERS = itertools.count()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.25, 0.5]), max_size=3), max_size=3))
def test_any_history_of_partial_writes_ends_in_the_last_tables(uri: str, history: list[dict[str, float]]) -> None:
    sweep_id = f"sweep{next(_SWEEP_NUMBERS)}"
    final = dict.fromkeys("abc", 0.75)
    for table in [*history, final]:
        write(uri, [run_of(trial, {"score": score}) for trial, score in table.items()], sweep_id)
    assert {trial: run.data.metrics["score"] for trial, run in children_of(uri, sweep_id).items()} == final


def test_one_trial_added_to_a_sweep_writes_one_child(uri: str, database: Path) -> None:
    """The larger sweep has another id and parent; the runs of the smaller one's trials are taken over as they are."""
    asked = {"data": "d1", "model": "m1", "features": "f1"}
    trials = [replace(run_of(f"t{number}", {"score": number / 8}), tags=asked) for number in range(8)]
    assert write(uri, trials, "small") == 8
    before = {child.info.run_id for child in children_of(uri, "small").values()}
    more = [*trials, replace(run_of("new"), tags=asked)]
    assert write(uri, more, "large") == 1
    children = children_of(uri, "large")
    assert {child.info.run_id for child in children.values()} - before == {children["new"].info.run_id}
    assert children["t3"].data.tags["sweeps"] == "small large" and children["new"].data.tags["sweeps"] == "large"
    assert children["t3"].data.metrics == {"score": 3 / 8} and not children_of(uri, "small")
    assert write(uri, more, "large") == 0 and write(uri, trials, "small") == 0, "and back again"
    assert set(children_of(uri, "small")) == {trial.trial_id for trial in trials}
    assert children_of(uri, "small")["t3"].data.tags["sweeps"] == "large small"
    assert len(statuses(database)) == 11, "two parents, and a run a trial"


def test_a_trial_that_many_sweeps_hold_lists_the_newest_and_counts_the_others(uri: str, monkeypatch) -> None:
    assert tracking.MOST_SWEEPS * len("0123456789abcdef ") < 5000, "the limit of a tag in every version of MLflow"
    monkeypatch.setattr(tracking, "MOST_SWEEPS", 3)
    row = replace(run_of("t"), tags={"data": "d1", "model": "m1", "features": "f1"})
    assert [write(uri, [row], f"s{number}") for number in range(5)] == [1, 0, 0, 0, 0]
    tags = children_of(uri, "s4")["t"].data.tags
    assert tags["sweeps"] == "s2 s3 s4" and tags["earlier_sweeps"] == "2"

    # Who comes back counts once, however often; the lists of who had to leave go on where one is full.
    for sweep_id, newest in (("s0", "s3 s4 s0"), ("s1", "s4 s0 s1"), ("s0", "s4 s1 s0"), ("s5", "s1 s0 s5")):
        assert write(uri, [row], sweep_id) == 0
        tags = children_of(uri, sweep_id)["t"].data.tags
        assert tags["sweeps"] == newest and int(tags["earlier_sweeps"]) == (3 if sweep_id == "s5" else 2)
    assert tags["earlier_sweeps.1"] == "s0 s1 s2" and tags["earlier_sweeps.2"] == "s3 s4"


def test_sweeps_that_were_counted_before_any_was_listed_stay_counted(uri: str, database: Path, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "MOST_SWEEPS", 3)
    row = replace(run_of("t"), tags={"data": "d1", "model": "m1", "features": "f1"})
    for number in range(3):
        write(uri, [row], f"s{number}")
    child = children_of(uri, "s2")["t"]
    MlflowClient(uri).set_tag(child.info.run_id, "earlier_sweeps", "7")  # as it was written once: a number alone
    for sweep_id, count in (("s3", "8"), ("s4", "9"), ("s0", "9")):
        assert write(uri, [row], sweep_id) == 0
        assert children_of(uri, sweep_id)["t"].data.tags["earlier_sweeps"] == count


@pytest.mark.parametrize("other", [{"data": "d2"}, {"model": "m2"}, {"features": "f2"}])
def test_answers_to_other_questions_or_of_another_model_are_other_runs(uri: str, other: dict[str, str]) -> None:
    asked = {"data": "d1", "model": "m1", "features": "f1"}
    assert write(uri, [replace(run_of("t"), tags=asked)], "one") == 1
    assert write(uri, [replace(run_of("t"), tags=asked | other)], "two") == 1
    assert set(children_of(uri, "one")) == set(children_of(uri, "two")) == {"t"}


def test_a_trial_whose_scores_changed_is_not_taken_over(uri: str) -> None:
    asked = {"data": "d1", "model": "m1", "features": "f1"}
    assert write(uri, [replace(run_of("t", {"score": 0.5}), tags=asked)], "one") == 1
    assert write(uri, [replace(run_of("t", {"score": 0.6}), tags=asked)], "two") == 1
    assert children_of(uri, "one")["t"].data.metrics == {"score": 0.5}


def test_the_pages_of_a_sweep_show_its_trials_when_a_later_one_has_taken_them_over(uri: str) -> None:
    asked = {"data": "d", "model": "m", "features": "f"}
    for sweep_id, trials in (("5ea1", "uv"), ("5ea2", "uvw")):
        with Tracker.open(uri, EXPERIMENT, sweep_id=sweep_id) as tracker:
            tracker.parent("sweep", {}, {})
            tracker.trials([replace(run_of(trial), tags=asked) for trial in trials])
            tracker.views(list(trials), lambda pages: "")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = {}
    for sweep_id in ("5ea1", "5ea2"):
        view = json.loads(experiment.tags[f"mlflow.sharedViewState.{sweep_id}"])
        runs = client.search_runs([experiment.experiment_id], view["searchFilter"])
        found[sweep_id] = sorted(run.data.tags["trial_id"] for run in runs)
    assert found == {"5ea1": ["u", "v"], "5ea2": ["u", "v", "w"]}


def test_sweeps_do_not_share_children(uri: str) -> None:
    write(uri, [run_of("a")], "one")
    assert write(uri, [run_of("a")], "two") == 1
    assert children_of(uri, "one")["a"].info.run_id != children_of(uri, "two")["a"].info.run_id


def test_a_parent_found_again_gets_new_params_and_tags_and_keeps_first_values(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, params, commit in [("first", {"workers": 2}, "c1"), ("second", {"workers": 4, "seed": 7}, "c2")]:
        with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
            tracker.parent(name, params, {"git_commit": commit})
            assert parent_of(uri).info.status == "RUNNING"
    parent = parent_of(uri)
    assert (parent.info.run_name, parent.data.params) == ("second", {"workers": "2", "seed": "7"})
    assert parent.data.tags["git_commit"] == "c2"
    assert caplog.messages == ["MLflow keeps the first value of these params of run 'second': workers"]


# --- outages ----------------------------------------------------------------------------------------------------------


def test_a_server_that_is_down_warns_once_and_raises_nothing(
    closed_port: int, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    done = []
    with Tracker.open(f"http://me:secret@127.0.0.1:{closed_port}", EXPERIMENT, sweep_id=SWEEP) as tracker:
        assert not tracker.on
        assert tracker.parent("sweep", {"a": 1}, {}) == ""
        assert tracker.trials([run_of("a")], done.append) == 0
        tracker.progress(1, {"trials_done": 1})
        tracker.artifacts(tmp_path, None)
        tracker.dataset("testbed", "d", 1)
        tracker.finish()
    assert done == []
    assert [message for name, _, message in caplog.record_tuples if name == "pipelines.tracking.store"] == [
        f"MLflow at http://***@127.0.0.1:{closed_port} is off for the rest of this run: ConnectionRefusedError: "
        "[Errno 111] Connection refused. No result is lost: the Parquet files are the record. Once MLflow answers, "
        "replay them with: python -m stages.track"
    ]
    assert "secret" not in caplog.text


def test_a_database_that_breaks_mid_sweep_warns_once_and_is_completed_by_a_replay(
    uri: str, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, seen = [run_of(trial) for trial in "abcd"], []

    def rename_table(old: str, new: str) -> None:
        with sqlite3.connect(database) as connection:
            connection.execute(f"ALTER TABLE {old} RENAME TO {new}")
        connection.close()

    def break_after_b(row: TrialRun) -> None:
        seen.append(row.trial_id)
        if row.trial_id == "b":
            rename_table("metrics", "away")

    with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
        tracker.parent("sweep", {}, {})
        assert tracker.trials(rows, break_after_b) == 2
        tracker.progress(1, {"trials_done": 2})
        assert not tracker.on
    assert seen == ["a", "b"]
    warnings = [message for name, _, message in caplog.record_tuples if name == "pipelines.tracking.store"]
    assert warnings == [
        f"MLflow at {uri} is off for the rest of this run: OperationalError: no such table: metrics. No result is "
        "lost: the Parquet files are the record. Once MLflow answers, replay them with: python -m stages.track"
    ]

    rename_table("away", "metrics")
    assert write(uri, rows) == 2
    assert {run.info.status for run in children_of(uri).values()} == {"FINISHED"}
    assert set(children_of(uri)) == set("abcd")


def test_a_file_that_is_no_database_is_an_outage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "broken.db").write_bytes(b"not a database " * 100)
    tracker = Tracker.open(f"sqlite:///{tmp_path / 'broken.db'}", EXPERIMENT, sweep_id=SWEEP)
    assert not tracker.on
    assert "DatabaseError: file is not a database" in caplog.text


def test_errors_of_the_caller_are_not_taken_for_an_outage(uri: str) -> None:
    def rows() -> Iterator[TrialRun]:
        yield run_of("a")
        raise KeyError("trial_id")

    with pytest.raises(KeyError, match="trial_id"), Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
        tracker.parent("sweep", {}, {})
        tracker.trials(rows())
    assert parent_of(uri).info.status == "FAILED"
    assert set(children_of(uri)) == {"a"}


# --- bad configuration ------------------------------------------------------------------------------------------------

USE = "; use sqlite:///mlflow.db, postgresql://user:password@host/database or http://host:5000"
SCHEMES = "is not one of http, https, mssql, mysql, postgresql, sqlite"
NO_FILE = "no database file (three slashes come before a relative path, four make it absolute)"


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("file:///tmp/mlruns", f"scheme 'file' {SCHEMES}"),
        ("mlruns", f"scheme '' {SCHEMES}"),
        ("sqlitee:///mlflow.db", f"scheme 'sqlitee' {SCHEMES}"),
        ("http://", "no host"),
        ("http://host:99999", "Port out of range 0-65535"),
        ("https://host:port", "Port could not be cast to integer value as 'port'"),
        ("https:/host:5000", "no host"),
        ("sqlite://", NO_FILE),
        ("sqlite:///:memory:", NO_FILE),
        ("sqlite://mlflow.db", NO_FILE),
        ("postgresql+nodriver://host/db", "Can't load plugin: sqlalchemy.dialects:postgresql.nodriver"),
    ],
)
def test_a_malformed_uri_is_an_error_before_anything_starts(uri: str, problem: str) -> None:
    with pytest.raises(ValueError) as raised:
        Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP)
    assert str(raised.value) == f"MLflow tracking URI {uri!r}: {problem}{USE}"


def test_a_missing_driver_is_an_error_that_does_not_show_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(ValueError) as raised:
        checked_uri("postgresql+psycopg2://me:secret@host/db")
    assert str(raised.value) == (
        "MLflow tracking URI 'postgresql+psycopg2://***@host/db': its database driver is not installed "
        f"(import of psycopg2 halted; None in sys.modules){USE}"
    )


def test_a_relative_sqlite_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checked_uri("sqlite:///runs/a b.db") == f"sqlite:///{tmp_path}/runs/a b.db"
    assert checked_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert checked_uri("http://host:5000") == "http://host:5000"


def test_misuse_is_told_in_one_line(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^MLflow experiment name is empty; give the experiment a name$"):
        Tracker.open(uri, " ", sweep_id=SWEEP)
    tracker = Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP)
    with pytest.raises(RuntimeError, match=r"^the sweep has no open parent run; call Tracker\.parent first$"):
        tracker.progress(0, {"trials_done": 0})
    with pytest.raises(FileNotFoundError) as raised:
        tracker.artifacts(tmp_path / "none", None)
    assert str(raised.value) == f"no file or folder '{tmp_path / 'none'}' to log as an MLflow artifact"


# --- training curves --------------------------------------------------------------------------------------------------


def _curve(uri: str, key: str) -> list[tuple[int, float]]:
    (run,) = _search(uri, "tags.training_id = 'recipe1'")
    return [(metric.step, metric.value) for metric in MlflowClient(uri).get_metric_history(run.info.run_id, key)]


def test_a_training_log_resumes_its_run_and_skips_steps_already_there(uri: str) -> None:
    with (
        pytest.raises(RuntimeError, match="power cut"),
        training_log(uri, EXPERIMENT, "vision tower", training_id="recipe1", params={"lr": 0.001}) as log,
    ):
        for step in range(4):
            log(step, {"vision/loss": 4.0 - step, "nan": float("nan")})
        raise RuntimeError("power cut")
    assert _search(uri, "tags.training_id = 'recipe1'")[0].info.status == "FAILED"

    with training_log(uri, EXPERIMENT, "vision tower", training_id="recipe1", params={"lr": 0.001}) as log:
        for step in range(2, 6):  # from the checkpoint at step 2
            log(step, {"vision/loss": 4.0 - step})
        log(0, {"language/loss": 9.0})  # the next phase counts its own steps
    assert _curve(uri, "vision/loss") == [(step, 4.0 - step) for step in range(6)]
    assert _curve(uri, "language/loss") == [(0, 9.0)]
    (run,) = _search(uri, "tags.training_id = 'recipe1'")
    assert (run.info.run_name, run.info.status, run.data.params) == ("vision tower", "FINISHED", {"lr": "0.001"})
    assert "nan" not in run.data.metrics


def test_a_training_goes_on_without_mlflow(closed_port: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "pipelines.tracking")
    with training_log(f"http://127.0.0.1:{closed_port}", EXPERIMENT, "vision", training_id="r") as log:
        log(0, {"loss": 1.0})
        log(1, {"loss": 0.5})
    assert [name for name, *_ in caplog.record_tuples].count("pipelines.tracking.store") == 1


# --- revisions --------------------------------------------------------------------------------------------------------


def _git(repo: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(repo), *identity, *arguments], check=True, capture_output=True
    ).stdout.decode()


def test_revision_tags_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_and_dvc_tags(tmp_path) == {"git_commit": "unversioned", "dvc_lock": "unversioned"}

    _git(tmp_path, "init", "-q")
    assert git_and_dvc_tags(tmp_path)["git_commit"] == "unversioned"  # no commit yet

    (tmp_path / "dvc.lock").write_bytes(b"schema: '2.0'\n")
    _git(tmp_path, "add", "dvc.lock")
    _git(tmp_path, "commit", "-q", "-m", "first")
    (tmp_path / "untracked.txt").write_text("does not count")
    commit = _git(tmp_path, "rev-parse", "HEAD").strip()
    lock = hashlib.sha256(b"schema: '2.0'\n").hexdigest()
    assert git_and_dvc_tags(tmp_path) == {"git_commit": commit, "git_dirty": "false", "dvc_lock": lock}

    (tmp_path / "dvc.lock").write_bytes(b"changed")
    lock = hashlib.sha256(b"changed").hexdigest()
    assert git_and_dvc_tags(tmp_path) == {"git_commit": commit, "git_dirty": "true", "dvc_lock": lock}


def test_a_dirty_run_is_rebuilt_by_mlflows_client_alone(uri: str, tmp_path: Path) -> None:
    """A changed file, a removed one, a new one and a binary one; ignored files are the cache's."""
    work, beside, fetched, again = (tmp_path / name for name in ("work", "beside", "fetched", "again"))
    work.mkdir(), beside.mkdir(), fetched.mkdir()

    def git(*arguments: str, at: Path = work) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        run = subprocess.run(["git", "-C", str(at), *identity, *arguments], check=True, capture_output=True, text=True)
        return run.stdout.strip()

    git("init", "-q")
    committed = {"params.yaml": b"a: 1\n", "gone.py": b"x = 1\n", ".gitignore": b"cache/\n", "weights": b"\x00\x01"}
    for name, content in committed.items():
        (work / name).write_bytes(content)
    git("add", "-A")
    git("commit", "-qm", "c")
    changed = {"params.yaml": b"a: 2\n", "mine.py": b"y = 2\n", "weights": b"\x00\x02\x03"}
    for name, content in changed.items():
        (work / name).write_bytes(content)
    (work / "gone.py").unlink()
    (work / "token.txt").write_text("secret")
    (work / "cache").mkdir()
    (work / "cache" / "big").write_bytes(b"z" * 100)

    with Tracker.open(uri, EXPERIMENT, sweep_id=SWEEP) as tracker:
        revision = git_and_dvc_tags(work)
        tracker.parent("sweep", {"dtype": "float32"}, revision | source_tags(revision, "dvc repro"))
        write_reproduction(work, beside)
        tracker.artifacts(beside, "reproduce")

    client, run = MlflowClient(uri), parent_of(uri)
    held = Path(client.download_artifacts(run.info.run_id, "reproduce", str(fetched)))
    assert sorted(path.name for path in held.iterdir()) == ["params.yaml", "uncommitted.patch"]
    assert run.data.tags["git_dirty"] == "true" and run.data.tags["mlflow.source.name"] == "dvc repro"
    assert run.data.params == {"dtype": "float32"} and (held / "params.yaml").read_text() == "a: 2\n"

    git("clone", "-q", str(work), str(again))
    git("checkout", "-q", run.data.tags["mlflow.source.git.commit"], at=again)
    git("apply", str(held / "uncommitted.patch"), at=again)
    for name in ("params.yaml", "mine.py", "weights", ".gitignore"):
        assert (again / name).read_bytes() == (work / name).read_bytes(), name
    assert not (again / "gone.py").exists() and not (again / "token.txt").exists()


def test_a_clean_run_and_one_outside_git_leave_no_patch(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: 1\n")
    folder = tmp_path / "beside"
    folder.mkdir()
    write_reproduction(tmp_path, folder)
    assert [path.name for path in folder.iterdir()] == ["params.yaml"]


def test_what_a_run_leaves_to_rebuild_it_holds_no_secret(tmp_path: Path) -> None:
    work, beside, again = (tmp_path / name for name in ("work", "beside", "again"))
    work.mkdir(), beside.mkdir()

    def git(*arguments: str, at: Path = work) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", "-C", str(at), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    (work / "params.yaml").write_text("tracking:\n  uri: null\n")
    (work / "code.py").write_text("A = 1\n")
    git("add", "-A")
    git("commit", "-qm", "c")
    (work / "params.yaml").write_text("tracking:\n  uri: postgresql://me:hunter2@db/mlflow\n")
    (work / "code.py").write_text("A = 'http://me:example@host'\n")
    (work / "mine.yaml").write_text("sweep:\n  images: 3\n")
    (work / "keys.yaml").write_text("HF_TOKEN: hunter2\n")
    (work / "my.toml").write_text("[mlflow]\npassword = 'hunter2'\n")
    write_reproduction(work, beside)
    assert not [path for path in beside.iterdir() if b"hunter2" in path.read_bytes()]

    git("clone", "-q", str(work), str(again), at=tmp_path)
    git("apply", str(beside / "uncommitted.patch"), at=again)
    assert (again / "params.yaml").read_text() == "tracking:\n  uri: postgresql://***@db/mlflow\n"
    for name in ("code.py", "mine.yaml"):
        assert (again / name).read_text() == (work / name).read_text()
    assert not (again / "keys.yaml").exists() and not (again / "my.toml").exists()


def test_revision_tags_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_and_dvc_tags(tmp_path) == {"git_commit": "unversioned", "dvc_lock": "unversioned"}


def test_the_servers_command_line_holds_no_password(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SimpleNamespace(tracking=SimpleNamespace(resolved_uri=uri, experiment=EXPERIMENT))
    monkeypatch.setattr(dashboard, "load_settings", lambda: settings)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "before")
    begun: list[list[str]] = []
    monkeypatch.setattr(dashboard.os, "execvp", lambda _, command: begun.append(command))
    dashboard.dashboard(5001)
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == checked_uri(uri)
    assert begun == [["mlflow", "server", "--host", "127.0.0.1", "--port", "5001"]]


# --- projects that moved ----------------------------------------------------------------------------------------------


@pytest.fixture
def first_home(new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one logged artifact, in a folder of its own."""
    home = tmp_path / "first"
    home.mkdir()
    copy_store(new_store, home / "mlflow.db")
    _log_a_file(home, monkeypatch, "one.txt")
    assert list((home / "mlartifacts").rglob("one.txt"))
    return home


def _log_a_file(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(home)
    _artifact_repos_cache.clear()  # as in a process of its own
    (home / name).write_text(name)
    with Tracker.open(None, EXPERIMENT, sweep_id="moved") as tracker:
        tracker.parent("sweep", {}, {})
        tracker.artifacts(home / name, None)
        assert tracker.on


def _tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_copied_project_writes_into_itself(first_home, tmp_path, monkeypatch, caplog):
    copy = Path(shutil.copytree(first_home, tmp_path / "second"))
    before = _tree(first_home)
    _log_a_file(copy, monkeypatch, "two.txt")
    assert _tree(first_home) == before and list((copy / "mlartifacts").rglob("two.txt"))
    assert f"artifacts of '{EXPERIMENT}' are in {copy}/mlartifacts now" in caplog.text
    client = MlflowClient(f"sqlite:///{copy}/mlflow.db")
    (run,) = _search(f"sqlite:///{copy}/mlflow.db", "tags.sweep_id = 'moved'")
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == {"one.txt", "two.txt"}


def test_a_moved_project_does_not_make_the_old_folder_again(first_home, tmp_path, monkeypatch):
    first_home.rename(tmp_path / "second")
    _log_a_file(tmp_path / "second", monkeypatch, "two.txt")
    assert not first_home.exists()
    assert list((tmp_path / "second/mlartifacts").rglob("two.txt"))


def test_a_place_that_someone_chose_stays(first_home, tmp_path, monkeypatch):
    chosen = tmp_path / "chosen/mlartifacts"
    chosen.mkdir(parents=True)
    with sqlite3.connect(first_home / "mlflow.db") as connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", (str(chosen),))
        connection.execute("DELETE FROM tags")
    _log_a_file(first_home, monkeypatch, "two.txt")
    assert list(chosen.rglob("two.txt"))
