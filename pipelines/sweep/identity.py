"""What decides answers: the model, its features, and the code that each trial runs; and where answers came from.

A stored answer is known by its trial, the code of that trial, and its *context*: everything else that decides it.
Versions of libraries and the kind of device are *provenance*: they are recorded beside every answer, and
``sweep.reuse`` says whether answers of other versions are taken.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nuwa.methods import Stage2
from nuwa.plugins import plugin_code
from nuwa.source import closure
from nuwa.stage2.coordinates import with_coordinates
from nuwa.stage2.recycling import Recycling, cluster_noise, recycle
from nuwa.vlm import Adapter
from pipelines.features.encoding import features_identity
from pipelines.features.identity import Described, ModelIdentity, code_names, model_type
from pipelines.features.images import read_images
from pipelines.features.known_code import known_code
from pipelines.features.layouts import interleaved
from pipelines.features.loading import Loading, load_model
from pipelines.settings import FeatureSettings
from pipelines.sweep.answers import SweepWorker, answer_unit, read_encoded
from pipelines.sweep.provenance import versions_digest
from pipelines.sweep.trials import Layouts, Trial, no_cycles
from pipelines.sweep.units import WorkUnit


def answer_context(model: ModelIdentity, vlm: Adapter, features: FeatureSettings) -> Described:
    """What decides answers beside the trial, its code and the question."""
    store = features_identity(model, vlm, features.dtype, features.keep)
    return Described.of({**store.parts, **model.language})


# What a stage 2 runs only where it is configured to: field of Stage2 → the code; left out where that is null.
OPTIONAL_CODE: Mapping[str, tuple[Any, ...]] = {
    "coordinates": (with_coordinates,),
    "recycling": (Recycling, recycle, cluster_noise),
}


@functools.cache
def trial_code(
    method: str, stage1: str, scorers: tuple[str, ...], options: tuple[str, ...], family: str, language: str
) -> Described:
    """The code between stored features and an answer, of one trial on models of ``family``, by file.

    ``options``: the keys of :data:`OPTIONAL_CODE` that the trial's stage 2 has; ``language``: the type of the model's
    language model.
    """
    roots: tuple[Any, ...] = (answer_unit, read_encoded, read_images, load_model, SweepWorker._resized)
    # What a trial is called on a layout decides whose answers it shares there.
    roots += (Trial.on, Trial._together, interleaved, Trial.plan, Trial.trial_id, Trial.selection_identity)
    roots += (Trial._asked, Trial.seeded, Trial.cuts, Trial.final_keep)
    names = code_names(family, language) | {
        "stage-1 method": [stage1],
        "method": [method],
        "stage-2 scorer": list(scorers),
    }

    unused = [part for option, code in OPTIONAL_CODE.items() if option not in options for part in code]
    # What a plug-in's code is called stands in a trial's id, and its code in the closure.
    outside = (Trial, Layouts, WorkUnit, Loading, plugin_code, *unused)
    asked = (method, stage1, scorers, options, family, language)
    return Described.of(known_code(("trial", *asked), lambda: closure(roots, names, without=outside)))


def _code_key(trial: Trial) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """What :func:`trial_code` asks of a trial."""
    spec, stage2 = trial.spec, trial.spec.stage2
    if stage2 is None:
        return spec.method, spec.stage1, (), ()
    return spec.method, spec.stage1, stage2.scorer_names, options_of(stage2)


def options_of(stage2: Stage2) -> tuple[str, ...]:
    """The keys of :data:`OPTIONAL_CODE` that ``stage2`` is configured to run."""
    return tuple(name for name in OPTIONAL_CODE if getattr(stage2, name) is not None)


def code_of(trial: Trial, vlm: Adapter) -> Described:
    """The code that ``trial`` runs, and the text tower where it reads one."""
    code = trial_code(*_code_key(trial), *_types_of(vlm))
    if trial.spec.reads_question and vlm.text_tower is not None:
        return Described.of({**code.parts, "model.text_tower": vlm.text_tower.identity})
    return code


def _types_of(vlm: Adapter) -> tuple[str, str]:
    """Of the model and of its language model."""
    return model_type(vlm), str(vlm.model.config.get_text_config().model_type)


def code_key(code: Described) -> str:
    """How answer ids and a store's descriptions name a trial's code."""
    return code.digest[:12]


def context_key(context: Described) -> str:
    """How units and a store's descriptions name what decides answers beside trial and question."""
    return context.digest[:24]


@no_cycles()
def with_code(trials: Iterable[Trial], vlm: Adapter, device: str) -> list[Trial]:
    """``trials`` that know the code they run and the versions they run with."""
    versions, codes = versions_digest(device), dict[tuple[Any, ...], str]()
    reads_question = vlm.text_tower is not None  # of others the code alone counts
    coded = []
    for trial in trials:
        spec, stage2 = trial.spec, trial.spec.stage2
        # What trials run alike, told without a call: there may be very many.
        kind: tuple[Any, ...] = (spec.method,)
        if stage2 is not None:
            kind = (
                spec.method,
                stage2.scorer,
                stage2.later_scorer,
                stage2.coordinates is None,
                stage2.recycling is None,
            )
        if reads_question:
            kind = (*kind, spec.reads_question)
        if kind not in codes:
            codes[kind] = f"{code_key(code_of(trial, vlm))}.{versions}"
        coded.append(trial.coded(codes[kind]))
    return coded


def same_code(trials: Sequence[Trial]) -> str:
    """One digest of the code of all trials."""
    return hashlib.sha256("".join(sorted({trial.code.partition(".")[0] for trial in trials})).encode()).hexdigest()
