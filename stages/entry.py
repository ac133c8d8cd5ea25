"""How every stage starts: where files are, settings first, errors as one line."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nuwa.errors import UserError, in_one_line
from nuwa.methods import check_encoder
from nuwa.signals import DERIVED_SIGNALS
from nuwa.stage1 import get_method
from nuwa.vlm import Adapter, adapter_class, usual_image_processor
from nuwa.vlm.adapter import check_framing
from nuwa.vlm.remembered import Deferred, folder_memory
from nuwa.vlm.shapes import SHAPES, model_shape
from pipelines.files.surroundings import REMEDIES, surroundings
from pipelines.files.working_copies import main_copy
from pipelines.search.space import check_space, swarm_trials
from pipelines.settings import Settings, SettingsError, load_settings
from pipelines.sweep.engine import Places
from pipelines.sweep.trials import Layouts, Trial, expand
from pipelines.tracking.address import checked_uri
from stages.ending import ToldToEnd, in_order

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
COMPARISONS = DATA / "comparisons.parquet"
GROUPS = DATA / "groups.parquet"
SEEDS = DATA / "seeds.parquet"
METRICS = DATA / "metrics.json"
HEADLINE = DATA / "headline.csv"
PLOTS = DATA / "plots"
PROFILE = DATA / "profile.csv"
SEARCH = DATA / "search"
REPORT = Path("report")
COLLECTING = CACHE / "collecting"  # rows on their way into the tables
SCORING = CACHE / "scoring"  # what blocks of trials are compared with
INTERIM = CACHE / "interim"  # what the sweep says so far: tables, and a page below report/
TIMINGS = CACHE / "timings.parquet"
PROGRESS = CACHE / "progress.json"
UNITS_LOG = CACHE / "units.jsonl"  # one line a finished unit
QUARANTINE = CACHE / "quarantine.json"  # answers that could not be made, and why

BAD_INPUT, INTERRUPTED = 2, 130
OUR_FAULT = "the trace above is a fault of this program, not of your data or settings; please report it with the trace"
OF_PROCESSORS = ("torchvision", "num2words")  # what some of transformers' processors import
OUT_OF_MEMORY = (
    "memory ran out in the driver; close other programs, or ask less at once (features.batch_size, features.shard_images, "
    "sweep.unit_images), then run the same command again; finished work is kept"
)
USUAL_PHOTO = (640, 480)  # width and height


def shared_cache() -> Path:
    """The ``cache`` of a repository's main working copy: all of its copies keep features and answers there, and one of
    them at a time works on it."""
    return main_copy() / CACHE


def feature_store() -> Path:
    return shared_cache() / "features"


def result_store() -> Path:
    return shared_cache() / "results"


def places(settings: Settings) -> Places:
    """Where a sweep or a search reads and writes."""
    features, results = settings.features.store or feature_store(), settings.sweep.store or result_store()
    tables = {"predictions": PREDICTIONS, "kept": KEPT}
    return Places(EXAMPLES, IMAGES, features, results, PROGRESS, UNITS_LOG, SWEEP, tables)


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


def known_shape(path: str) -> Any:
    """The configuration of the model at ``path``, without importing its classes where the folder is known.

    Raises whatever ``AutoConfig.from_pretrained`` raises for a path that holds no model.
    """
    return folder_memory(path).config() if Path(path).is_dir() else model_shape(published(path))


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
        config = known_shape(path)
        family = adapter_class(config.model_type)
        usual = Deferred(lambda: usual_image_processor(config))  # where all images have one layout nobody asks it
        layers = config.get_text_config().num_hidden_layers
    except (OSError, ValueError, AttributeError) as error:
        reason = in_one_line(error)
        raise SettingsError(
            f"model.path = {path!r}: no model of a supported family there ({reason}); `make testbed` trains one"
        ) from None

    try:
        check_framing(family, settings.model.conversation, settings.model.image_aspect_ratio)
        images = settings.model.images.framed(usual, config.model_type)
    except ValueError as error:
        raise SettingsError(f"model: {error}") from None

    layouts = Layouts({family.layout_for(config, images, USUAL_PHOTO): 1}, family.dynamic)
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
        check_encoder(trial.spec, family, settings.model.text_tower)
    except ValueError as error:
        raise SettingsError(f"grid {', '.join(trial.grids)}: {error}") from None
    kept = settings.features.keep
    for name in get_method(trial.spec.stage1).reads(trial.spec.config):
        name = DERIVED_SIGNALS.get(name, name)
        if name not in kept:
            raise SettingsError(
                f"features.keep = {', '.join(kept)}: method {trial.spec.method!r} of grid {trial.grids[0]!r} reads "
                f"{name}; add it there"
            )


def run_stage(stage: Callable[[Settings], None], *, needs_model: bool = True) -> None:
    """Validate ``params.yaml`` and every trial it means, then run; what a user can mend ends as one line on stderr and a non-zero exit."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        with in_order():
            settings = load_settings()
            check_tracking(settings)
            if needs_model:
                planned_trials(settings)
            stage(settings)

    # What a user can mend.
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        told = surroundings(error)
        if told is None and isinstance(error, FileNotFoundError) and error.errno is None:
            told = str(error)  # raised here, in words, or by Arrow, which says just the name
            told = told if ": " in told else f"{told}: {REMEDIES[errno.ENOENT]}"
        if told is None:
            our_fault()
        print(f"error: {told}", file=sys.stderr)
        sys.exit(1)
    except MemoryError:
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        sys.exit(1)

    # transformers says what a processor lacks only when it is asked for.
    except ImportError as error:
        lacking = next((name for name in OF_PROCESSORS if name in str(error).lower()), None)
        if lacking is None:
            our_fault()
        needs = f"the model's processor needs {lacking}, which is not installed"
        print(f"error: model.path = {settings.model.path!r}: {needs}; pip install {lacking}", file=sys.stderr)
        sys.exit(1)

    # Told to end: nothing is lost.
    except ToldToEnd as told_to:
        print(f"{told_to}: finished work is kept; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + told_to.number)
    except KeyboardInterrupt:
        print("interrupted: finished work is kept; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)

    except Exception:
        our_fault()


def our_fault() -> NoReturn:
    """Show the trace of the exception at hand, say that it is not the user's to mend, and exit."""
    traceback.print_exc()
    print(f"error: {OUR_FAULT}", file=sys.stderr)
    sys.exit(1)
