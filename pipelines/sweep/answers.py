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
from nuwa.layout import InterleavedLayout, VisualLayout, images_of, interleave
from nuwa.methods import select_views
from nuwa.plugins import load_plugins
from nuwa.selection import Selection
from nuwa.signals import VisionSignals
from nuwa.vlm import Adapter, EncodedPrompt, view_signals
from pipelines.data.image_keys import digests_of, shows_several
from pipelines.features.images import read_images
from pipelines.features.layouts import interleaved
from pipelines.features.loading import FULL_PRECISION, Loading, load_model
from pipelines.features.store import FeatureStore
from pipelines.files.lines import tell
from pipelines.settings import ClusterSettings, Reuse
from pipelines.sweep.costs import Costs
from pipelines.sweep.provenance import hardware, own_version, versions
from pipelines.sweep.results import PARTS, ResultStore, StoredUnit
from pipelines.sweep.tree import work_tree
from pipelines.sweep.trials import Trial
from pipelines.sweep.units import UnitExample, WorkUnit, plan_units
from pipelines.workers import Allowance, ClusterUnavailable, Failure, Fault, OnDone, Partial, UnitsFailed, run_units


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
        self.encoded: dict[tuple[str, ...], Future[list[Encoded]]] = {}
        self.words = Words(self.vlm)

    def run(self, unit: WorkUnit, upcoming: WorkUnit | None = None) -> UnitReport | Partial:
        """Answer ``unit`` and store the result; a :class:`Partial` where some of its trials raised."""
        began = time.perf_counter()
        hit = unit.images in self.encoded
        groups = self._read(unit.images).result()
        # The next unit's features are read while this one runs; those of the last are let go.
        near = {unit.images, upcoming.images if upcoming else unit.images}
        self.encoded = {images: self._read(images) for images in near}

        answered = answer_unit(self.vlm, groups, unit, self.words)
        failed = [trial for trial in unit.trials if trial.trial_id in answered.failed]
        whole = [trial for trial in unit.trials if trial.trial_id not in answered.failed]
        report = None
        if whole:
            finished = unit.only(whole)
            self._store(finished, answered, groups)
            report = UnitReport(
                trial_ids=tuple(trial.trial_id for trial in whole),
                examples=len(finished.examples),
                images=len(finished.images),
                seconds=time.perf_counter() - began,
                model_seconds=answered.model_seconds,
                feature_hit=hit,
                flops=finished.flops,
                device=self.device,
            )
        if failed or report is None:
            return Partial(report, unit.only(failed), answered.failed[failed[0].trial_id])
        return report

    def _store(self, finished: WorkUnit, answered: Answered, groups: Sequence[Encoded]) -> None:
        stored = StoredUnit(
            finished.unit_id,
            tuple(trial.answer_id for trial in finished.trials),
            tuple(example.digest for example in finished.examples),
            self._provenance(groups),
        )
        self.results.write(stored, answered.tables(stored.unit))

    def _provenance(self, groups: Sequence[Encoded]) -> str:
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

    def _read(self, images: tuple[str, ...]) -> Future[list[Encoded]]:
        if images in self.encoded:
            return self.encoded[images]
        resized = self._resized if self.vlm.resizes else None
        together = functools.partial(interleaved, self.vlm)
        return self.reader.submit(read_encoded, self.features, images, self.encoder, resized, self.vlm.heads, together)

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
    together: Callable[[Sequence[VisualLayout]], InterleavedLayout] | None = None,
) -> list[Encoded]:
    """What the store holds of ``images``, layout by layout; ``encoder``, ``resized``, ``heads``: see
    :class:`nuwa.signals.VisionSignals`.

    Keys of several images come behind the others; ``together``: the layout of a sequence from its images', which is only
    asked where there is such a key.
    """

    def encoded(layout: VisualLayout, alike: tuple[str, ...]) -> EncodedImages:
        again = resized(alike) if resized else None
        views = view_signals(layout, store.read(alike), alike, resized=again, encoder=encoder, heads=heads)
        return EncodedImages(alike, layout, views)

    alone = [image for image in images if not shows_several(image)]
    groups: list[Encoded] = [encoded(layout, alike) for layout, alike in store.by_layout(alone).items()]

    sequences = {key: digests_of(key) for key in images if shows_several(key)}
    known = {image for shown in sequences.values() for image in shown}
    layouts = {image: layout for layout, alike in store.by_layout(sorted(known)).items() for image in alike}
    alike_sequences: dict[tuple[VisualLayout, ...], list[str]] = {}
    for key, shown in sequences.items():
        alike_sequences.setdefault(tuple(layouts[image] for image in shown), []).append(key)
    for of_images, keys in alike_sequences.items():
        assert together is not None
        columns = zip(*(sequences[key] for key in keys), strict=True)
        parts = [encoded(layout, column) for layout, column in zip(of_images, columns, strict=True)]
        groups.append(EncodedSequences(tuple(keys), together(of_images), parts))
    return groups


