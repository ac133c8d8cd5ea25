"""Submit features and sweep to a Ray cluster as a job, follow it, and bring its results back to where DVC tracks them.

Code travels as the job's working directory: the files git tracks, as they are now. Tables and images travel through
``--storage``, once, named by content. When the job is done its tables are fetched into ``data/``, compared with their
digests and committed to ``dvc.lock``, so ``dvc repro`` goes on with scores and report.

    cluster/submit --address http://127.0.0.1:8265 --storage s3://bucket/nuwa --work /shared/nuwa
    cluster/submit --address http://127.0.0.1:8265 --storage s3://bucket/nuwa --attach nuwa-1f2e3d4c

Where something else starts the job (cluster/kuberay.yaml), ``--pack ID`` lays code and inputs in the storage and
``--collect ID`` brings the results back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.job import INPUTS, INPUTS_MANIFEST, MANIFEST, OUTPUTS, digest_of, input_name, runs_folder
from pipelines.settings import Settings
from pipelines.storage import Folder
from stages.entry import run_stage

TRACKED_STAGES = ("features", "sweep")
BROUGHT = "results are in data/ and dvc.lock; `dvc repro` scores them and makes the report"
TOKEN_FILE = Path("~/.ray/auth_token")
PASSED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "HF_HOME", "HF_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION")


class SubmissionFailed(RuntimeError):
    """The cluster could not be asked, or the job did not succeed."""


def choose_authentication(environment: Mapping[str, str], token_file: Path = TOKEN_FILE) -> str:
    """Ray's authentication mode: what RAY_AUTH_MODE says, else ``token`` where there is one, else ``disabled``.

    Ray 2.59 and newer ask for a token; a client that does not know the cluster's mode fails with an error about
    headers, so the mode is settled before Ray is imported.
    """
    if environment.get("RAY_AUTH_MODE"):
        return environment["RAY_AUTH_MODE"]
    held = (
        environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH") or token_file.expanduser().exists()
    )
    return "token" if held else "disabled"


def connect(address: str) -> Any:
    """A client of the cluster's job server; raises :class:`SubmissionFailed` with what to do."""
    os.environ["RAY_AUTH_MODE"] = choose_authentication(os.environ)
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray raises RuntimeError, ConnectionError and its own kinds
        raise SubmissionFailed(
            f"{address}: {' '.join(str(error).split())}; see that `ray dashboard` or a port forward leads there, and "
            f"that RAY_AUTH_MODE (now {os.environ['RAY_AUTH_MODE']}) and the token are the cluster's "
            "(`ray get-auth-token` there shows it, RAY_AUTH_TOKEN here holds it)"
        ) from None


def stage_code(target: Path, model: Path) -> None:
    """Copy the files git tracks, as they are on disk, and the model's folder where git does not track it."""
    listed = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if Path(name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, target / name)
    if model.is_dir() and not model.is_absolute():
        shutil.copytree(model, target / model, dirs_exist_ok=True)
    # Ray leaves out what .gitignore and .rayignore name; this copy holds what the job needs and nothing else.
    for name in (".gitignore", ".rayignore"):
        (target / name).unlink(missing_ok=True)


def upload_inputs(storage: str, submission: str) -> None:
    """Bring the prepared tables to the storage unless it has them, and say which ones ``submission`` reads."""
    folder, digests = Folder.at(storage, "inputs"), {}
    held = folder.sizes()
    for path in INPUTS:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; `dvc repro prepare` makes it")
        digests[path.name] = digest_of(path)
        name = input_name(path, digests[path.name])
        if held.get(name) != path.stat().st_size:
            folder.publish(path, name)
    runs_folder(storage, submission).write(INPUTS_MANIFEST, json.dumps(digests).encode())


def submit(client: Any, storage: str, work: str, model: Path) -> str:
    """Start the job; returns its id."""
    submission = f"nuwa-{uuid.uuid4().hex[:8]}"
    upload_inputs(storage, submission)
    entry = ["python", "-m", "cluster.job", "--storage", storage, "--work", work, "--submission", submission]
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        stage_code(Path(folder), model)
        client.submit_job(
            entrypoint=shlex.join(entry),
            runtime_env={"working_dir": folder, "env_vars": passed},
            submission_id=submission,
        )
    return submission


