"""The sweep: workers that answer units of the plan and store what they found.

A unit is run depth first along the plan's tree: features, then each stage-1 selection, then each position strategy's
trunk, then the branches of its trials by rising first cut. What fails is isolated: a trial that raises leaves the
others of its unit their results.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from nuwa import UNPRUNED
from nuwa.decoder import Answer, Trunk
from nuwa.decoder.finite import NotFinite
from nuwa.grid import PatchGrid
from nuwa.layout import VisualLayout
from nuwa.methods import select_views
from nuwa.plugins import load_plugins
from nuwa.selection import Selection
from nuwa.signals import VisionSignals
from nuwa.vlm import Adapter, EncodedPrompt, view_signals
from pipelines.features.images import read_images
from pipelines.features.loading import FULL_PRECISION, Loading, load_model
from pipelines.features.store import FeatureStore
from pipelines.settings import ClusterSettings, Reuse
from pipelines.sweep.costs import Costs
from pipelines.sweep.provenance import hardware, own_version, versions
from pipelines.sweep.results import PARTS, ResultStore, StoredUnit
from pipelines.sweep.tree import work_tree
from pipelines.sweep.trials import Trial
from pipelines.sweep.units import Example, WorkUnit, plan_units
from pipelines.workers import Failure, OnDone, Partial, UnitsFailed, run_units


class NoReference(UnitsFailed):
    """The unpruned trial has no answers, and every other is measured against it."""

    stops_the_run = True


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """A sweep worker; ``threads`` is fixed so that equal machines give equal answers."""

    model: str
    feature_root: str
    feature_identity: str
    encoder: str  # its identity, which a worker could not tell where Accelerate keeps the weights elsewhere
    results: str  # folder or storage URI
    images: str  # images.parquet, for methods that encode images anew
    threads: int
    device: str = "cpu"
    loading: Loading = FULL_PRECISION
    context: str = ""  # its digest, for the record
    reuse: Reuse = "any"
    plugins: tuple[str, ...] = ()

    def build(self) -> SweepWorker:
        load_plugins(self.plugins)
        torch.set_num_threads(self.threads)
        return SweepWorker(self)


def device_name(device: str, threads: int) -> str:
    return f"{device} x{threads}" if device == "cpu" else device


@dataclass(frozen=True)
class UnitReport:
    """What a unit took: wall seconds, those of them inside the decoder, and whether its features were at hand."""

    trial_ids: tuple[str, ...]
    examples: int
    images: int
    seconds: float
    model_seconds: float
    feature_hit: bool
    flops: float
    device: str  # kind and threads, which the speed belongs to

    @property
    def answers(self) -> int:
        return len(self.trial_ids) * self.examples


class SweepWorker:
    """Holds one model. The features of the unit that is likely next are read while one runs."""

    def __init__(self, spec: SweepSpec) -> None:
        self.vlm, self.images = load_model(spec.model, spec.device, spec.loading), Path(spec.images)
        self.spec = spec
        self.device = device_name(spec.device, spec.threads)
        self.features, self.encoder = FeatureStore(spec.feature_root, spec.feature_identity), spec.encoder
        self.results = ResultStore(spec.results)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="features")
        self.encoded: dict[tuple[str, ...], Future[list[EncodedImages]]] = {}
        self.words = Words(self.vlm)

    def run(self, unit: WorkUnit, upcoming: WorkUnit | None = None) -> UnitReport | Partial:
        """Answer ``unit`` and store the result; a :class:`Partial` where some of its trials raised."""
        began = time.perf_counter()
        hit = unit.images in self.encoded
        groups = self._read(unit.images).result()
        wanted = {unit.images, upcoming.images if upcoming else unit.images}
        self.encoded = {images: self._read(images) for images in wanted}
        answered = answer_unit(self.vlm, groups, unit, self.words)
        failed = [trial for trial in unit.trials if trial.trial_id in answered.failed]
        whole = [trial for trial in unit.trials if trial.trial_id not in answered.failed]
        finished = unit.only(whole) if whole else None
        report = None
        if finished:
            stored = StoredUnit(
                finished.unit_id,
                tuple(trial.answer_id for trial in finished.trials),
                tuple(example.digest for example in finished.examples),
                self._provenance(groups),
            )
            self.results.write(stored, answered.tables(stored.unit))
            report = UnitReport(
                tuple(trial.trial_id for trial in finished.trials),
                len(finished.examples),
                len(finished.images),
                time.perf_counter() - began,
                answered.model_seconds,
                hit,
                finished.flops,
                self.device,
            )
        if failed or report is None:
            return Partial(report, unit.only(failed), answered.failed[failed[0].trial_id])
        return report

    def _provenance(self, groups: Sequence[EncodedImages]) -> str:
        """Where a unit's answers come from; ``batches``: how many images were answered together."""
        spec, kind = self.spec, self.spec.device
        return json.dumps(
            {
                **versions(kind),
                "nuwa": own_version(),
                "hardware": hardware(kind),
                "kernel": spec.loading.attention,
                "dtype": spec.loading.dtype,
                "threads": spec.threads,
                "context": spec.context,
                "batches": [len(group.images) for group in groups],
            },
            sort_keys=True,
        )

    def _read(self, images: tuple[str, ...]) -> Future[list[EncodedImages]]:
        if images in self.encoded:
            return self.encoded[images]
        resized = self._resized if self.vlm.resizes else None
        return self.reader.submit(read_encoded, self.features, images, self.encoder, resized, self.vlm.heads)

    def _resized(self, images: tuple[str, ...]) -> Callable[[PatchGrid], Tensor]:
        """Encodes ``images`` at a smaller size, when a method asks for it.

        The first call decodes them; they are held as long as the signals that this belongs to.
        """
        decoded = functools.cache(lambda: read_images(self.images, images))

        def encode(grid: PatchGrid) -> Tensor:
            return self.vlm.encode_resized([decoded()[image] for image in images], grid)

        return encode


