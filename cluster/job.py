"""The half of a submitted sweep that runs on the cluster: fetch inputs, encode and sweep, publish what came of it.

``cluster.submit`` starts it as the entry point of a Ray job. Its working directory is a copy that vanishes with the
job, so everything worth keeping lies under ``--work``, a folder that every node sees: inputs by their digests, and the
cache of features and finished units, with which a later submission continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import ray

from pipelines.settings import Settings
from pipelines.storage import Folder
from stages.entry import CACHE, EXAMPLES, FEATURES, IMAGES, KEPT, PREDICTIONS, SWEEP, TRIALS, run_stage
from stages.features import features
from stages.sweep import sweep

INPUTS = (EXAMPLES, IMAGES)
OUTPUTS = (FEATURES, TRIALS, PREDICTIONS, KEPT, SWEEP)
INPUTS_MANIFEST = "inputs.json"  # digests by file name
MANIFEST = "results.json"  # likewise; written last: what it names is whole


def digest_of(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def input_name(path: Path, digest: str) -> str:
    return f"{path.stem}-{digest[:32]}{path.suffix}"


def runs_folder(storage: str, submission: str) -> Folder:
    return Folder.at(storage, "runs", submission)


def fetch_inputs(storage: str, work: Path, submission: str) -> None:
    """Lay the inputs where stages look for them, as links into ``work`` that every node can follow."""
    digests = json.loads(runs_folder(storage, submission).read(INPUTS_MANIFEST))
    inputs = Folder.at(storage, "inputs")
    for path in INPUTS:
        name = input_name(path, digests[path.name])
        held = work / "inputs" / name
        if not held.exists() or digest_of(held) != digests[path.name]:
            inputs.fetch(name, held)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(held.resolve())


def publish_outputs(storage: str, submission: str) -> None:
    folder = runs_folder(storage, submission)
    for path in OUTPUTS:
        folder.publish(path, path.name)
    folder.write(MANIFEST, json.dumps({path.name: digest_of(path) for path in OUTPUTS}).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--storage", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--submission", required=True)
    asked = parser.parse_args()

    def job(settings: Settings) -> None:
        fetch_inputs(asked.storage, asked.work, asked.submission)
        held = (asked.work / "cache").resolve()
        held.mkdir(parents=True, exist_ok=True)
        CACHE.symlink_to(held, target_is_directory=True)
        ray.init()  # the job's own cluster and environment; the stages find it connected
        features(settings)
        sweep(settings)
        publish_outputs(asked.storage, asked.submission)

    run_stage(job)


if __name__ == "__main__":
    main()
