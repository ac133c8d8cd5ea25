"""The sweep: trials on images, with all work shared that can be.

Trials are grouped by trunk (equal stage-1 selection and positions). A work unit is one trunk on one shard of images:
the selection and the layers below each cut run once, for every question about the images and every trial of the
group, and trials that differ only in stage 2 fork from it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import torch

from nuwa.decoder import Answer, Trunk
from nuwa.selection import Selection
from nuwa.source import code_fingerprint
from nuwa.stage1 import get_method
from nuwa.vlm import LlavaAdapter
from pipelines.datasets import Questions
from pipelines.executor import Failure, OnDone, run_units
from pipelines.features import FeatureStore, load_model
from pipelines.grid import Trial
from pipelines.results import ResultStore, UnitResult, cell_id
from pipelines.settings import ClusterSettings


@dataclass(frozen=True)
class WorkUnit:
    """One trunk on one shard. ``cells`` are aligned with ``trials``; ``examples`` holds the shard's questions."""

    images: tuple[str, ...]
    examples: pd.DataFrame
    trials: tuple[Trial, ...]
    cells: tuple[str, ...]

    @property
    def unit_id(self) -> str:
        return hashlib.sha256("".join(self.cells).encode()).hexdigest()[:24]


def plan_units(
    trials: Sequence[Trial], questions: Questions, unit_images: int, context: str, done: set[str]
) -> tuple[dict[str, WorkUnit], list[str]]:
    """Units for every cell not in ``done``, and the ids of all cells, in a fixed order."""
    trunks: dict[str, list[Trial]] = {}
    for trial in trials:
        trunks.setdefault(trial.stage1_identity, []).append(trial)
    units, cells = {}, []
    for start in range(0, len(questions.images), unit_images):
        images = questions.images[start : start + unit_images]
        examples = pd.concat(questions.of(images), ignore_index=True)
        content = examples[["example_id", "image", "prompt", "max_new_tokens"]].values.tolist()
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        for group in trunks.values():
            mine = [(trial, cell_id(context, trial.trial_id, digest)) for trial in group]
            cells += [cell for _, cell in mine]
            missing = [(trial, cell) for trial, cell in mine if cell not in done]
            if missing:
                unit = WorkUnit(images, examples, *(tuple(column) for column in zip(*missing, strict=True)))
                units[unit.unit_id] = unit
    return units, cells


def answer_context(vlm: LlavaAdapter, feature_identity: str) -> str:
    """Digest of what decides answers beside trial and questions: weights, prompt format, features and code."""
    content = json.dumps([vlm.fingerprint(), feature_identity, code_fingerprint()])
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class SweepSpec:
    """A sweep worker; ``threads`` is fixed so that equal machines give equal answers."""

    model: str
    feature_root: str
    feature_identity: str
    results: str
    threads: int
    device: str = "cpu"

    def build(self) -> SweepWorker:
        torch.set_num_threads(self.threads)
        return SweepWorker(self)


class SweepWorker:
    def __init__(self, spec: SweepSpec) -> None:
        self.vlm = load_model(spec.model, spec.device)
        self.features = FeatureStore(Path(spec.feature_root), spec.feature_identity)
        self.results = ResultStore(Path(spec.results))

    def run(self, unit: WorkUnit) -> tuple[int, int]:
        """Answer ``unit`` and store the result; returns trials and answers."""
        self.results.write(unit.unit_id, unit.cells, answer_unit(self.vlm, self.features, unit))
        return len(unit.trials), len(unit.trials) * len(unit.examples)


