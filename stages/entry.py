"""How every stage starts: where files are, settings first, errors as one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from nuwa.benchmarks import RecordError, SchemaError
from nuwa.grid import PatchGrid
from nuwa.stage1.learnpruner import WeightsError
from nuwa.vlm import LlavaAdapter, adapter_class
from nuwa.vlm.shapes import SHAPES, model_shape
from pipelines.evidence import IncompleteTrials
from pipelines.executor import ClusterUnavailable, UnitsFailed
from pipelines.features import DYNAMIC_GRIDS, MissingFeatures
from pipelines.grid import Trial, expand
from pipelines.lock import WorkDirectoryBusy
from pipelines.results import DamagedUnit, StorageFull
from pipelines.settings import Settings, SettingsError, load_settings
from pipelines.storage import StorageUnavailable
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
REPORT = Path("report")
FEATURE_STORE = CACHE / "features"
RESULT_STORE = CACHE / "results"
TIMINGS = CACHE / "timings.parquet"
PROGRESS = CACHE / "progress.json"
UNITS_LOG = CACHE / "units.jsonl"  # one line a finished unit
QUARANTINE = CACHE / "quarantine.json"  # answers that could not be made, and why

BAD_INPUT, INTERRUPTED = 2, 130
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


def check_tracking(settings: Settings) -> None:
    """Refuse a malformed tracking URI before work starts; a server that is down is no error."""
    try:
        checked_uri(settings.tracking.resolved_uri)
    except ValueError as error:
        raise SettingsError(f"tracking.uri: {error}") from None


def _published(path: str) -> str:
    """The hub id of a folder called like a published checkpoint that is not there yet; any other path as it is."""
    hub_id = "/".join(Path(path).parts[-2:])
    return hub_id if hub_id in SHAPES and not Path(path).exists() else path


def planned_trials(settings: Settings) -> list[Trial]:
    """All trials the settings mean on their model, whose shape is read without its weights."""
    path = settings.model.path
    try:
        config = model_shape(_published(path))
        if adapter_class(config.model_type) is not LlavaAdapter:
            raise SettingsError(f"model.path = {path!r}: {DYNAMIC_GRIDS}")
        side = config.vision_config.image_size // config.vision_config.patch_size
        layers = config.text_config.num_hidden_layers
    except SettingsError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(
            f"model.path = {path!r}: no LLaVA model there ({reason}); `make testbed` trains one"
        ) from None
    return expand(settings.sweep, PatchGrid(side, side), layers)


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
    except KeyboardInterrupt:
        print("interrupted: finished work is kept; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
