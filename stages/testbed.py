"""``testbed``: train the testbed's model from nothing (hours on a CPU, minutes on a GPU; resumes where it stopped).

The stage is frozen in ``dvc.yaml``, because the trained model is in git; ``make testbed`` runs it. On several GPUs:
``accelerate launch --multi_gpu -m stages.testbed``.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

from accelerate import PartialState

from nuwa.source import code_fingerprint
from nuwa.testbed.train import LANGUAGE_EVALUATE_EVERY, LANGUAGE_WARMUP, train_testbed
from nuwa.training import Log, PhaseSchedule
from pipelines.settings import Settings
from pipelines.tracking.training import training_log
from stages.entry import CACHE, run_stage

TESTBED_MODEL = Path("models/testbed")


def testbed(settings: Settings) -> None:
    recipe = settings.testbed
    content = json.dumps([recipe.model_dump(), code_fingerprint(("testbed", "training"))], sort_keys=True)
    identity = hashlib.sha256(content.encode()).hexdigest()[:16]
    with ExitStack() as stack:
        log = (lambda step, metrics: None) if not PartialState().is_main_process else _mlflow(stack, settings, identity)

        def show(step: int, metrics: dict[str, float]) -> None:
            print(step, json.dumps({name: round(value, 4) for name, value in metrics.items()}), flush=True)
            log(step, metrics)

        train_testbed(
            TESTBED_MODEL,
            CACHE / "training" / identity,
            seed=recipe.seed,
            vision=PhaseSchedule(**recipe.vision.model_dump()),
            language=PhaseSchedule(
                **recipe.language.model_dump(), warmup=LANGUAGE_WARMUP, evaluate_every=LANGUAGE_EVALUATE_EVERY
            ),
            compile_layers=recipe.compile,
            log=show,
        )


def _mlflow(stack: ExitStack, settings: Settings, identity: str) -> Log:
    tracking, params = settings.tracking, settings.testbed.model_dump()
    run = training_log(
        tracking.resolved_uri, tracking.experiment, "testbed training", training_id=identity, params=params
    )
    return stack.enter_context(run)


if __name__ == "__main__":
    run_stage(testbed, needs_model=False)