def read_encoded(
    store: FeatureStore,
    images: Sequence[str],
    encoder: str,
    resized: Callable[[tuple[str, ...]], Callable[[PatchGrid], Tensor]] | None = None,
    heads: int = 1,
) -> list[EncodedImages]:
    """What the store holds of ``images``, layout by layout; ``encoder``, ``resized``, ``heads``: see
    :class:`nuwa.signals.VisionSignals`."""
    found = []
    for layout, mine in store.by_layout(images).items():
        again = resized(mine) if resized else None
        views = view_signals(layout, store.read(mine), mine, again, encoder, heads)
        found.append(EncodedImages(mine, layout, views))
    return found


class Words:
    """Prompts and answers as token ids and back; a sweep asks the same and hears much the same, trial after trial."""

    def __init__(self, vlm: Adapter) -> None:
        self.vlm = vlm
        self.prompts: dict[str, EncodedPrompt] = {}
        self.texts: dict[tuple[int, ...], str] = {}

    def encode(self, text: str) -> EncodedPrompt:
        if text not in self.prompts:
            self.prompts[text] = self.vlm.encode_prompt(text)
        return self.prompts[text]

    def decode(self, tokens: tuple[int, ...]) -> str:
        if tokens not in self.texts:
            self.texts[tokens] = self.vlm.decode_text(list(tokens))
        return self.texts[tokens]


class EncodedImages(NamedTuple):
    """Images of one layout, and every view's signals of them."""

    images: tuple[str, ...]
    layout: VisualLayout
    views: Sequence[VisionSignals]

    def to(self, device: torch.device) -> EncodedImages:
        return self._replace(views=[view.to(device) for view in self.views])

    def itself(self) -> EncodedImages:
        """For those who ask by image."""
        return self

    def by_question(self, vlm: Adapter, asked: Sequence[Sequence[Example]]) -> EncodedImages:
        """A row for each question ``asked`` of an image, with what its words have to do with the image's tokens."""
        texts = [[example.prompt for example in mine] for mine in asked]
        images = tuple(example.image for mine in asked for example in mine)
        return self._replace(images=images, views=vlm.read_questions(self.views, texts))

    def projected_by(self, vlm: Adapter) -> EncodedImages:
        """Where a method reads what stands behind the projector, ``vlm`` makes it."""
        return self._replace(views=[replace(view, project=vlm.project) for view in self.views])


