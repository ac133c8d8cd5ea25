"""How every stage starts: where files are, settings first, errors as one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from nuwa.benchmarks import RecordError, SchemaError
from nuwa.methods import check_encoder
from nuwa.stage1 import get_method
from nuwa.stage1.learnpruner import WeightsError
from nuwa.vlm import Adapter, adapter_class
from nuwa.vlm.adapter import check_framing
from nuwa.vlm.shapes import SHAPES, model_shape, usual_image_processor
from pipelines.engine import Places
from pipelines.evidence import IncompleteTrials
from pipelines.executor import ClusterUnavailable, UnitsFailed
from pipelines.features import MissingFeatures
from pipelines.grid import Layouts, Trial, expand
from pipelines.lock import WorkDirectoryBusy
from pipelines.results import DamagedUnit
from pipelines.search_space import check_space, swarm_trials
from pipelines.settings import Settings, SettingsError, load_settings
from pipelines.storage import StorageFull, StorageUnavailable
from pipelines.tracking import checked_uri

DATA = Path("data")  # outputs that DVC tracks
CACHE = Path("cache")  # work that can be resumed or thrown away; never tracked
BENCHMARKS = DATA / "benchmarks"
EXAMPLES = DATA / "examples.parquet"
IMAGES = DATA / "images.parquet"
FEATURES = DATA / "features.json"
TRIALS = DATA / "trials.parquet"
PREDICTIONS = DATA / "predictions.parquet"
KEPT = DATA / "kept.parquet"
SWEEP = DATA / "sweep.json"
SCORES = DATA / "scores.parquet"
METRICS = DATA / "metrics.json"
PLOTS = DATA / "plots"
PROFILE = DATA / "profile.csv"
SEARCH = DATA / "search"
REPORT = Path("report")
FEATURE_STORE = CACHE / "features"
RESULT_STORE = CACHE / "results"
COLLECTING = CACHE / "collecting"  # rows on their way into the tables
TIMINGS = CACHE / "timings.parquet"
PROGRESS = CACHE / "progress.json"
UNITS_LOG = CACHE / "units.jsonl"  # one line a finished unit
MODEL = CACHE / "model.json"  # digests of the model that the last sweep loaded
QUARANTINE = CACHE / "quarantine.json"  # answers that could not be made, and why

BAD_INPUT, INTERRUPTED = 2, 130
USUAL_PHOTO = (640, 480)  # width and height
# What a user can mend. Anything else is a fault of ours and keeps its trace.
MENDABLE = (
    ClusterUnavailable,
    DamagedUnit,
    FileNotFoundError,
    IncompleteTrials,
    MissingFeatures,
    RecordError,
    SchemaError,
    StorageFull,
    StorageUnavailable,
    UnitsFailed,
    WeightsError,
    WorkDirectoryBusy,
)


def places(settings: Settings) -> Places:
    """Where a sweep or a search reads and writes."""
    features, results = settings.features.store or FEATURE_STORE, settings.sweep.store or RESULT_STORE
    return Places(IMAGES, features, results, PROGRESS, UNITS_LOG)


def check_tracking(settings: Settings) -> None:
    """Refuse a malformed tracking URI before work starts; a server that is down is no error."""
    try:
        checked_uri(settings.tracking.resolved_uri)
    except ValueError as error:
        raise SettingsError(f"tracking.uri: {error}") from None


def published(path: str) -> str:
    """The hub id of a folder called like a published checkpoint that is not there yet; any other path as it is."""
    hub_id = "/".join(Path(path).parts[-2:])
    return hub_id if hub_id in SHAPES and not Path(path).exists() else path


def planned_trials(settings: Settings) -> list[Trial]:
    """All trials of the sweep on its model, whose shape is read without its weights; a search's space is checked too.

    Where images have layouts of their own, they are planned for a photo of usual size: which images there are is not
    known yet.
    """
    path = settings.model.path
    if not Path(path).exists() and published(path) == path and Path(path).parent.is_dir():
        raise SettingsError(
            f"model.path = {path!r}: there is no such folder; name one that holds a model, or a model of the hub"
        )
    try:
        config = model_shape(published(path))
        family = adapter_class(config.model_type)
        layout = family.layout_for(config, usual_image_processor(config), USUAL_PHOTO)
        layers = config.get_text_config().num_hidden_layers
    except (OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(
            f"model.path = {path!r}: no model of a supported family there ({reason}); `make testbed` trains one"
        ) from None
    try:
        check_framing(family, settings.model.conversation, settings.model.image_aspect_ratio)
    except ValueError as error:
        raise SettingsError(f"model: {error}") from None
    layouts = Layouts({layout: 1}, family.dynamic)
    trials = expand(settings.sweep, layouts, layers)
    searched: list[Trial] = []
    if (swarm := settings.search.swarm) is not None:
        check_space(swarm, settings.sweep.budget_unit, layouts, layers)
        searched = swarm_trials(swarm, settings.sweep, layouts, layers)
    for trial in (*trials, *searched):
        check_signals(trial, family, settings)
    return trials


def check_signals(trial: Trial, family: type[Adapter], settings: Settings) -> None:
    """Refuse a trial whose stage 1 reads what the encoder does not offer or the cache does not keep."""
    try:
        check_encoder(trial.spec, family)
    except ValueError as error:
        raise SettingsError(f"grid {', '.join(trial.grids)}: {error}") from None
    kept = settings.features.keep
    for name in get_method(trial.spec.stage1).reads(trial.spec.config):
        if name not in kept:
            raise SettingsError(
                f"features.keep = {', '.join(kept)}: method {trial.spec.method!r} of grid {trial.grids[0]!r} reads "
                f"{name}; add it there"
            )


def run_stage(stage: Callable[[Settings], None], *, needs_model: bool = True) -> None:
    """Validate ``params.yaml`` and every trial it means, then run; what a user can mend ends as one line on stderr and a non-zero exit."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = load_settings()
        check_tracking(settings)
        if needs_model:
            planned_trials(settings)
        stage(settings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except MENDABLE as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except ImportError as error:
        if "Torchvision" not in str(error):
            raise
        needs = "the model's processor needs torchvision, which is not installed"
        print(f"error: model.path = {settings.model.path!r}: {needs}; pip install torchvision", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: finished work is kept; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
