"""``testbed``: train the testbed's model from nothing (hours on a CPU, minutes on a GPU; resumes where it stopped).

The stage is frozen in ``dvc.yaml``, because the trained model is in git; ``make testbed`` runs it. On several GPUs:
``accelerate launch --multi_gpu -m stages.testbed``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from accelerate import PartialState

from nuwa.source import code_fingerprint
from nuwa.testbed.train import LANGUAGE_EVALUATE_EVERY, LANGUAGE_WARMUP, train_testbed
from nuwa.training import PhaseSchedule
from pipelines.settings import Settings
from pipelines.tracking.training import shown_training
from stages.entry import CACHE, run_stage

TESTBED_MODEL = Path("models/testbed")


def testbed(settings: Settings) -> None:
    recipe = settings.testbed
    content = json.dumps([recipe.model_dump(), code_fingerprint(("testbed", "training"))], sort_keys=True)
    identity = hashlib.sha256(content.encode()).hexdigest()[:16]

    tracking = settings.tracking
    with shown_training(
        tracking.resolved_uri,
        tracking.experiment,
        "testbed training",
        logged=PartialState().is_main_process,
        training_id=identity,
        params=recipe.model_dump(),
    ) as show:
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


if __name__ == "__main__":
    run_stage(testbed, needs_model=False)
