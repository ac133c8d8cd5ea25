"""``pruner``: train LearnPruner's module on the model of ``model.path`` (two minutes on two CPU cores; resumes).

For any other model weights are trained elsewhere and named in ``parameters.weights`` of a grid; the stage leaves all as
it is. Runs within ``dvc repro`` whenever the model, the recipe or the code of the training has changed; the weights are in
git, so a fresh clone has them. ``make pruner`` trains them anyway. On several GPUs:
``accelerate launch --multi_gpu -m stages.pruner``.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

from accelerate import PartialState

from nuwa.pruner.train import build_learner, train_pruner
from nuwa.source import code_fingerprint
from nuwa.stage1.learnpruner import DEFAULT_WEIGHTS
from nuwa.training import Log, PhaseSchedule
from nuwa.vlm import LlavaAdapter
from pipelines.settings import Settings
from pipelines.tracking import training_log
from stages.entry import CACHE, run_stage

# The code that decides the weights.
TRAINING = ("grid", "pruner", "selection", "signals", "stage1/learnpruner", "testbed", "training", "vlm")
WARMUP, DECAY_SHARE = 10, 0.5
LOG_EVERY, EVALUATE_EVERY, CHECKPOINT_EVERY = 10, 30, 30


def pruner(settings: Settings) -> None:
    if settings.model.prompt_style != "testbed":
        print(f"the recipe teaches with the testbed's scenes: nothing is trained for {settings.model.path}")
        return
    recipe = settings.pruner
    vlm = LlavaAdapter.load(settings.model.path)
    facts = {"parameters": recipe.model_dump(), "model": vlm.fingerprint()}
    content = json.dumps([facts, code_fingerprint(TRAINING)], sort_keys=True)
    identity = hashlib.sha256(content.encode()).hexdigest()[:16]
    with ExitStack() as stack:
        log = (lambda step, metrics: None) if not PartialState().is_main_process else _mlflow(stack, settings, identity)

        def show(step: int, metrics: dict[str, float]) -> None:
            print(step, json.dumps({name: round(value, 4) for name, value in metrics.items()}), flush=True)
            log(step, metrics)

        train_pruner(
            build_learner(vlm, recipe.seed, recipe.sparsity, recipe.keep_share, recipe.penalty_weight),
            Path(DEFAULT_WEIGHTS),
            CACHE / "training" / identity,
            seed=recipe.seed,
            images=recipe.images,
            share=recipe.share,
            schedule=PhaseSchedule(
                recipe.steps,
                recipe.batch_size,
                recipe.learning_rate,
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


def _mlflow(stack: ExitStack, settings: Settings, identity: str) -> Log:
    tracking, params = settings.tracking, settings.pruner.model_dump()
    run = training_log(
        tracking.resolved_uri, tracking.experiment, "pruner training", training_id=identity, params=params
    )
    return stack.enter_context(run)


if __name__ == "__main__":
    run_stage(pruner)