def answer_unit(vlm: LlavaAdapter, features: FeatureStore, unit: WorkUnit) -> UnitResult:
    """All answers of a unit. Trials are taken by rising first cut, so that the trunk only ever moves up."""
    first = unit.trials[0]
    method = get_method(first.spec.stage1)
    began = time.perf_counter()
    signals = vlm.signals(features.read(unit.images), unit.images)
    selection = method.select(signals, first.schedule.stage1_keep, first.spec.config, first.spec.seed)
    selected = time.perf_counter()
    groups = unit.examples.groupby("image", sort=False)
    asked = [groups.get_group(image) for image in unit.images]
    ordered = pd.concat(asked, ignore_index=True)
    prompts = [[vlm.encode_prompt(text) for text in mine["prompt"]] for mine in asked]
    limits = ordered["max_new_tokens"].tolist()
    trunk = Trunk(vlm, selection, prompts, first.spec.position, unit.images)
    rows: dict[str, list[dict]] = {"predictions": [], "kept": [], "timings": []}
    for trial, cell in sorted(
        zip(unit.trials, unit.cells, strict=True), key=lambda pair: pair[0].schedule.cuts[:1] or ((99999, 0),)
    ):
        before = time.perf_counter()
        if trial.schedule.cuts:
            _advance_to_cut(trunk, trial)
        forked = time.perf_counter()
        answers = _answer(trunk, trial, limits)
        timing = (len(ordered), selected - began, forked - before, time.perf_counter() - forked)
        rows["predictions"] += _prediction_rows(vlm, trial, ordered, answers)
        rows["kept"] += _kept_rows(trial, unit.images, selection)
        names = ("questions", "selection_s", "trunk_s", "answer_s")
        rows["timings"].append({"trial_id": trial.trial_id, "cell": cell, **dict(zip(names, timing, strict=True))})
    return UnitResult(rows)


def _advance_to_cut(trunk: Trunk, trial: Trial) -> None:
    layer = trial.schedule.cuts[0][0]
    trunk.advance(layer, frozenset({layer - 1}))


def _answer(trunk: Trunk, trial: Trial, limits: list[int]) -> list[Answer]:
    if not trial.schedule.cuts:
        return trunk.finish(limits)
    return trunk.fork(trial.spec.cuts(trial.schedule), limits, trial.spec.seed)


def _prediction_rows(vlm: LlavaAdapter, trial: Trial, examples: pd.DataFrame, answers: list[Answer]) -> list[dict]:
    return [
        {
            "trial_id": trial.trial_id,
            "example_id": example_id,
            "prediction": vlm.decode_text(list(answer.tokens)),
            "kept_final": list(answer.kept),
        }
        for example_id, answer in zip(examples["example_id"], answers, strict=True)
    ]


def _kept_rows(trial: Trial, images: Sequence[str], selection: Selection) -> list[dict]:
    indices, pillars = selection.indices.tolist(), selection.pillars.tolist()
    return [
        {"trial_id": trial.trial_id, "image": image, "indices": indices[row], "pillar": pillars[row]}
        for row, image in enumerate(images)
    ]


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep left: whole tables in a fixed order, and units that failed."""

    predictions: pa.Table
    kept: pa.Table
    timings: pa.Table
    failures: dict[str, Failure]


def run_sweep(
    spec: SweepSpec,
    trials: Sequence[Trial],
    questions: Questions,
    unit_images: int,
    context: str,
    cluster: ClusterSettings,
    on_start: OnDone,
    on_done: OnDone,
    *,
    in_process: bool = False,
) -> SweepOutcome:
    """Run what is missing, then collect everything. ``on_start(units, cached_cells)`` is called before work starts."""
    store = ResultStore(Path(spec.results))
    units, cells = plan_units(trials, questions, unit_images, context, set(store.done()))
    on_start(units, len(cells) - sum(len(unit.cells) for unit in units.values()))
    failures = run_units(spec, units, cluster, on_done, in_process=in_process)
    holding = store.done()
    wanted = sorted({holding[cell] for cell in cells if cell in holding})
    return SweepOutcome(*_collect(store, wanted, trials, questions), failures)


def _collect(store: ResultStore, units: list[str], trials: Sequence[Trial], questions: Questions) -> list[pa.Table]:
    """The parts' rows of these trials and questions, sorted and each once (overlapping units may hold a row twice)."""
    trial_ids = {trial.trial_id for trial in trials}
    keys = {"predictions": ["trial_id", "example_id"], "kept": ["trial_id", "image"], "timings": ["trial_id", "cell"]}
    wanted = {"example_id": set(questions.examples["example_id"]), "image": set(questions.images)}
    tables = []
    for part, key in keys.items():
        frame = store.read(part, units).to_pandas()
        frame = frame[frame["trial_id"].isin(trial_ids)]
        if key[1] in wanted:
            frame = frame[frame[key[1]].isin(wanted[key[1]])]
        frame = frame.drop_duplicates(key).sort_values(key, ignore_index=True)
        tables.append(pa.Table.from_pandas(frame, preserve_index=False))
    return tables
