"""What decides answers: the model, its features, and the code that each trial runs; and where answers came from.

A stored answer is known by its trial, the code of that trial, and its *context*: everything else that decides it.
Versions of libraries and the kind of device are *provenance*: they are recorded beside every answer, and
``sweep.reuse`` says whether answers of other versions are taken.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from nuwa.source import closure
from nuwa.vlm import Adapter
from pipelines.features.encoding import features_identity
from pipelines.features.identity import Described, ModelIdentity, code_by_file, code_names, model_type
from pipelines.features.images import read_images
from pipelines.features.loading import Loading, load_model
from pipelines.settings import FeatureSettings
from pipelines.sweep.answers import SweepWorker, answer_unit, read_encoded
from pipelines.sweep.provenance import versions_digest
from pipelines.sweep.trials import Layouts, Trial
from pipelines.sweep.units import WorkUnit


def answer_context(model: ModelIdentity, vlm: Adapter, features: FeatureSettings) -> Described:
    """What decides answers beside the trial, its code and the question."""
    store = features_identity(model, vlm, features.dtype, features.keep)
    return Described.of({**store.parts, **model.language})


@functools.cache
def trial_code(method: str, stage1: str, scorers: tuple[str, ...], family: str, language: str) -> Described:
    """The code between stored features and an answer, of one trial on models of ``family``, by file; ``language``: the
    type of their language model."""
    roots: tuple[Any, ...] = (answer_unit, read_encoded, read_images, load_model, SweepWorker._resized)
    # What a trial is called on a layout decides whose answers it shares there.
    roots += (Trial.on, Trial.plan, Trial.trial_id, Trial.selection_identity)
    roots += (Trial._asked, Trial.seeded, Trial.cuts, Trial.final_keep)
    names = code_names(family, language) | {
        "stage-1 method": [stage1],
        "method": [method],
        "stage-2 scorer": list(scorers),
    }
    return Described.of(code_by_file(closure(roots, names, without=(Trial, Layouts, WorkUnit, Loading))))


def code_of(trial: Trial, vlm: Adapter) -> Described:
    """The code that ``trial`` runs, and the text tower where it reads one."""
    stage2 = trial.spec.stage2
    scorers = stage2.scorer_names if stage2 is not None else ()
    code = trial_code(trial.spec.method, trial.spec.stage1, scorers, *_types_of(vlm))
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


def with_code(trials: Iterable[Trial], vlm: Adapter, device: str) -> list[Trial]:
    """``trials`` that know the code they run and the versions they run with."""
    versions, codes = versions_digest(device), dict[tuple[str, tuple[str, ...], bool], str]()
    coded = []
    for trial in trials:
        spec = trial.spec
        scorers = spec.stage2.scorer_names if spec.stage2 is not None else ()
        kind = (spec.method, scorers, spec.reads_question)  # what trials run alike
        if kind not in codes:
            codes[kind] = f"{code_key(code_of(trial, vlm))}.{versions}"
        coded.append(trial.coded(codes[kind]))
    return coded


def same_code(trials: Sequence[Trial]) -> str:
    """One digest of the code of all trials."""
    return hashlib.sha256("".join(sorted({trial.code.partition(".")[0] for trial in trials})).encode()).hexdigest()
