"""``testbed``: train the testbed's model from nothing (hours on a CPU, minutes on a GPU; resumes where it stopped).

The stage is frozen in ``dvc.yaml``, because the trained model is in git; ``make testbed`` runs it. On several GPUs:
``accelerate launch --multi_gpu -m stages.testbed``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nuwa.testbed.train import LANGUAGE_EVALUATE_EVERY, LANGUAGE_WARMUP, train_testbed
from nuwa.testbed.training import PhaseSchedule
from pipelines.settings import Settings
from pipelines.tracking import training_log
from stages.entry import CACHE, run_stage


def testbed(settings: Settings) -> None:
    recipe = settings.testbed
    identity = hashlib.sha256(json.dumps(recipe.model_dump(), sort_keys=True).encode()).hexdigest()[:16]
    tracking = settings.tracking
    with training_log(
        tracking.resolved_uri, tracking.experiment, "testbed training", training_id=identity, params=recipe.model_dump()
    ) as log:

        def show(step: int, metrics: dict[str, float]) -> None:
            print(step, json.dumps({name: round(value, 4) for name, value in metrics.items()}), flush=True)
            log(step, metrics)

        train_testbed(
            Path(settings.model.path),
            CACHE / "training" / identity,
            seed=recipe.seed,
            vision=PhaseSchedule(**recipe.vision.model_dump()),
            language=PhaseSchedule(
                **recipe.language.model_dump(), warmup=LANGUAGE_WARMUP, evaluate_every=LANGUAGE_EVALUATE_EVERY
            ),
            compile_layers=recipe.compile,
            log=show,
        )


if __name__ == "__main__":
    run_stage(testbed)
