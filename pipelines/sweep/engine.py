"""What a sweep and a search run on: one model, the features of its images, and workers that answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from nuwa.layout import VisualLayout
from nuwa.stage1 import get_method
from nuwa.stage1.found_weights import weight_places, weights_for
from nuwa.stage1.learnpruner import DEFAULT_WEIGHTS, LearnPruner
from nuwa.vlm import Adapter
from nuwa.vlm.checkpoint import StoredTensors, module_tensors
from pipelines.features.encoding import encode_missing
from pipelines.features.identity import Described, ModelIdentity, model_folder
from pipelines.features.layouts import image_layouts
from pipelines.features.loading import Loading
from pipelines.files.storage import everywhere
from pipelines.settings import Settings
from pipelines.sweep.answers import SweepOutcome, SweepSpec, run_sweep
from pipelines.sweep.collection import Origins, collect
from pipelines.sweep.costs import sweep_costs
from pipelines.sweep.identity import answer_context, code_key, code_of, context_key, same_code, with_code
from pipelines.sweep.progress import SweepProgress, worker_speed
from pipelines.sweep.refill import PulledTables
from pipelines.sweep.results import ResultStore, StoredUnit
from pipelines.sweep.trials import Trial
from pipelines.sweep.units import Blocks, UnitExample, read_examples
from pipelines.workers import Allowance


@dataclass(frozen=True)
class Places:
    """Where an engine reads and writes: folders or storage URIs, and the files that tell how far it is."""

    prepared: Path  # examples.parquet
    images: Path  # images.parquet
    features: Path | str
    results: Path | str
    progress: Path
    units_log: Path
    facts: Path  # sweep.json, which tells what the tables hold
    tables: Mapping[str, Path]  # part → table of an earlier sweep, which may have been pulled


@dataclass(frozen=True)
class Engine:
    """``layouts``: of every image. ``context``: what decides answers beside trials and questions. ``allowance``: for all
    runs of the engine together; null: no limit."""

    settings: Settings
    vlm: Adapter
    layouts: Mapping[str, VisualLayout]
    spec: SweepSpec
    context: Described
    fingerprints: Mapping[str, str]
    places: Places
    allowance: Allowance | None = None

    @classmethod
    def start(cls, settings: Settings, vlm: Adapter, layouts: Mapping[str, VisualLayout], places: Places) -> Engine:
        """Normally finds all features; after the cache was thrown away it encodes again instead of failing."""
        model, cluster = settings.model, settings.cluster
        loading = Loading.of(model, cluster)
        known = ModelIdentity.of(model.path, loading, vlm)
        store, _ = encode_missing(
            model.path,
            places.images,
            places.features,
            settings.features,
            cluster,
            loading=loading,
            vlm=vlm,
            known=known,
        )

        context = answer_context(known, vlm, settings.features)
        spec = SweepSpec(
            model=model.path,
            feature_root=everywhere(places.features),
            feature_identity=store.identity,
            encoder=known.fingerprint,
            results=everywhere(places.results),
            images=str(places.images.resolve()),
            threads=cluster.cpus,
            device=cluster.device,
            loading=loading,
            context=context_key(context),
            reuse=settings.sweep.reuse,
            plugins=tuple(settings.plugins),
        )
        parts = Described.of({**known.encoder, **known.language})
        fingerprints = {"model": parts.digest, "features": store.identity}
        allowed = settings.sweep.gpu_hours
        allowance = Allowance(allowed) if allowed is not None else None
        return cls(settings, vlm, layouts, spec, context, fingerprints, places, allowance)

    def coded(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials with the code that each runs."""
        return with_code(trials, self.vlm, self.spec.device)

    def identify(self, trials: Sequence[Trial], questions: pd.DataFrame, *further: Any) -> tuple[str, dict[str, str]]:
        """The id of these trials on these questions, with what else (``further``) decides them, and the fingerprints behind it."""
        data = hashlib.sha256("".join(questions["example_id"] + questions["image"]).encode()).hexdigest()
        code = same_code(self.coded(trials))
        content = [self.context.digest, code, data, sorted(trial.trial_id for trial in trials), *further]
        fingerprints = {**self.fingerprints, "code": code, "data": data}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16], fingerprints

    def examples(self, questions: pd.DataFrame, left_out: Collection[str] = ()) -> list[UnitExample]:
        """What workers are asked of ``questions``; those ``left_out`` (ids) still stand in the blocks of the others."""
        asked = read_examples(questions, self.context.digest, self.layouts, blocks_of(self.settings))
        return [example for example in asked if example.example_id not in left_out]

    def run(
        self,
        trials: Sequence[Trial],
        questions: pd.DataFrame,
        log: Callable[[int, Mapping[str, float]], None],
    ) -> tuple[SweepOutcome, int]:
        """Answer what the store lacks; returns what came of it and how many answers were made."""
        check_text_tower(trials, self.vlm, self.settings.model.path)
        sweep, cluster, trials = self.settings.sweep, self.settings.cluster, self.coded(trials)
        self._describe(trials)
        store = ResultStore(self.places.results)
        stored = store.done(tidy=True)
        if self._refill(trials, questions, store, stored):
            stored = store.done()

        with SweepProgress(self.places.progress, self.places.units_log, log) as progress:
            outcome = run_sweep(
                self.spec,
                trials,
                self.examples(questions),
                cluster,
                costs=sweep_costs(self.vlm, priced(self.settings, questions)),
                speed=worker_speed(self.places.units_log, cluster),
                unit_images=sweep.unit_images,
                on_start=progress.start,
                on_done=progress.done,
                allowance=self.allowance,
                finish_with=sweep.finish_with,
                stored=stored,
            )
        return outcome, progress.finished

    def _describe(self, trials: Sequence[Trial]) -> None:
        """Leave in the store what its digests are of."""
        results = ResultStore(self.places.results)
        results.describe("context", self.spec.context, self.context.parts)
        codes = {code_key(code): code.parts for code in (code_of(trial, self.vlm) for trial in trials)}
        for key, parts in codes.items():
            results.describe("code", key, parts)

    def _refill(
        self, trials: Sequence[Trial], questions: pd.DataFrame, store: ResultStore, stored: Sequence[StoredUnit]
    ) -> int:
        """Take from the tables of an earlier sweep, which may have been pulled, the answers that the store lacks; how many."""
        places, reuse = self.places, self.settings.sweep.reuse
        tables = pulled_tables(places, self.settings, self.vlm, self.spec.context, self.context.digest)
        if tables is None:
            return 0
        lacking = tables.lacking(stored, trials, self.examples(questions), reuse)
        count = tables.refill(store, lacking) if lacking else 0
        if count:
            print(f"{count:,} answers are taken from the tables beside {places.facts}")
        return count

    def collect(
        self,
        trials: Sequence[Trial],
        questions: pd.DataFrame,
        targets: Mapping[str, Path],
        scratch: Path,
        left_out: Collection[str] = (),
        stored: Sequence[StoredUnit] | None = None,
    ) -> Origins:
        """Write the tables of finished ``trials``; returns where their answers came from. ``left_out``: see
        :meth:`examples`; ``stored``: see :func:`collect`."""
        answers = [trial.answer_id for trial in self.coded(trials)]
        store, reuse = ResultStore(self.places.results), self.settings.sweep.reuse
        return collect(store, answers, self.examples(questions, left_out), targets, scratch, reuse, stored)


