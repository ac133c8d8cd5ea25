"""``pruner``: train LearnPruner's module on the model of ``model.path`` (two minutes on two CPU cores; resumes).

``pruner.data`` says with what: the testbed's scenes, which teach the testbed's model, or published instruction data,
which teach any LLaVA-1.5, LLaVA-NeXT, Qwen2-VL or Qwen2.5-VL. Runs within ``dvc repro`` whenever the model, the recipe or the code of the training has
changed; the testbed's weights are in git, so a fresh clone has them. ``make pruner`` trains anyway. On several GPUs:
``accelerate launch --multi_gpu -m stages.pruner``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from nuwa.pruner.conversations import Scenes
from nuwa.pruner.instructions import Conversations, InstructionDataError, Instructions, read_instructions
from nuwa.pruner.layouts import LayoutConversations
from nuwa.pruner.train import TAUGHT, build_learner, train_pruner
from nuwa.source import closure, digest_of
from nuwa.stage1.learnpruner import DEFAULT_WEIGHTS, WeightsError, read_lpm
from nuwa.training import PhaseSchedule
from nuwa.vlm import adapter_class
from nuwa.vlm.language import TEXT_FAMILIES
from nuwa.vlm.shapes import model_shape
from pipelines.settings import SCENES, Settings, SettingsError
from pipelines.tracking.training import shown_training
from stages.entry import CACHE, run_stage

WARMUP, DECAY_SHARE = 10, 0.5
LOG_EVERY, EVALUATE_EVERY, CHECKPOINT_EVERY = 10, 30, 30


def pruner(settings: Settings) -> None:
    if settings.pruner.data == SCENES and settings.model.prompt_style != "testbed":
        print(
            f"pruner.data = {SCENES} teaches the testbed's model: nothing is trained for {settings.model.path}, and "
            f"{DEFAULT_WEIGHTS} stays as it is; the sweep refuses it on an encoder it was not trained on"
        )
        return
    try:
        _train(settings)
    except InstructionDataError as error:
        raise SettingsError(f"pruner.data: {error}") from None


def _data(vlm: Any, settings: Settings, instructions: Instructions | None) -> Scenes | Conversations:
    """What ``vlm`` is taught with; ``instructions`` null: the testbed's scenes."""
    recipe = settings.pruner
    if instructions is None:
        return Scenes(vlm, recipe.seed, recipe.images, recipe.share)
    return (LayoutConversations if vlm.dynamic else Conversations)(vlm, instructions, recipe.max_tokens)


def _train(settings: Settings) -> None:
    recipe, main = settings.pruner, PartialState(cpu=not torch.cuda.is_available()).is_main_process
    instructions = None if recipe.data == SCENES else _instructions(settings)
    if instructions is not None and main:
        print(instructions, flush=True)

    model = settings.model
    shape = model_shape(model.path)
    # Pictures as the sweep prepares them, or the weights would be another encoder's.
    framing: dict[str, Any] = {
        "conversation": model.conversation,
        "image_aspect_ratio": model.image_aspect_ratio,
        "image_rules": model.images,
    }
    vlm: Any = adapter_class(shape.model_type).load(model.path, dtype=getattr(torch, model.dtype), **framing)
    data = _data(vlm, settings, instructions)
    facts = {"parameters": recipe.model_dump(), "model": vlm.fingerprint()}
    if instructions is not None:
        facts["data"] = instructions.digest
    # Families that are not this model's change nothing of its training.
    entries = {"model type": [shape.model_type], TEXT_FAMILIES.kind: [shape.text_config.model_type]}
    facts["code"] = digest_of(closure([build_learner, train_pruner, type(data)], entries))
    if _carries(Path(DEFAULT_WEIGHTS), facts, vlm.encoder_identity):
        print(f"{DEFAULT_WEIGHTS} is of this recipe, data, model and code already; `make pruner` trains it again")
        return
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    tracking = settings.tracking
    with shown_training(
        tracking.resolved_uri,
        tracking.experiment,
        "pruner training",
        logged=main,
        training_id=identity,
        params=recipe.model_dump(),
    ) as show:
        train_pruner(
            build_learner(
                vlm, recipe.seed, recipe.sparsity, recipe.keep_share, recipe.penalty_weight, recipe.recompute
            ),
            data,
            Path(DEFAULT_WEIGHTS),
            CACHE / "training" / identity,
            seed=recipe.seed,
            schedule=PhaseSchedule(
                steps=recipe.steps,
                batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                warmup=WARMUP,
                decay_share=DECAY_SHARE,
                weight_decay=0.0,
                checkpoint_every=CHECKPOINT_EVERY,
                evaluate_every=EVALUATE_EVERY,
                log_every=LOG_EVERY,
            ),
            facts=facts,
            log=show,
        )


def _carries(weights: Path, facts: Mapping[str, Any], encoder: str) -> bool:
    """Whether the weights that are there were trained as ``facts`` say, for that encoder."""
    try:
        held = read_lpm(weights)
    except WeightsError:
        return False
    return held.encoder == encoder and dict(held.training) == json.loads(json.dumps(facts))


def _instructions(settings: Settings) -> Instructions:
    """The data of ``pruner.data``, checked; nothing of the model but its configuration has been read."""
    recipe, model = settings.pruner, settings.model
    family = model_shape(model.path).model_type
    if family not in TAUGHT:
        raise SettingsError(
            f"pruner.data = {recipe.data!r}: instruction data teach models of family {', '.join(TAUGHT)}, and model.path = "
            f"{model.path!r} is of family {family}; allowed for it: {SCENES}, which trains nothing, with weights of your "
            "own in the grids' parameters.weights"
        )
    path = Path(recipe.data)
    return read_instructions(path, Path(recipe.images_folder or path.parent), recipe.seed, recipe.share)


if __name__ == "__main__":
    run_stage(pruner)