class Words:
    """Prompts and answers as token ids and back; a sweep asks the same and hears much the same, trial after trial."""

    def __init__(self, vlm: Adapter) -> None:
        self.vlm = vlm
        self.prompts: dict[tuple[str, int], EncodedPrompt] = {}
        self.texts: dict[tuple[int, ...], str] = {}

    def encode(self, text: str, images: int = 1) -> EncodedPrompt:
        """``text`` behind so many images."""
        if (text, images) not in self.prompts:
            self.prompts[text, images] = self.vlm.encode_prompt(text, images)
        return self.prompts[text, images]

    def decode(self, tokens: tuple[int, ...]) -> str:
        if tokens not in self.texts:
            self.texts[tokens] = self.vlm.decode_text(list(tokens))
        return self.texts[tokens]


class EncodedImages(NamedTuple):
    """Images of one layout, and every view's signals of them."""

    images: tuple[str, ...]
    layout: VisualLayout
    views: Sequence[VisionSignals]

    def select(self, trial: Trial) -> Selection:
        """Stage 1 of a trial on this layout."""
        return select_views(trial.plan, self.layout, self.views)

    def to(self, device: torch.device) -> EncodedImages:
        return self._replace(views=[view.to(device) for view in self.views])

    def by_question(self, vlm: Adapter, questions: Sequence[Sequence[UnitExample]]) -> EncodedImages:
        """A row for each of an image's ``questions``, with what its words have to do with the image's tokens."""
        texts = [[example.prompt for example in about_image] for about_image in questions]
        images = tuple(example.image for about_image in questions for example in about_image)
        return self._replace(images=images, views=vlm.read_questions(self.views, texts))

    def projected_by(self, vlm: Adapter) -> EncodedImages:
        """Where a method reads what stands behind the projector, ``vlm`` makes it."""
        return self._replace(views=[replace(view, project=vlm.project) for view in self.views])


class EncodedSequences(NamedTuple):
    """Keys of several images each, whose sequences have one layout. ``columns``: the first image of every sequence, the
    second, and so on."""

    images: tuple[str, ...]
    layout: InterleavedLayout
    columns: Sequence[EncodedImages]

    def select(self, trial: Trial) -> Selection:
        """Stage 1 on each image as if it were alone."""
        of_images = [column.select(alone) for column, alone in zip(self.columns, trial.images, strict=True)]
        return interleave(self.layout, of_images)

    def to(self, device: torch.device) -> EncodedSequences:
        return self._replace(columns=[column.to(device) for column in self.columns])

    def by_question(self, vlm: Adapter, questions: Sequence[Sequence[UnitExample]]) -> EncodedSequences:
        """See :meth:`EncodedImages.by_question`."""
        columns = [column.by_question(vlm, questions) for column in self.columns]
        return self._replace(images=columns[0].images, columns=columns)

    def projected_by(self, vlm: Adapter) -> EncodedSequences:
        return self._replace(columns=[column.projected_by(vlm) for column in self.columns])


Encoded = EncodedImages | EncodedSequences


@dataclass
class Answered:
    """What a unit came to, trial by trial; ``failed``: trials that raised."""

    parts: dict[str, list[tuple[pa.Table, pa.Table]]]  # predictions and kept tokens of each trial, layout by layout
    timings: dict[str, dict[str, Any]]
    failed: dict[str, Failure] = field(default_factory=dict)
    model_seconds: float = 0.0

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> Answered:
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


