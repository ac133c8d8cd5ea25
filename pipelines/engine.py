"""What a sweep and a search run on: one model, the features of its images, and workers that answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nuwa.layout import VisualLayout
from nuwa.source import code_fingerprint
from nuwa.stage1 import get_method
from nuwa.vlm import Adapter
from pipelines.features import Loading, encode_missing
from pipelines.grid import Trial
from pipelines.plan import Example, read_examples, sweep_costs
from pipelines.progress import SweepProgress, worker_speed
from pipelines.settings import Settings
from pipelines.storage import everywhere
from pipelines.sweep import SweepOutcome, SweepSpec, answer_context, run_sweep


@dataclass(frozen=True)
class Places:
    """Where an engine reads and writes: folders or storage URIs, and the files that tell how far it is."""

    images: Path  # images.parquet
    features: Path | str
    results: Path | str
    progress: Path
    units_log: Path


@dataclass(frozen=True)
class Engine:
    """``layouts``: of every image. ``context``: digest of model, features and code, which answers belong to."""

    settings: Settings
    vlm: Adapter
    layouts: Mapping[str, VisualLayout]
    spec: SweepSpec
    context: str
    fingerprints: Mapping[str, str]
    places: Places

    @classmethod
    def start(cls, settings: Settings, vlm: Adapter, layouts: Mapping[str, VisualLayout], places: Places) -> Engine:
        """Normally finds all features; after the cache was thrown away it encodes again instead of failing."""
        model, cluster = settings.model, settings.cluster
        loading = Loading.of(model, cluster)
        store, _ = encode_missing(
            model.path, places.images, places.features, settings.features, cluster, loading=loading, vlm=vlm
        )
        weights = vlm.fingerprint()
        spec = SweepSpec(
            model.path,
            everywhere(places.features),
            store.identity,
            vlm.encoder_identity,
            everywhere(places.results),
            str(places.images.resolve()),
            cluster.cpus,
            cluster.device,
            loading,
        )
        context = answer_context(weights, store.identity, model.attention)
        fingerprints = {"model": weights, "features": store.identity, "code": code_fingerprint()}
        return cls(settings, vlm, layouts, spec, context, fingerprints, places)

    def identify(self, trials: Sequence[Trial], questions: pd.DataFrame, *asked: Any) -> tuple[str, dict[str, str]]:
        """The id of these trials on these questions, with whatever else was ``asked``, and the fingerprints behind it."""
        data = hashlib.sha256("".join(questions["example_id"] + questions["image"]).encode()).hexdigest()
        content = [self.context, data, sorted(trial.trial_id for trial in trials), *asked]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16], {**self.fingerprints, "data": data}

    def examples(self, questions: pd.DataFrame) -> list[Example]:
        return read_examples(questions, self.context, self.layouts)

    def run(
        self,
        trials: Sequence[Trial],
        questions: pd.DataFrame,
        log: Callable[[int, dict[str, float]], None],
    ) -> tuple[SweepOutcome, int]:
        """Answer what the store lacks; returns what came of it and how many answers were made."""
        sweep, cluster = self.settings.sweep, self.settings.cluster
        with SweepProgress(self.places.progress, self.places.units_log, log) as progress:
            outcome = run_sweep(
                self.spec,
                trials,
                self.examples(questions),
                sweep_costs(self.vlm, questions),
                worker_speed(self.places.units_log, cluster),
                sweep.unit_images,
                cluster,
                progress.start,
                progress.done,
            )
        return outcome, progress.finished


def check_weights(trials: Sequence[Trial], vlm: Adapter) -> None:
    """Refuse trials whose stage 1 was trained for another encoder, before anything runs."""
    for trial in trials:
        if (check := get_method(trial.spec.stage1).check) is not None:
            check(trial.spec.config, vlm.encoder_identity)
