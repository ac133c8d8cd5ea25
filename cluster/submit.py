"""Submit features and sweep to a Ray cluster as a job, follow it, and bring its results back to where DVC tracks them.

Code travels as the job's working directory: what ``.rayignore`` leaves of the project folder, as it is now. Tables,
images, the model and LearnPruner's weights travel through ``--storage``, once, named by content; a model that is named
by an absolute path, which all nodes see, or by its id on the hub does not travel at all. Secrets stay where they are:
``~/.nuwa/secrets.env`` on the machines of the cluster holds what it needs. When the job is done its tables are fetched
into ``data/``, compared with their digests and committed to ``dvc.lock``, so ``dvc repro`` goes on with scores and
report.

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

from cluster.job import INPUTS_MANIFEST, MANIFEST, OUTPUTS, TABLES, digest_of, input_name, runs_folder
from cluster.origin import differences, made_of
from nuwa.errors import UserError
from pipelines.files.code_package import stage_code
from pipelines.files.secrets import DEFAULT_FILE, UnsafeSecret, is_secret, refuse_credentials
from pipelines.files.storage import Folder
from pipelines.settings import Settings
from stages.entry import planned_trials, run_stage

TRACKED_STAGES = ("features", "sweep")
ORIGIN_MANIFEST = "origin.json"  # digests of parameters, code and inputs, by name
MOST_NAMES = 5  # changes that an error lists
BROUGHT = "results are in data/ and dvc.lock; `dvc repro` scores them and makes the report"
TOKEN_FILE = Path("~/.ray/auth_token")
PASSED_ON = ("MLFLOW_TRACKING_URI", "HF_HOME", "AWS_ENDPOINT_URL", "AWS_REGION")
# What a job may need and an API would show; it comes from a file on the machines.
KEPT_HOME = ("HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")


class SubmissionFailed(UserError, RuntimeError):
    """The cluster could not be asked, or the job did not succeed."""


def choose_authentication(environment: Mapping[str, str], token_file: Path = TOKEN_FILE) -> str:
    """Ray's authentication mode: what RAY_AUTH_MODE says, else ``token``.

    Settled before Ray is imported, which otherwise asks for no token and sends none. Raises :class:`SubmissionFailed`
    where one is needed and there is none.
    """
    mode = environment.get("RAY_AUTH_MODE") or "token"
    held = (
        environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH") or token_file.expanduser().exists()
    )
    if mode == "token" and not held:
        raise SubmissionFailed(
            f"no token for the cluster: put the one it was started with into {token_file} (`ray get-auth-token` there "
            "shows it) or RAY_AUTH_TOKEN_PATH; RAY_AUTH_MODE=disabled is for a cluster on this machine's loopback alone"
        )
    return mode


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


def inputs_of(settings: Settings) -> dict[str, Path]:
    """Files a job reads beside code, by path below the project folder: tables, and model and weights that lie there.

    A model elsewhere is one that all nodes find under the same path, or on the hub.
    """
    files = {str(path): path for path in TABLES}
    folder = Path(settings.model.path)
    if folder.is_dir() and not folder.is_absolute():
        files |= {str(path): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for trial in planned_trials(settings):
        weights = getattr(trial.spec.config, "weights", None)
        if weights is not None and not Path(weights).is_absolute():
            files[str(Path(weights))] = Path(weights)
    return files


def upload_inputs(storage: str, submission: str, files: Mapping[str, Path]) -> None:
    """Bring ``files`` to the storage unless it has them, and say which ones ``submission`` reads."""
    folder, digests = Folder.at(storage, "inputs"), {}
    held = folder.sizes()
    for relative, path in files.items():
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; `dvc repro prepare` makes it")
        digests[relative] = digest_of(path)
        name = input_name(path, digests[relative])
        if held.get(name) != path.stat().st_size:
            folder.publish(path, name)
    run = runs_folder(storage, submission)
    run.write(ORIGIN_MANIFEST, json.dumps(made_of(TRACKED_STAGES)).encode())
    run.write(INPUTS_MANIFEST, json.dumps(digests).encode())


def refuse_changes(storage: str, submission: str) -> None:
    """Raises :class:`SubmissionFailed` where parameters, code or inputs are not those that the job was made of."""
    folder = runs_folder(storage, submission)
    try:
        before = json.loads(folder.read(ORIGIN_MANIFEST))
    except FileNotFoundError:
        raise SubmissionFailed(
            f"{folder.place} has no {ORIGIN_MANIFEST}, so what job {submission} was made of is not known; submit again, "
            "finished units are kept"
        ) from None
    changed = differences(before, made_of(TRACKED_STAGES))
    if changed:
        more = f" and {len(changed) - MOST_NAMES} more" if len(changed) > MOST_NAMES else ""
        raise SubmissionFailed(
            f"changed since job {submission} was submitted: {', '.join(changed[:MOST_NAMES])}{more}; its results would be "
            "recorded as of what is here now: put that back and attach again, or submit again, finished units are kept"
        )


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables a job gets, none of them secret; what is kept at home is named once, with what to do."""
    passed = {name: environment[name] for name in PASSED_ON if name in environment}
    kept = [name for name in KEPT_HOME if environment.get(name)]
    kept += [name for name, value in passed.items() if is_secret(name, value)]
    if kept:
        print(
            f"not sent, because the cluster's job list would show it: {', '.join(kept)}; what the job needs of it "
            f"belongs into {DEFAULT_FILE} (mode 600) of the cluster's machines",
            file=sys.stderr,
        )
    return {name: value for name, value in passed.items() if name not in kept}


