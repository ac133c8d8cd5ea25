"""A tiny sweep on tiny random models of every family, measured by whatever code is imported.

What is measured of every *slot*, a trial on a family: the identity of its answers and a digest of them. Models and
processors are of other packages and are made once; this module names nothing of the project before :func:`measure`.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZES = [(60, 40), (48, 48)]
QUESTIONS = ["what is on the left ?", "where is the red sign near the dog ?"]
COLUMNS = {"image": pa.string(), "width": pa.int32(), "height": pa.int32(), "bytes": pa.binary()}
POSITIONS = ["perc", "pesp", "rpme"]
FEW_METHODS = ("fastv", "random", "visionzip")
FEW_SCORERS = ("attention_raters", "random", "feather")


@dataclass(frozen=True)
class World:
    """``models``: model type → model, processor and folder of its files; ``examples``: questions about ``images``.
    ``pruner``: weights of LearnPruner for LLaVA's encoder.

    ``small``: one trial of every kind, instead of all methods and scorers.
    """

    models: Mapping[str, tuple[Any, Any, Path]]
    images: Path
    examples: pd.DataFrame
    memory: Path
    pruner: Path
    small: bool


def make_world(folder: Path, models: Mapping[str, tuple[Any, Any]], small: bool) -> World:
    """Write what is measured below ``folder``."""
    generator, rows = np.random.default_rng(8), []
    for size in SIZES:
        buffer = io.BytesIO()
        coarse = Image.fromarray(generator.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
        content = buffer.getvalue()
        rows.append((hashlib.sha256(content).hexdigest(), *size, content))
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table(columns, schema=pa.schema(COLUMNS)), folder / "images.parquet")

    asked = [
        {"example_id": f"{number}-{at}", "image": row[0], "prompt": prompt, "max_new_tokens": 3, "benchmark": "pope"}
        | {"width": row[1], "height": row[2]}
        for number, row in enumerate(rows)
        for at, prompt in enumerate(QUESTIONS)
    ]
    saved = {}
    for name, (model, processor) in models.items():
        model.save_pretrained(folder / name)
        getattr(processor, "save_pretrained", processor.image_processor.save_pretrained)(folder / name)
        saved[name] = (model, processor, folder / name)
    return World(
        saved, folder / "images.parquet", pd.DataFrame(asked), folder / "memory", folder / "lpm.safetensors", small
    )


def measure(
    world: World, before: Mapping[str, Mapping[str, Any]] | None = None, *, answers: bool = True
) -> dict[str, dict[str, Any]]:
    """Slot → ``id``, ``answers`` (a digest, or the error), ``files`` and what the trial is, by the code on the path.

    ``before``: an earlier measurement. Slots whose ids are others now are not run; without ``answers`` none is.
    """
    from nuwa.vlm import adapter_class

    slots: dict[str, dict[str, Any]] = {}
    for family, (model, processor, path) in world.models.items():
        vlm = adapter_class(family)(model, processor)
        try:
            slots |= _measure_family(world, family, vlm, path, before, answers)
        except Exception as error:  # without a plan there is no answer either
            slots |= {
                name: {"id": None, "answers": repr(error)} for name in before or {} if name.startswith(f"{family} ")
            }
    return slots


def _measure_family(
    world: World, family: str, vlm: Any, path: Path, before: Mapping[str, Mapping[str, Any]] | None, answers: bool
) -> dict[str, dict[str, Any]]:
    from nuwa.signals import OPTIONAL_SIGNALS, SIGNAL_NAMES
    from nuwa.stage1 import get_method
    from nuwa.stage2 import get_scorer
    from pipelines.features.encoding import features_identity
    from pipelines.features.identity import ModelIdentity
    from pipelines.features.layouts import image_layouts
    from pipelines.features.loading import Loading
    from pipelines.settings import FeatureSettings, SweepSettings
    from pipelines.sweep.identity import answer_context, code_of, options_of, with_code
    from pipelines.sweep.trials import Layouts, expand

    layouts = image_layouts(vlm, world.examples)
    keep = SIGNAL_NAMES if vlm.dynamic else (*SIGNAL_NAMES, *OPTIONAL_SIGNALS)
    features = FeatureSettings(dtype="float32", shard_images=8, batch_size=2, keep=keep)
    known = ModelIdentity.of(str(path), Loading(), vlm, world.memory)
    stored, context = features_identity(known, vlm, features.dtype, features.keep), answer_context(known, vlm, features)
    budgets = {"budget_unit": "share", "budgets": [0.4]} if vlm.dynamic else {"budgets": [48]}
    asked = {"benchmarks": ["pope"], "images": None, "subset_seed": 0, "unit_images": 4, **budgets}
    plan, dynamic = SweepSettings(**asked, grids=_grids(world, vlm, budgets["budgets"][0])), vlm.dynamic
    trials = with_code(expand(plan, Layouts.of(layouts.values(), dynamic), vlm.layers), vlm, "cpu")

    slots, of_slot = {}, {f"{family} {trial.spec.method} {trial.trial_id}": trial for trial in trials}
    for name, trial in of_slot.items():
        stage2 = trial.spec.stage2
        scores = [get_scorer(scorer).score for scorer in stage2.scorer_names] if stage2 else []
        files = sorted({*code_of(trial, vlm).parts, *context.parts})
        slots[name] = {
            "id": f"{stored.digest} {context.digest} {trial.answer_id}",
            "module": get_method(trial.spec.stage1).select.__module__,
            "scorers": [f"{score.__module__}:{score.__qualname__}" for score in scores],
            "options": options_of(stage2) if stage2 else [],
            "family": family,
            "files": [name.removeprefix("code of ") for name in files if name.startswith("code of ")],
        }
    same = [name for name in slots if before is None or slots[name]["id"] == before.get(name, {}).get("id")]
    chosen = [of_slot[name] for name in same]
    if answers and same:
        outcomes = _answers(world, vlm, known, stored.digest[:16], features, layouts, chosen)
        for name, trial in zip(same, chosen, strict=True):
            slots[name]["answers"] = outcomes[trial.trial_id]
    return slots


def _grids(world: World, vlm: Any, budget: float) -> list[dict[str, Any]]:
    """Every position strategy, every scorer and every method.

    Models of dynamic layouts have fewer of them: their code is the same.
    """
    from nuwa.methods import RECIPES, check_encoder, specify
    from nuwa.stage2 import SCORERS

    few = world.small or vlm.dynamic
    parameters = {
        "learnpruner": {"weights": str(world.pruner)},
        "cdpruner": {"relevance": "none"},
    }  # it has no text tower

    def offered(name: str, **options: Any) -> bool:
        try:
            check_encoder(specify(name, budget=budget, **options), type(vlm))
        except ValueError:
            return False
        return True

    chosen = [name for name in RECIPES if name in FEW_METHODS or not few]
    methods = [name for name in chosen if offered(name, parameters=parameters.get(name))]
    scorers = [name for name in SCORERS if offered("nuwa", stage2={"scorer": name})]
    scorers = [name for name in scorers if name in FEW_SCORERS or not few]
    grids = [
        *({"name": "methods", "method": name, "parameters": parameters.get(name, {})} for name in methods),
        {"name": "scorers", "method": "uniform", "stage2_layer": 2, "stage2_scorer": scorers, "stage2_ratio": 0.5},
        {"name": "positions", "method": "uniform", "position": POSITIONS},
        {"name": "coordinates", "method": "nuwa", "parameters": {"coordinates": 0.1}},
    ]
    return [{**grid, "where_reachable": True} for grid in grids]


def _answers(
    world: World, vlm: Any, known: Any, identity: str, features: Any, layouts: Mapping[str, Any], trials: list
) -> dict[str, str]:
    """Trial id → digest of what the trial comes to, through encoding, store and decoder."""
    from pipelines.features.encoding import EncodeSpec, EncodeWorker
    from pipelines.features.store import FeatureStore
    from pipelines.sweep.answers import SweepWorker, Words, answer_unit, read_encoded
    from pipelines.sweep.units import WorkUnit, read_examples

    with tempfile.TemporaryDirectory() as root:
        encoder = EncodeWorker.__new__(EncodeWorker)
        encoder.vlm, encoder.store = vlm, FeatureStore(root, identity)
        encoder.spec = EncodeSpec(
            model="",
            images=str(world.images),
            root=root,
            identity=identity,
            dtype="float32",
            keep=features.keep,
            batch_size=2,
            threads=1,
            device="cpu",
        )
        for layout in dict.fromkeys(layouts.values()):
            encoder.run([image for image in sorted(layouts) if layouts[image] == layout])

        worker = SweepWorker.__new__(SweepWorker)
        worker.vlm, worker.images = vlm, world.images
        store = FeatureStore(root, identity)
        examples = tuple(read_examples(world.examples, "", layouts))
        resized = worker._resized if vlm.resizes else None
        groups = read_encoded(store, sorted(layouts), known.fingerprint, resized, vlm.heads)
        answered = answer_unit(vlm, groups, WorkUnit(tuple(trials), examples), Words(vlm))
    outcomes = {name: f"{failure.reason}" for name, failure in answered.failed.items()}
    for name, parts in answered.parts.items():
        rows = [part.select([*part.column_names[1:]]).to_pylist() for pair in parts for part in pair]
        outcomes.setdefault(name, hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest())
    return outcomes