def pack(storage: str, submission: str, model: Path) -> None:
    """Lay inputs and ``code.zip``, a working directory for a runtime environment, in the storage."""
    upload_inputs(storage, submission)
    with tempfile.TemporaryDirectory() as folder:
        stage_code(Path(folder) / "code", model)
        # Ray takes the one folder inside an archive for the working directory.
        archive = shutil.make_archive(f"{folder}/packed", "zip", folder, "code")
        runs_folder(storage, submission).publish(Path(archive), "code.zip")


def follow(client: Any, submission: str) -> None:
    """Print the job's log until it ends; raises :class:`SubmissionFailed` unless it succeeded."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(submission):
            print(lines, end="", flush=True)

    asyncio.run(tail())
    info = client.get_job_info(submission)
    if str(info.status) != "SUCCEEDED":
        raise SubmissionFailed(
            f"job {submission} ended as {info.status}: {info.message}; what it finished is kept in the work folder, "
            "and submitting again does the rest"
        )


def bring_back(storage: str, submission: str) -> None:
    """Fetch the job's tables into ``data/`` and record them in ``dvc.lock``."""
    folder = runs_folder(storage, submission)
    try:
        digests = json.loads(folder.read(MANIFEST))
    except FileNotFoundError:
        raise SubmissionFailed(f"{folder.place} has no {MANIFEST}: the job did not finish publishing") from None
    with tempfile.TemporaryDirectory(dir=OUTPUTS[0].parent) as name:
        for path in OUTPUTS:
            fresh = Path(name) / path.name
            folder.fetch(path.name, fresh)
            if digest_of(fresh) != digests[path.name]:
                raise SubmissionFailed(f"{folder.place}/{path.name} is damaged; fetch again with --attach {submission}")
        for path in OUTPUTS:  # all are whole, so all change together
            path.unlink(missing_ok=True)  # may be a read-only link into DVC's cache
            (Path(name) / path.name).replace(path)
    subprocess.run([sys.executable, "-m", "dvc", "commit", "--quiet", "--force", *TRACKED_STAGES], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="the cluster's job server (its dashboard)")
    parser.add_argument("--storage", required=True, help="URI or shared folder for inputs and results")
    parser.add_argument("--work", help="folder that every node sees, for the cache; default: STORAGE/work of a folder")
    parser.add_argument("--attach", metavar="ID", help="follow a job submitted before and bring its results back")
    parser.add_argument("--no-wait", action="store_true", help="submit and leave; --attach later")
    parser.add_argument("--pack", metavar="ID", help="lay code and inputs in the storage for a job started elsewhere")
    parser.add_argument("--collect", metavar="ID", help="bring back what a job started elsewhere has published")
    asked = parser.parse_args()
    starts = not (asked.attach or asked.pack or asked.collect)
    if starts and asked.work is None and "://" in asked.storage:
        parser.error("--work is needed: --storage is a URI, and features and units need a folder that every node sees")

    def run(settings: Settings) -> None:
        if asked.pack:
            pack(asked.storage, asked.pack, Path(settings.model.path))
            print(f"code and inputs are in {runs_folder(asked.storage, asked.pack).place}")
            return
        if asked.collect:
            bring_back(asked.storage, asked.collect)
            print(BROUGHT)
            return
        client = connect(asked.address)
        submission = asked.attach
        if submission is None:
            work = asked.work or str(Path(asked.storage).resolve() / "work")
            submission = submit(client, asked.storage, work, Path(settings.model.path))
            again = f"cluster/submit --address {asked.address} --storage {asked.storage} --attach {submission}"
            print(f"submitted {submission}; come back to it with\n  {again}", flush=True)
        if asked.no_wait:
            return
        follow(client, submission)
        bring_back(asked.storage, submission)
        print(BROUGHT)

    try:
        run_stage(run)
    except SubmissionFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