def submit(client: Any, storage: str, work: str, files: Mapping[str, Path]) -> str:
    """Start the job; returns its id."""
    submission = f"nuwa-{uuid.uuid4().hex[:8]}"
    upload_inputs(storage, submission, files)
    entry = ["python", "-m", "cluster.job", "--storage", storage, "--work", work, "--submission", submission]
    with tempfile.TemporaryDirectory() as folder:
        size = stage_code(Path(), Path(folder))
        print(f"code: {size / 1e6:.1f} MB", flush=True)
        client.submit_job(
            entrypoint=shlex.join(entry),
            runtime_env={"working_dir": folder, "env_vars": passed_on(os.environ)},
            submission_id=submission,
        )
    return submission


def pack(storage: str, submission: str, files: Mapping[str, Path]) -> None:
    """Lay inputs and ``code.zip``, a working directory for a runtime environment, in the storage."""
    upload_inputs(storage, submission, files)
    with tempfile.TemporaryDirectory() as folder:
        stage_code(Path(), Path(folder) / "code")
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
    """Fetch the job's tables into ``data/`` and record them in ``dvc.lock``, as results of what the job was made of."""
    refuse_changes(storage, submission)
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
    options = parser.parse_args()
    try:
        refuse_credentials("--storage", [options.storage])
    except UnsafeSecret as error:
        parser.error(str(error))
    starts = not (options.attach or options.pack or options.collect)
    if starts and options.work is None and "://" in options.storage:
        parser.error("--work is needed: --storage is a URI, and features and units need a folder that every node sees")

    def run(settings: Settings) -> None:
        if options.pack:
            pack(options.storage, options.pack, inputs_of(settings))
            print(f"code and inputs are in {runs_folder(options.storage, options.pack).place}")
            return
        if options.collect:
            bring_back(options.storage, options.collect)
            print(BROUGHT)
            return
        client = connect(options.address)
        submission = options.attach

        if submission is None:
            work = options.work or str(Path(options.storage).resolve() / "work")
            submission = submit(client, options.storage, work, inputs_of(settings))
            again = f"cluster/submit --address {options.address} --storage {options.storage} --attach {submission}"
            print(f"submitted {submission}; come back to it with\n  {again}", flush=True)
        elif not options.no_wait:
            refuse_changes(options.storage, submission)  # before a job is followed for hours
        if options.no_wait:
            return
        follow(client, submission)
        bring_back(options.storage, submission)
        print(BROUGHT)

    try:
        run_stage(run)
    except SubmissionFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