@dataclass
class _Answered:
    """What a unit came to, trial by trial; ``failed``: trials that raised."""

    parts: dict[str, list[tuple[pa.Table, pa.Table]]]  # predictions and kept tokens of each trial, layout by layout
    timings: dict[str, dict[str, Any]]
    failed: dict[str, Failure] = field(default_factory=dict)
    model_seconds: float = 0.0

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> _Answered:
        return cls({trial.trial_id: [] for trial in trials}, {})

    def add(self, trial_ids: Iterable[str], rows: Callable[[str], tuple[pa.Table, pa.Table]], **timing: float) -> None:
        """Take in what trials alike on one layout came to."""
        for trial_id in trial_ids:
            self.parts[trial_id].append(rows(trial_id))
            before = self.timings.setdefault(trial_id, {"trial_id": trial_id} | dict.fromkeys(timing, 0))
            before |= {name: before[name] + value for name, value in timing.items()}

    def fail(self, trial_ids: Iterable[str], error: Exception) -> None:
        for trial_id in trial_ids:
            self.failed.setdefault(trial_id, Failure.of(error))

    def tables(self, unit: str) -> dict[str, pa.Table]:
        """All that the trials without a failure came to."""
        whole = [trial_id for trial_id in self.parts if trial_id not in self.failed]
        predictions, kept = zip(*(part for trial_id in whole for part in self.parts[trial_id]), strict=True)
        timings = [{**self.timings[trial_id], "unit": unit} for trial_id in whole]
        return {
            "predictions": pa.concat_tables(predictions),
            "kept": pa.concat_tables(kept),
            "timings": pa.Table.from_pylist(timings, PARTS["timings"]),
        }


def answer_unit(vlm: Adapter, groups: Sequence[EncodedImages], unit: WorkUnit, words: Words) -> _Answered:
    """All answers of a unit, layout by layout, depth first along the tree of what the trials are there."""
    answered = _Answered.of(unit.trials)
    for stored in groups:
        group = stored.to(vlm.device).projected_by(
            vlm
        )  # one layout at a time: what is read ahead stays in the machine's memory
        alike: dict[str, list[str]] = {}  # trials that come to the same on this layout
        there: dict[str, Trial] = {}
        for trial in unit.trials:
            if trial.trial_id not in answered.failed:
                one = trial.on(group.layout)
                there.setdefault(one.trial_id, one)
                alike.setdefault(one.trial_id, []).append(trial.trial_id)
        asked = [[example for example in unit.examples if example.image == image] for image in group.images]
        by_question = functools.cache(functools.partial(group.by_question, vlm, asked))  # for all trials that ask it
        for positions in work_tree(there.values()).values():
            branches = list(positions.values())
            if branches[0][0].spec.reads_question:
                alone = [[example] for mine in asked for example in mine]
                _run_selection(vlm, by_question, branches, alone, alike, words, answered)
            else:
                _run_selection(
                    vlm, functools.partial(EncodedImages.itself, group), branches, asked, alike, words, answered
                )
    return answered


def _run_selection(
    vlm: Adapter,
    encoded: Callable[[], EncodedImages],
    positions: Sequence[list[Trial]],
    asked: list[list[Example]],
    alike: Mapping[str, list[str]],
    words: Words,
    answered: _Answered,
) -> None:
    """The trials of one stage-1 selection, a list for each position strategy."""
    began = time.perf_counter()
    try:
        group = encoded()
        prompts = [[words.encode(example.prompt) for example in mine] for mine in asked]
        selection = select_views(positions[0][0].plan, group.layout, group.views)
    except Exception as error:
        answered.fail((name for trials in positions for trial in trials for name in alike[trial.trial_id]), error)
        return
    selected = time.perf_counter() - began
    for trials in positions:
        _run_trunk(vlm, group, selection, prompts, asked, trials, alike, words, selected, answered)


def _run_trunk(
    vlm: Adapter,
    group: EncodedImages,
    selection: Selection,
    prompts: list[list[EncodedPrompt]],
    asked: list[list[Example]],
    trials: list[Trial],
    alike: Mapping[str, list[str]],
    words: Words,
    selected: float,
    answered: _Answered,
) -> None:
    """The trials of one trunk, by rising first cut."""
    examples = [example for mine in asked for example in mine]
    limits = [example.max_new_tokens for example in examples]
    trunk = None
    for done, trial in enumerate(trials):
        began = time.perf_counter()
        try:
            if trunk is None:
                trunk = Trunk(vlm, selection, prompts, trial.spec.position, group.images, group.layout)
            trunk.reach(trial.spec.running_cuts(trial.schedule))
        except Exception as error:  # without a trunk none of the rest can go on
            _refuse_without_reference(trials[done:], error)
            answered.fail((name for rest in trials[done:] for name in alike[rest.trial_id]), error)
            return
        forked = time.perf_counter()
        try:
            answers = branch(trunk, trial, limits)
        except Exception as error:
            _refuse_without_reference([trial], error)
            answered.fail(alike[trial.trial_id], error)
            continue
        ended = time.perf_counter()
        answered.model_seconds += ended - began

        def rows(
            trial_id: str, answers: Sequence[Answer] = answers, by_question: bool = trial.spec.reads_question
        ) -> tuple[pa.Table, pa.Table]:
            # What stage 1 keeps for a question is no image's: where nothing is cut later it is the answer's own.
            kept = PARTS["kept"].empty_table() if by_question else _kept_table(trial_id, group.images, selection)
            return _prediction_table(trial_id, examples, answers, words), kept

        answered.add(
            alike[trial.trial_id],
            rows,
            questions=len(examples),
            selection_s=selected,
            trunk_s=forked - began,
            answer_s=ended - forked,
        )


