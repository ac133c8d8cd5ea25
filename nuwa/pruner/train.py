"""The whole recipe of the LPM: everything but it is frozen, the loss is the language model's own."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from nuwa.pruner.layouts import LayoutLearner
from nuwa.pruner.learner import PrunerLearner, Sparsity
from nuwa.signals import seeded_generator
from nuwa.stage1.learnpruner import Lpm, save_lpm
from nuwa.training import Log, Metrics, PhaseSchedule, train_phase
from nuwa.vlm import Adapter
from nuwa.vlm.language import SLIDING

PHASE = "pruner"
TAUGHT = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")  # families, by model_type
VALIDATION_SEED, VALIDATION_IMAGES = 13, 32


class TrainingData(Protocol):
    """Batches of images, conversations about them, and what is to be learned.

    ``pixels`` ``(batch, 3, height, width)`` and the columns of :class:`nuwa.testbed.instruction.Packed`.
    """

    def draw(self, rng: np.random.Generator, size: int) -> dict[str, Tensor]:
        """A training batch; it follows from ``rng`` alone."""

    def validation(self, seed: int, size: int) -> dict[str, Tensor] | None:
        """A fixed batch that is never taught; null where everything is."""


def build_learner(
    vlm: Adapter,
    seed: int,
    sparsity: Sparsity,
    keep_share: float,
    penalty_weight: float,
    recompute: bool = False,
) -> PrunerLearner:
    """A fresh LPM, seeded, in front of the frozen ``vlm``.

    Raises ``ValueError`` for a model of a family that cannot be taught, or whose layers see a sliding window.
    """
    family = vlm.model.config.model_type
    if family not in TAUGHT:
        raise ValueError(f"LearnPruner's module is trained for models of family {', '.join(TAUGHT)}, not {family}")
    if SLIDING in vlm.text.kinds:
        raise ValueError(
            "LearnPruner's module is trained where all layers see the whole sequence, and some of these do not"
        )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lpm = Lpm(vlm.signal_widths(vlm.model.config)["features"])
    kind = LayoutLearner if vlm.layout is None else PrunerLearner
    return kind(lpm, vlm, sparsity, keep_share, penalty_weight, recompute)


def train_pruner(
    learner: PrunerLearner,
    data: TrainingData,
    output: Path,
    checkpoints: Path,
    *,
    seed: int,
    schedule: PhaseSchedule,
    facts: Mapping[str, Any],
    log: Log,
) -> None:
    """Train ``learner.lpm`` on ``data``, from ``checkpoints`` if there are any.

    Writes the weights to ``output``, tied to the encoder's fingerprint and with ``facts`` of the training. The model is
    left as it was found.
    """
    vlm, place = learner.vlm, learner.vlm.device
    encoder = vlm.encoder_identity  # hashed once, where the weights are
    vlm.model.to(Accelerator(cpu=not torch.cuda.is_available()).device)

    def draw(rng: np.random.Generator, size: int, progress: float) -> dict[str, Tensor]:
        return data.draw(rng, size)

    try:
        train_phase(
            PHASE, learner, draw, schedule, seed=seed, checkpoint=checkpoints, log=log, evaluate=evaluator(vlm, data)
        )
    finally:
        learner.release()
        vlm.model.to(place)
    if PartialState().is_main_process:
        save_lpm(learner.lpm, output, encoder, facts)
        shutil.rmtree(checkpoints)  # a finished training has nothing to resume
    PartialState().wait_for_everyone()


def evaluator(vlm: Adapter, data: TrainingData) -> Callable[[PrunerLearner], Metrics] | None:
    """A function that says how well a learner's ranking serves answers on fixed validation images, if there are any.

    ``loss_lpm`` and ``loss_random``: answer loss with the best ``keep`` tokens by the LPM, and with as many random
    ones; ``loss_all``: with all tokens; ``argmax_share``: tokens whose keep probability exceeds one half.
    """
    drawn = data.validation(VALIDATION_SEED, VALIDATION_IMAGES)
    if drawn is None:
        return None
    batch = {name: value.to(vlm.device) for name, value in drawn.items()}

    @functools.cache
    def controls(learner: PrunerLearner) -> Metrics:
        """What does not change while the LPM learns."""
        features = learner.features(batch)
        everything = features.new_ones(features.shape[:2], dtype=torch.float32)
        noise = np.stack(
            [seeded_generator(VALIDATION_SEED, str(i)).random(len(row)) for i, row in enumerate(everything)]
        )
        scores = torch.from_numpy(noise).to(everything)
        return {
            "validation_loss_random": float(learner.answer_loss(batch, features, learner.best(scores, batch))),
            "validation_loss_all": float(learner.answer_loss(batch, features, everything)),
        }

    @torch.no_grad()
    def evaluate(learner: PrunerLearner) -> Metrics:
        features = learner.features(batch)
        logit = learner.keep_logit(features)
        return {
            "validation_loss_lpm": float(learner.answer_loss(batch, features, learner.best(logit, batch))),
            "validation_argmax_share": float(learner.kept_share((logit > 0).float(), batch)),
            **controls(learner),
        }

    return evaluate