def blocks_of(settings: Settings) -> Blocks | None:
    """How questions are cut into blocks; null in full precision, where the composition of a batch decides nothing."""
    if settings.model.dtype == "float32":
        return None
    return Blocks(settings.sweep.unit_images, settings.sweep.subset_seed)


def priced(settings: Settings, questions: pd.DataFrame) -> pd.DataFrame:
    """``questions`` as they share work: an image counts once, or in blocks once a benchmark."""
    if blocks_of(settings) is None:
        return questions
    return questions.assign(image=questions["benchmark"] + " " + questions["image"])


def pulled_tables(
    places: Places, settings: Settings, vlm: Adapter, context_name: str, context: str
) -> PulledTables | None:
    """The tables of an earlier sweep on this context, where they are whole; ``context_name``: as units record it."""
    if not (places.facts.exists() and places.prepared.exists()):
        return None

    def read(questions: pd.DataFrame) -> list[UnitExample]:
        return read_examples(questions, context, image_layouts(vlm, questions), blocks_of(settings))

    return PulledTables.of(places.facts, places.tables, context_name, pd.read_parquet(places.prepared), read)


def check_text_tower(trials: Sequence[Trial], vlm: Adapter, path: str) -> None:
    """Refuse a text tower whose vision half is not the encoder of the model at ``path``, before anything runs."""
    if vlm.text_tower is not None and any(trial.spec.reads_question for trial in trials):
        stored = StoredTensors(model_folder(path))
        vlm.text_tower.check(module_tensors(vlm.model, vlm.encoder_modules["tower"], stored))


def with_weights(trials: Sequence[Trial], encoder: str, model: str) -> list[Trial]:
    """``trials`` with the weights that stage 1 was trained with for ``encoder``, the fingerprint of that of the ``model``.

    Where no grid names a file, the project's own folder is looked in first, then where
    :mod:`nuwa.stage1.found_weights` says. Raises before anything runs where there are none, and for those of another.
    """
    own = Path(DEFAULT_WEIGHTS).parent
    folders = (own, *(place for place in weight_places(model) if place != own.resolve()))
    found: dict[str, Any] = {}
    chosen: dict[str, Trial] = {}

    for trial in trials:
        config = trial.spec.config
        if isinstance(config, LearnPruner) and "weights" not in trial.parameters:
            found = found or weights_for(encoder, folders)
            if found["digest"] != config.digest:
                trial = replace(trial, spec=replace(trial.spec, config=replace(config, **found)))
        if (check := get_method(trial.spec.stage1).check) is not None:
            check(trial.spec.config, encoder)

        # A file that is found may be one that another grid names.
        known = chosen.setdefault(trial.trial_id, trial)
        if known is not trial:
            grids = tuple(dict.fromkeys((*known.grids, *trial.grids)))
            budgets = tuple(dict.fromkeys((*known.budgets, *trial.budgets)))
            chosen[trial.trial_id] = replace(known, grids=grids, budgets=budgets)
    return list(chosen.values())