def _refuse_without_reference(trials: Sequence[Trial], error: Exception) -> None:
    """Stop the run where the unpruned model overflows: all of it would be in vain. Raises :class:`NoReference`."""
    if isinstance(error, NotFinite) and any(trial.spec.method == UNPRUNED for trial in trials):
        raise NoReference(f"the unpruned trial has no answers: {error}") from error


def branch(trunk: Trunk, trial: Trial, limits: list[int]) -> list[Answer]:
    """A trial's answers from its trunk, which must not stand above the first cut."""
    return trunk.answer(trial.spec.running_cuts(trial.schedule), limits, trial.spec.seed)


def _prediction_table(trial_id: str, examples: Sequence[Example], answers: Sequence[Answer], words: Words) -> pa.Table:
    columns = {
        "trial_id": pa.repeat(trial_id, len(examples)),
        "example_id": pa.array([example.example_id for example in examples], pa.string()),
        "prediction": pa.array([words.decode(answer.tokens) for answer in answers], pa.string()),
        "kept_final": _lists([answer.kept for answer in answers], pa.int16()),
        "limit_reached": pa.array(
            [len(answer.tokens) >= example.max_new_tokens for answer, example in zip(answers, examples, strict=True)],
            pa.bool_(),
        ),
    }
    return pa.table(columns, schema=PARTS["predictions"])


def _kept_table(trial_id: str, images: Sequence[str], selection: Selection) -> pa.Table:
    columns = {
        "trial_id": pa.repeat(trial_id, len(images)),
        "image": pa.array(images, pa.string()),
        "indices": _lists(selection.indices.tolist(), pa.int16()),
        "pillar": _lists(selection.pillars.tolist(), pa.bool_()),
    }
    return pa.table(columns, schema=PARTS["kept"])


def _lists(rows: Sequence[Sequence], kind: pa.DataType) -> pa.ListArray:
    """Rows as one Arrow column of lists; much faster than letting Arrow look at each row."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    flat = np.fromiter(itertools.chain.from_iterable(rows), kind.to_pandas_dtype(), count=offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind))


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep left beside stored answers: units that were given up, with the reason."""

    failures: dict[str, tuple[WorkUnit, Failure]]

    @property
    def incomplete(self) -> dict[str, Failure]:
        """Trials that lack answers → why the first of them was given up."""
        found: dict[str, Failure] = {}
        for unit, failure in self.failures.values():
            for trial in unit.trials:
                found.setdefault(trial.trial_id, failure)
        return found


def run_sweep(
    spec: SweepSpec,
    trials: Sequence[Trial],
    examples: Sequence[Example],
    cluster: ClusterSettings,
    *,
    costs: Sequence[Costs],
    speed: float,
    unit_images: int,
    on_start: Callable[[Mapping[str, WorkUnit], int], None] = lambda units, cached: None,
    on_done: OnDone = lambda unit, report: None,
    in_process: bool = False,
    gpu_hours: float | None = None,
) -> SweepOutcome:
    """Run what the store lacks. ``costs``, ``speed``, ``unit_images``: see :func:`pipelines.sweep.units.plan_units`.

    ``on_start(units, cached_answers)`` is called before work starts, ``on_done(unit id, report)`` as each unit finishes;
    ``gpu_hours``: see :func:`pipelines.workers.run_units`.
    """
    stored = [(held.trials, held.examples) for held in ResultStore(spec.results).done(tidy=True)]
    units, cached = plan_units(trials, examples, stored, costs, speed, unit_images, reuse=spec.reuse)
    on_start(units, cached)
    return SweepOutcome(run_units(spec, units, cluster, on_done, in_process=in_process, gpu_hours=gpu_hours))