def answer_unit(vlm: Adapter, groups: Sequence[Encoded], unit: WorkUnit, words: Words) -> Answered:
    """All answers of a unit, layout by layout, depth first along the tree of what the trials are there."""
    answered = Answered.of(unit.trials)
    for stored in groups:
        # One layout at a time: what is read ahead stays in the machine's memory.
        group = stored.to(vlm.device).projected_by(vlm)
        alike: dict[str, list[str]] = {}
        on_layout: dict[str, Trial] = {}
        for trial in unit.trials:
            if trial.trial_id not in answered.failed:
                there = trial.on(group.layout)
                on_layout.setdefault(there.trial_id, there)
                alike.setdefault(there.trial_id, []).append(trial.trial_id)

        questions = [[example for example in unit.examples if example.image == image] for image in group.images]
        work = _LayoutWork(vlm, words, group, questions, alike, answered)
        for positions in work_tree(on_layout.values()).values():
            work.answer_selection(list(positions.values()))
    return answered


@dataclass(frozen=True)
class _Selected:
    """What stage 1 came to on images, or on questions each with a row of its own; ``questions``: of each row."""

    rows: Encoded
    questions: list[list[UnitExample]]
    prompts: list[list[EncodedPrompt]]
    selection: Selection
    seconds: float


@dataclass(frozen=True)
class _LayoutWork:
    """A unit's work on its images of one layout.

    ``questions``: of each image. ``alike``: trial on this layout → the unit's trials that come to it here. What comes of
    the work goes into ``answered``.
    """

    vlm: Adapter
    words: Words
    images: Encoded
    questions: list[list[UnitExample]]
    alike: Mapping[str, list[str]]
    answered: Answered

    @functools.cached_property
    def _by_question(self) -> Encoded:
        """Made once for all trials whose stage 1 reads questions, and not at all where none does."""
        return self.images.by_question(self.vlm, self.questions)

    def answer_selection(self, positions: Sequence[list[Trial]]) -> None:
        """The trials of one stage-1 selection, a list for each position strategy."""
        first = positions[0][0]
        try:
            selected = self._select(first)
        except Exception as error:
            self._fail((trial for trials in positions for trial in trials), error)
            return

        for trials in positions:
            self._answer_trunk(selected, trials)

    def _select(self, trial: Trial) -> _Selected:
        began = time.perf_counter()
        rows, questions = self.images, self.questions
        if trial.spec.reads_question:
            rows = self._by_question
            questions = [[example] for about_image in self.questions for example in about_image]

        count = len(images_of(rows.layout))
        prompts = [[self.words.encode(example.prompt, count) for example in of_row] for of_row in questions]
        selection = rows.select(trial)
        return _Selected(rows, questions, prompts, selection, time.perf_counter() - began)

    def _answer_trunk(self, selected: _Selected, trials: list[Trial]) -> None:
        """The trials of one trunk, by rising first cut."""
        rows, examples = selected.rows, [example for of_row in selected.questions for example in of_row]
        limits = [example.max_new_tokens for example in examples]
        trunk = None
        for done, trial in enumerate(trials):
            began = time.perf_counter()
            try:
                if trunk is None:
                    position = trial.spec.position
                    trunk = Trunk(self.vlm, selected.selection, selected.prompts, position, rows.images, rows.layout)
                trunk.reach(trial.spec.running_cuts(trial.schedule))
            except Exception as error:  # without a trunk none of the rest can go on
                _refuse_without_reference(trials[done:], error)
                self._fail(trials[done:], error)
                return

            forked = time.perf_counter()
            try:
                answers = branch(trunk, trial, limits)
            except Exception as error:
                _refuse_without_reference([trial], error)
                self._fail([trial], error)
                continue
            ended = time.perf_counter()
            self.answered.model_seconds += ended - began
            seconds = {"selection_s": selected.seconds, "trunk_s": forked - began, "answer_s": ended - forked}
            self._add(trial, selected, examples, answers, seconds)

    def _add(
        self,
        trial: Trial,
        selected: _Selected,
        examples: Sequence[UnitExample],
        answers: Sequence[Answer],
        seconds: Mapping[str, float],
    ) -> None:
        def tables(trial_id: str) -> tuple[pa.Table, pa.Table]:
            predictions = _prediction_table(trial_id, examples, answers, self.words)
            # What stage 1 keeps for a question is no image's: where nothing is cut later it is the answer's own.
            if trial.spec.reads_question:
                return predictions, PARTS["kept"].empty_table()
            return predictions, _kept_table(trial_id, selected.rows.images, selected.selection)

        self.answered.add(self.alike[trial.trial_id], tables, questions=len(examples), **seconds)

    def _fail(self, trials: Iterable[Trial], error: Exception) -> None:
        self.answered.fail((trial_id for trial in trials for trial_id in self.alike[trial.trial_id]), error)


