"""How every stage starts: where files are, settings first, errors as one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from pipelines.executor import UnitsFailed
from pipelines.settings import Settings, SettingsError, load_settings

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
REPORT = Path("report")
FEATURE_STORE = CACHE / "features"
RESULT_STORE = CACHE / "results"
TIMINGS = CACHE / "timings.parquet"
PROGRESS = CACHE / "progress.json"

BAD_INPUT, INTERRUPTED = 2, 130


def run_stage(stage: Callable[[Settings], None]) -> None:
    """Validate ``params.yaml``, then run; what a user can mend ends as one line on stderr and a non-zero exit."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        stage(load_settings())
    except (SettingsError, UnitsFailed, FileNotFoundError, ValueError, RuntimeError) as error:
        if not isinstance(error, SettingsError):
            logging.getLogger("stages").debug("stage failed", exc_info=error)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT if isinstance(error, SettingsError) else 1)
    except KeyboardInterrupt:
        print("interrupted: finished work is kept; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
