"""The half of a submitted sweep that runs on the cluster: fetch inputs, encode and sweep, publish what came of it.

``cluster.submit`` starts it as the entry point of a Ray job. The code is the job's working directory, a copy that
vanishes with the job. Everything else lies under ``--work``, a folder that every node sees: inputs by their digests
(``inputs``), the cache of features and finished units (``cache``), with which a later submission continues, and a
project folder for each job (``jobs``), in which paths of ``params.yaml`` mean on every node what they mean at home.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

import ray

from nuwa.errors import UserError
from pipelines.files.secrets import load_secrets
from pipelines.files.storage import Folder
from pipelines.settings import PARAMS_FILE, Settings
from pipelines.workers.joining import own_sigterm
from stages.entry import CACHE, EXAMPLES, FEATURES, IMAGES, KEPT, PREDICTIONS, SWEEP, TRIALS, run_stage
from stages.features import features
from stages.sweep import sweep

TABLES = (EXAMPLES, IMAGES)
OUTPUTS = (FEATURES, TRIALS, PREDICTIONS, KEPT, SWEEP)
INPUTS_MANIFEST = "inputs.json"  # digests by path below the project folder
MANIFEST = "results.json"  # digests by file name; written last: what it names is whole


class DamagedInput(UserError, RuntimeError):
    """An input is not what was sent."""


def digest_of(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def input_name(path: Path, digest: str) -> str:
    return f"{path.stem}-{digest[:32]}{path.suffix}"


def runs_folder(storage: str, submission: str) -> Folder:
    return Folder.at(storage, "runs", submission)


def fetch_inputs(storage: str, work: Path, submission: str, project: Path) -> None:
    """Lay the inputs below ``project`` where they were at home, as links into ``work`` that every node can follow.

    What lies in ``work`` was compared with its digest when it came, and is not read through again.
    """
    digests = json.loads(runs_folder(storage, submission).read(INPUTS_MANIFEST))
    inputs = Folder.at(storage, "inputs")
    for name, digest in digests.items():
        held = work / "inputs" / input_name(Path(name), digest)
        if not held.exists():
            _fetch_whole(inputs, held, digest)
        link = project / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(held.resolve())


def _fetch_whole(inputs: Folder, held: Path, digest: str) -> None:
    fresh = held.with_name(f".{held.name}.{os.urandom(8).hex()}")
    try:
        inputs.fetch(held.name, fresh)
        if digest_of(fresh) != digest:
            raise DamagedInput(f"{inputs.place}/{held.name} is damaged; remove it there and submit again")
        fresh.replace(held)
    finally:
        fresh.unlink(missing_ok=True)


def publish_outputs(storage: str, submission: str) -> None:
    folder = runs_folder(storage, submission)
    for path in OUTPUTS:
        folder.publish(path, path.name)
    folder.write(MANIFEST, json.dumps({path.name: digest_of(path) for path in OUTPUTS}).encode())


def enter_project(storage: str, work: Path, submission: str) -> None:
    """Make this job's project folder, which every node sees, and go there."""
    # What no URI names is a file of this machine: SQLite does not belong on a shared file system.
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{Path('mlflow.db').absolute()}")
    project = (work / "jobs" / submission).resolve()
    project.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PARAMS_FILE, project / PARAMS_FILE)
    fetch_inputs(storage, work, submission, project)

    cache = (work / CACHE).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    (project / CACHE).unlink(missing_ok=True)
    (project / CACHE).symlink_to(cache, target_is_directory=True)
    os.chdir(project)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--storage", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--submission", required=True)
    options = parser.parse_args()

    def job(settings: Settings) -> None:
        load_secrets()
        if settings.tracking.uri is not None:
            os.environ.setdefault("MLFLOW_TRACKING_URI", settings.tracking.uri)
        enter_project(options.storage, options.work, options.submission)
        with own_sigterm():
            ray.init()  # the job's own cluster and environment; the stages find it connected
        features(settings)
        sweep(settings)
        publish_outputs(options.storage, options.submission)

    # The driver at home has checked the trials; the model's folder is here once the inputs are.
    run_stage(job, needs_model=False)


if __name__ == "__main__":
    main()