def _refuse_without_reference(trials: Sequence[Trial], error: Exception) -> None:
    """Stop the run where the unpruned model overflows: all of it would be in vain. Raises :class:`NoReference`."""
    if isinstance(error, NotFinite) and any(trial.spec.method == UNPRUNED for trial in trials):
        raise NoReference(f"the unpruned trial has no answers: {error}") from error


def branch(trunk: Trunk, trial: Trial, limits: list[int]) -> list[Answer]:
    """A trial's answers from its trunk, which must not stand above the first cut."""
    return trunk.answer(trial.spec.running_cuts(trial.schedule), limits, trial.spec.seed)


def _prediction_table(
    trial_id: str, examples: Sequence[UnitExample], answers: Sequence[Answer], words: Words
) -> pa.Table:
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
    """What a sweep left beside stored answers: units that were given up, with the reason.

    ``stored``: what the store holds, where nothing was to do.
    """

    failures: dict[str, tuple[WorkUnit, Failure]]
    stored: Sequence[StoredUnit] | None = None

    @property
    def incomplete(self) -> dict[str, Failure]:
        """Trials that lack answers → why the first of them was given up."""
        reasons: dict[str, Failure] = {}
        for unit, failure in self.failures.values():
            for trial in unit.trials:
                reasons.setdefault(trial.trial_id, failure)
        return reasons

    @property
    def lacking(self) -> dict[str, dict[str, str]]:
        """Trial id → example id of an answer that is missing → why, in one line."""
        missing: dict[str, dict[str, str]] = {}
        for unit, failure in self.failures.values():
            for trial in unit.trials:
                mine = missing.setdefault(trial.trial_id, {})
                for example in unit.examples:
                    mine.setdefault(example.example_id, failure.reason)
        return missing

    @property
    def left(self) -> str | None:
        """Why units were left untried, where a limit ended the run."""
        return next((failure.reason for _, failure in self.failures.values() if failure.fault == Fault.LEFT), None)


def run_sweep(
    spec: SweepSpec,
    trials: Sequence[Trial],
    examples: Sequence[UnitExample],
    cluster: ClusterSettings,
    *,
    costs: Sequence[Costs],
    speed: float,
    unit_images: int,
    on_start: Callable[[Mapping[str, WorkUnit], int], None] = lambda units, cached: None,
    on_done: OnDone = lambda unit, report: None,
    in_process: bool = False,
    allowance: Allowance | None = None,
    finish_with: float | None = None,
    stored: Sequence[StoredUnit] | None = None,
) -> SweepOutcome:
    """Run what the store lacks. ``costs``, ``speed``, ``unit_images``: see :func:`pipelines.sweep.units.plan_units`.

    ``on_start(units, cached_answers)`` is called before work starts, ``on_done(unit id, report)`` as each unit finishes;
    ``allowance``: see :func:`pipelines.workers.run_units`. ``finish_with``: where too much fails for the run to go on and
    at most this share of all answers is missing, that is an outcome and no error. ``stored``: what the store is known to hold;
    null: it is listed.
    """
    if stored is None:
        stored = ResultStore(spec.results).done(tidy=True)
    there = [(held.trials, held.examples) for held in stored]

    units, cached = plan_units(trials, examples, there, costs, speed, unit_images, reuse=spec.reuse)
    on_start(units, cached)
    try:
        failures = run_units(spec, units, cluster, on_done, in_process=in_process, allowance=allowance)
        return SweepOutcome(failures, None if units else stored)
    except NoReference:
        raise
    except (UnitsFailed, ClusterUnavailable) as error:
        if finish_with is None:
            raise
        there = [(held.trials, held.examples) for held in ResultStore(spec.results).done()]
        units, cached = plan_units(trials, examples, there, costs, speed, unit_images, reuse=spec.reuse)
        everything = len(trials) * len(examples)
        if (everything - cached) / everything > finish_with:
            raise
        why = str(error).partition("\n")[0]
        tell(f"{why}; {cached:,} of {everything:,} answers are there (sweep.finish_with)")
        return SweepOutcome({unit_id: (unit, Failure(why, str(error), 0)) for unit_id, unit in units.items()})
