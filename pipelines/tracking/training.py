"""The curves of a training run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping

from pipelines.tracking.open_runs import begun, ended
from pipelines.tracking.runs import mlflow_metrics
from pipelines.tracking.store import TrackingStore


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
    store, run = TrackingStore(uri, experiment, artifact_location=None), None

    def close(status: str) -> None:
        run_id = run.info.run_id if run else store.attempt(lambda: store.running("training_id", training_id))
        if run_id:
            store.attempt(lambda: store.client.set_terminated(run_id, status))
        ended(killed)

    def killed() -> None:
        close("KILLED")

    def log(step: int, metrics: Mapping[str, float]) -> None:
        fresh = {key: value for key, value in mlflow_metrics(metrics).items() if step > (logged or {}).get(key, -1)}
        store.attempt(lambda: store.batch(run_id, fresh, step=step))

    status = "FAILED"
    begun(killed)
    try:
        run = store.attempt(
            lambda: store.resume_or_create("training_id", training_id, run_name, params or {}, tags or {})
        )
        run_id, metrics = (run.info.run_id, run.data.metrics) if run else ("", {})
        logged = store.attempt(lambda: {key: store.client.get_metric_history(run_id, key)[-1].step for key in metrics})
        yield log
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        close(status)


@contextlib.contextmanager
def shown_training(
    uri: str | None, experiment: str, run_name: str, *, logged: bool, training_id: str, params: Mapping[str, object]
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yield `show(step, metrics)`, which prints a line and, where it is `logged`, adds to the curves of the run.

    Of several processes one logs. The rest, and errors, as of :func:`training_log`.
    """
    with contextlib.ExitStack() as stack:
        curves = training_log(uri, experiment, run_name, training_id=training_id, params=params)
        log = stack.enter_context(curves) if logged else None

        def show(step: int, metrics: Mapping[str, float]) -> None:
            print(step, json.dumps({name: round(value, 4) for name, value in metrics.items()}), flush=True)
            if log is not None:
                log(step, metrics)

        yield show
