"""The whole training recipe of the testbed's model: vision tower, then projector and language model."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from nuwa.testbed.architecture import build_model, model_config
from nuwa.testbed.instruction import InstructionLearner, draw_language_batch, evaluate_language
from nuwa.testbed.language import build_processor
from nuwa.testbed.readable import rename_tower
from nuwa.testbed.vision import VisionLearner, draw_vision_batch, evaluate_vision
from nuwa.training import Log, PhaseSchedule, train_phase

LANGUAGE_WARMUP = 300
LANGUAGE_EVALUATE_EVERY = 500


def train_testbed(
    output: Path,
    checkpoints: Path,
    *,
    seed: int,
    vision: PhaseSchedule,
    language: PhaseSchedule,
    compile_layers: bool,
    log: Log,
) -> None:
    """Train from nothing (or from ``checkpoints``) and save model and processor to ``output``, whole or not at all."""
    set_seed(seed)
    processor = build_processor()
    tokenizer = processor.tokenizer
    model = build_model(
        model_config(
            len(tokenizer),
            processor.image_token_id,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
    )
    train_phase(
        "vision",
        VisionLearner(model.model.vision_tower),
        draw_vision_batch,
        vision,
        seed=seed,
        checkpoint=checkpoints / "vision",
        log=log,
        evaluate=evaluate_vision,
    )

    learner = InstructionLearner(model, tokenizer, compile_layers and torch.cuda.device_count() <= 1)
    train_phase(
        "language",
        learner,
        functools.partial(draw_language_batch, tokenizer),
        language,
        seed=seed,
        checkpoint=checkpoints / "language",
        log=log,
        evaluate=functools.partial(evaluate_language, tokenizer=tokenizer),
    )
    if PartialState().is_main_process:
        fresh = output.with_name(output.name + ".tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        rename_tower(fresh)
        shutil.rmtree(output, ignore_errors=True)
        fresh.rename(output)
        shutil.rmtree(checkpoints)  # a finished training has nothing to resume
    PartialState().wait_for_everyone()
