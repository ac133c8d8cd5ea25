"""``make rehearsal``: ``experiments/nuwa_table7`` on a cluster where things go wrong, and its report beside a quiet run's.

The checkpoint has LLaVA-1.5's class, configuration and width, two layers and drawn weights of 1.4 GB; tables are of the
published schemas on made photographs. Features and results lie on S3, MLflow on PostgreSQL; the cluster begins with a
head alone. On the way two machines are taken away, one worker falls sick and one hangs. Then the report has to be that of
a quiet run on this machine, byte for byte.

What is made once (checkpoint, tables, the quiet run) stays in ``--folder``, so the same command goes on after an
interruption; the cluster's half begins anew. ``--small``: the same on a model of a few MB.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from pipelines.presets import compose
from rehearsal.checkpoint import make_checkpoint
from rehearsal.project import PLUGINS, ROOT, check_out, run
from rehearsal.servers import (
    BIN,
    Servers,
    free_port,
    growing_cluster,
    lacking_for_postgres,
    listens,
    mlflow_on_postgres,
)
from rehearsal.tables import make_tables

EXPERIMENT = ROOT / "experiments" / "nuwa_table7.yaml"
FAULTS = ("1.preempt.2", "2.sick.3", "3.preempt.5", "4.hang.6")
SILENCE_S = 120
QUIET_WORKERS = 2  # how many there are changes nothing; each has a core
DEADLINE_S = 3600  # of one command, for what hangs
CODE_BYTES = 5e6
KEYS = {"AWS_ACCESS_KEY_ID": "rehearsal", "AWS_SECRET_ACCESS_KEY": "rehearsal", "AWS_EC2_METADATA_DISABLED": "true"}


def parameters(model: Path, tables: Path, images: int, **places: Any) -> dict[str, Any]:
    """The experiment in float32 on a few images; ``places``: sections → keys, where the runs differ."""
    params: dict[str, Any] = yaml.safe_load(compose((ROOT / "params.yaml").read_text(), EXPERIMENT.read_text()))
    params["model"] |= {"path": str(model), "dtype": "float32"}
    params["prepare"]["tables"] = {
        name: str(tables / Path(place).relative_to("tables")) for name, place in params["prepare"]["tables"].items()
    }
    params["features"] |= {"dtype": "float32", "shard_images": 2, "batch_size": 2}
    params["cluster"] |= {"workers": 1, "cpus": 1, "gpus": 0, "silence": SILENCE_S}
    params["sweep"] |= {"images": images, "unit_images": 1}
    params["evaluate"] |= {"resamples": 200}
    for section, values in places.items():
        params[section] |= values
    return params


def score(project: Path, **environment: str) -> None:
    for stage in ("evaluate", "report"):
        run(project, f"stages.{stage}", deadline_s=DEADLINE_S, **environment)


def quiet_run(folder: Path, params: dict[str, Any]) -> Path:
    """The project whose report stands for what has to come out; what it has finished on the same parameters is kept."""
    project = folder / "quiet"
    held = project / "params.yaml"
    if not held.exists() or yaml.safe_load(held.read_text()) != {**params, **PLUGINS}:
        shutil.rmtree(project, ignore_errors=True)
    check_out(project, params)
    for stage in ("inputs", "prepare", "features", "sweep"):
        run(project, f"stages.{stage}", deadline_s=DEADLINE_S)
    score(project)
    return project


def bucket(servers: Servers) -> str:
    """The URI of a new bucket, with a place for a name: ``{}``."""
    port = free_port()
    server = servers.start("s3", [BIN / "moto_server", "-H", "127.0.0.1", "-p", port])
    servers.expect("S3", lambda: listens("127.0.0.1", port), server)
    servers.wait()
    where = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
    fs.S3FileSystem(allow_bucket_creation=True, **where).create_dir("rehearsal")
    return f"s3://rehearsal/{{}}?{'&'.join(f'{key}={value}' for key, value in where.items())}"


def troubled_run(folder: Path, servers: Servers, params: dict[str, Any], workers: int) -> tuple[Path, str]:
    """The project that submitted its sweep to the cluster, and what the submission said."""
    place = bucket(servers)
    params["features"]["store"], params["sweep"]["store"] = place.format("features"), place.format("results")
    params["cluster"]["workers"] = workers
    project = folder / "day"
    for stale in (project, folder / "work"):
        shutil.rmtree(stale, ignore_errors=True)
    check_out(project, params)

    control = servers.folder / "control"
    control.mkdir()
    for fault in FAULTS:
        (control / fault).touch()
    secrets = servers.folder / "secrets.env"
    secrets.write_text("".join(f"{name}={value}\n" for name, value in KEYS.items()))
    secrets.chmod(0o600)

    # At home the keys are in the environment; nodes have them from their file.
    tracking = {} if lacking_for_postgres() else {"MLFLOW_TRACKING_URI": mlflow_on_postgres(servers)}
    if not tracking:
        print("PostgreSQL is not installed: MLflow keeps a file")
    home = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(servers.folder / "token"), **tracking}
    for name in KEYS:
        os.environ.pop(name, None)
    address = growing_cluster(servers, workers, NUWA_REHEARSAL=str(control), NUWA_SECRETS=str(secrets))
    servers.wait()
    os.environ |= KEYS

    for stage in ("inputs", "prepare"):
        run(project, f"stages.{stage}", deadline_s=DEADLINE_S)
    sent = ["--address", address, "--storage", place.format("runs"), "--work", folder / "work"]
    said = run(project, "cluster.submit", *sent, deadline_s=DEADLINE_S, **home)
    score(project, **tracking)
    return project, said


def differing(one: Path, other: Path) -> list[str]:
    """Files of either folder that are not the same in both."""
    files = {path.relative_to(top) for top in (one, other) for path in top.rglob("*") if path.is_file()}
    return sorted(
        str(path)
        for path in files
        if not ((one / path).exists() and (other / path).exists())
        or (one / path).read_bytes() != (other / path).read_bytes()
    )


def judge(quiet: Path, day: Path, control: Path, said: str) -> list[str]:
    """Print the figures; returns what is not as it has to be."""
    wrong = []
    left = sorted(path.name for path in control.glob("*.*.*"))
    if left:
        wrong.append(f"the sweep ended before these befell it: {', '.join(left)}; it needs more units")
    lines = [line.split() for line in (control / "units.log").read_text().splitlines()]
    begun = Counter(unit for what, unit, *_ in lines if what == "begin")
    repeated, hurt = begun.total() - len(begun), len(FAULTS) - len(left)
    print(f"units: {len(begun)}, repeated: {repeated} for {hurt} faults (at most 1 each)")
    if repeated > hurt:
        wrong.append(f"{repeated} units were repeated for {hurt} faults")

    megabytes = float(re.search(r"^code: ([\d.]+) MB$", said, re.MULTILINE)[1])  # type: ignore[index]  (a line that submit always says)
    print(f"code sent to the cluster: {megabytes} MB (at most {CODE_BYTES / 1e6:g})")
    if megabytes * 1e6 > CODE_BYTES:
        wrong.append(f"{megabytes} MB of code were sent")
    tables = [name for name in ("trials", "predictions", "kept", "scores", "comparisons", "groups")
              if (quiet / f"data/{name}.parquet").read_bytes() != (day / f"data/{name}.parquet").read_bytes()]  # fmt: skip
    pages = differing(quiet / "report", day / "report")
    print(f"report beside the quiet run's: {'differs in ' + ', '.join(pages) if pages else 'the same bytes'}")
    print(f"tables beside the quiet run's: {'differ: ' + ', '.join(tables) if tables else 'the same bytes'}")
    return wrong + [f"not as in the quiet run: {name}" for name in (*pages, *tables)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rehearsal", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "cache" / "rehearsal", help="what is made stays here")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a model of a few MB")
    options = parser.parse_args()
    folder = options.folder.resolve() / ("small" if options.small else "whole")
    began = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    size = make_checkpoint(folder / "llava-1.5", small=options.small)
    make_tables(folder / f"tables-{options.images}", options.images)
    tell(f"checkpoint of {size / 1e9:.2f} GB and tables are there")
    asked = folder / "llava-1.5", folder / f"tables-{options.images}", options.images
    quiet = quiet_run(folder, parameters(*asked, cluster={"workers": QUIET_WORKERS}))
    tell("the quiet run is there")

    with Servers() as servers:
        try:
            day, said = troubled_run(folder, servers, parameters(*asked), options.workers)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            shutil.copytree(servers.folder, folder / "logs", dirs_exist_ok=True, ignore=_but_logs)
            sys.exit(f"error: {error}\nlogs of the servers are in {folder / 'logs'}")
        tell("the troubled run is there")
        wrong = judge(quiet, day, servers.folder / "control", said)
    tell("passed" if not wrong else "failed")
    sys.exit("\n".join(f"error: {line}" for line in wrong) or None)


def _but_logs(folder: str, names: list[str]) -> set[str]:
    """What is no log of a server itself."""
    return {name for name in names if not name.endswith((".log", "control"))}


if __name__ == "__main__":
    main()
