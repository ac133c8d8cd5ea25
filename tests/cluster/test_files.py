"""The files of cluster/ against their own validators, and what no validator knows against this repository."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.files.secrets import is_secret
from pipelines.workers.joining import NO_PAGES

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ["aws", "gcp", "onprem"]


def load(name: str) -> dict:
    return yaml.safe_load((CLUSTER / name).read_text())


def pinned(package: str) -> str:
    tested = "".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-test.txt"))
    return re.search(rf"^{re.escape(package)}==(\S+)$", tested, re.MULTILINE)[1]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_own_schema_takes_the_launcher_files(name):
    prepared = prepare_config(load(f"{name}.yaml"))
    validate_config(prepared)
    assert prepared["max_workers"] == (2 if name == "onprem" else 8)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_validator_would_notice(name):
    import jsonschema

    wrong = load(f"{name}.yaml") | {"workers": 3}
    with pytest.raises(jsonschema.ValidationError, match="workers"):
        validate_config(prepare_config(wrong))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_ship_files_that_exist_and_keep_the_job_server_on_loopback(name):
    config = load(f"{name}.yaml")
    for source in config["file_mounts"].values():
        assert source.startswith("~") or (ROOT / source).exists()
    (start,) = config["head_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in start
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in command
        assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0
    for command in config["setup_commands"]:
        script = re.sub(r"<[^>]*>", "placeholder", command)
        assert subprocess.run(["bash", "-n", "-c", script], capture_output=True).returncode == 0


def test_the_rayjob_is_what_kuberay_reads():
    """Field names and values as in KubeRay's RayJob reference; its CRD is on no package index."""
    job = load("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= {
        *("submissionMode", "backoffLimit", "entrypoint", "runtimeEnvYAML", "shutdownAfterJobFinishes"),
        *("ttlSecondsAfterFinished", "activeDeadlineSeconds", "submitterPodTemplate", "rayClusterSpec"),
    }
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert set(environment) == {"working_dir", "env_vars"}
    assert not [name for name, value in environment["env_vars"].items() if is_secret(name, value)]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == pinned("ray[default]")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in mounts["/shared"]
        (file,) = [variable["value"] for variable in container["env"] if variable["name"] == "NUWA_SECRETS"]
        assert mounts[str(Path(file).parent)]["secret"]["defaultMode"] == 0o400  # what is read refuses a looser one
        assert container["resources"]["requests"] == container["resources"]["limits"]
    for worker in cluster["workerGroupSpecs"]:
        assert 0 <= worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


def test_the_rayjob_runs_the_job_module_with_arguments_it_takes():
    entrypoint = load("kuberay.yaml")["spec"]["entrypoint"].split()
    assert entrypoint[:3] == ["python", "-m", "cluster.job"]
    known = set(re.findall(r'add_argument\("(--\w+)"', (CLUSTER / "job.py").read_text()))
    assert {word for word in entrypoint if word.startswith("--")} == known


@pytest.mark.parametrize("script", ["slurm.sh", "submit"])
def test_shell_scripts_pass_shellcheck(script):
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "--exclude=SC1091", CLUSTER / script],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_slurm_starts_one_ray_task_a_node_and_runs_the_pipeline():
    """What sbatch and srun are given, and that Ray's command line takes the rest."""
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    text = (CLUSTER / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    joined = text.replace("\\\n", " ")
    (command,) = re.findall(r"ray symmetric-run (.*) -- env", joined)
    arguments = re.sub(r'"\$\w+"', "1", command).split()
    assert "--num-cpus" in curate_and_validate_ray_start_args(arguments)


@pytest.fixture
def allocation(tmp_path):
    """A Slurm allocation whose scontrol and srun note what they were given; srun waits where ``HOLD`` is set."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    hold = (
        'if [ -n "${HOLD-}" ]; then trap "echo step ended; exit 0" TERM; echo started; while :; do sleep 0.05; done; fi'
    )
    for name, body in {
        "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "scontrol $*"; fi',
        "srun": 'printf "%s\\n" "${RAY_ADDRESS-unset}" "$RAY_AUTH_MODE" "${RAY_AUTH_TOKEN-unset}" '
        f'"$(stat -c %a "$RAY_AUTH_TOKEN_PATH")" "$(wc -c <"$RAY_AUTH_TOKEN_PATH")" "$@"\n{hold}',
    }.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
    return variables | {"SLURM_JOB_ID": "4242", "SLURM_CPUS_PER_TASK": "32", "PATH": f"{bin_folder}:/usr/bin:/bin"}


def test_slurm_script_runs_from_allocation_to_pipeline(allocation, tmp_path):
    """The script itself, with scontrol and srun that say what they were given."""
    done = subprocess.run(["bash", CLUSTER / "slurm.sh"], env=allocation, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    address, mode, in_environment, permissions, token_length, *command = done.stdout.splitlines()
    assert (address, mode) == ("unset", "token")  # Ray's own commands are not to see the address, the pipeline is
    assert (in_environment, permissions) == ("unset", "600")
    assert int(token_length) > 40
    assert command[-4:] == ["env", "RAY_ADDRESS=node7:24242", "dvc", "repro"]
    assert command[command.index("--min-nodes") + 1] == "2"
    assert command[command.index("--address") + 1] == "node7:24242"
    assert not list(tmp_path.glob(".ray-token*")), "the token goes with the job"


@pytest.mark.parametrize(("what", "code", "requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False)])
def test_a_slurm_job_that_must_go_ends_its_step_first(allocation, tmp_path, what, code, requeued):
    """USR1: its time is nearly up, so it queues itself again. TERM: Slurm, which preempts or cancels, decides."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (CLUSTER / "slurm.sh").read_text(), re.MULTILINE))
    assert options["signal"] == "B:USR1@300" and "requeue" in options and options["open-mode"] == "append"
    job = subprocess.Popen(
        ["bash", CLUSTER / "slurm.sh"], env=allocation | {"HOLD": "1"}, stdout=subprocess.PIPE, text=True
    )
    lines = iter(job.stdout.readline, "")
    assert "started\n" in lines
    job.send_signal(what)
    rest = job.stdout.read().splitlines()
    assert job.wait(30) == code
    assert rest == ["step ended"] + ["scontrol requeue 4242"] * requeued
    assert not list(tmp_path.glob(".ray-token*"))


GPU_GB = {"g6e.2xlarge": 48, "g2-standard-8": 24}  # of the vendors' pages
LARGEST_MODEL_GB = 15.5  # LLaVA-NeXT and Qwen2.5-VL 7B in 16 bits: 7.1 and 8.3 * 10^9 numbers less what is tied
BESIDE_IT_GB = 6  # activations, caches and the context of CUDA


@pytest.mark.parametrize(("name", "key"), [("aws", "InstanceType"), ("gcp", "machineType")])
def test_a_launchers_gpu_holds_what_the_presets_put_on_it(name, key):
    node = load(f"{name}.yaml")["available_node_types"]["gpu"]
    presets = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "experiments").glob("*.yaml"))]
    clusters = [preset["cluster"] for preset in presets if "cluster" in preset]
    assert clusters
    for cluster in clusters:
        workers_a_gpu = 1 / cluster["gpus"]
        assert workers_a_gpu * (LARGEST_MODEL_GB + BESIDE_IT_GB) <= GPU_GB[node["node_config"][key]]
        assert workers_a_gpu * cluster["cpus"] <= node["resources"]["CPU"]


COMMANDS = [*CLUSTER.glob("*.yaml"), CLUSTER / "slurm.sh", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


def test_every_launcher_and_documented_command_starts_ray_with_a_token():
    starts = [
        (path.name, line)
        for path in COMMANDS
        for line in path.read_text().splitlines()
        if re.search(r"ray start (--head|--address)", line)
    ]
    assert len(starts) >= 8
    for name, line in starts:
        assert "RAY_AUTH_MODE=token" in line, (name, line)
        if "--head" in line:
            assert re.search(r"--dashboard-host[= ]127\.0\.0\.1", line), (name, line)
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "slurm.sh").read_text()


def test_no_launcher_serves_rays_pages_of_figures():
    """They ask for no token. A node has one page, the head two more."""
    on_a_node, *on_the_head = (f"{name}={value}" for name, value in NO_PAGES.items())
    for name in LAUNCHERS:
        (head,), (node,) = (load(f"{name}.yaml")[f"{kind}_start_ray_commands"] for kind in ("head", "worker"))
        for command, closed in ((head, [on_a_node, *on_the_head]), (node, [on_a_node])):
            assert set(closed) <= set(command.partition(";")[0].removeprefix("export ").split())

    cluster = load("kuberay.yaml")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        given = {f"{variable['name']}={variable['value']}" for variable in container["env"]}
        assert {on_a_node, *(on_the_head if group is cluster["headGroupSpec"] else ())} <= given
    (autoscaler,) = cluster["autoscalerOptions"]["env"]
    assert f"{autoscaler['name']}={autoscaler['value']}" in on_the_head
    for path in (CLUSTER / "slurm.sh", ROOT / "docs" / "cluster.md"):
        assert re.search(rf"^(\$ )?export {' '.join([on_a_node, *on_the_head])}\b", path.read_text(), re.MULTILINE)


def test_compose_is_what_docker_compose_reads():
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    command = [docker, "compose", "-f", CLUSTER / "mlflow" / "compose.yaml", "config", "--quiet"]
    environment = {"MLFLOW_DB_PASSWORD": "x", "PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": "/"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compose_serves_the_pinned_mlflow_with_options_it_has():
    from mlflow.cli import server

    services = load("mlflow/compose.yaml")["services"]
    assert set(services) == {"postgres", "mlflow"}
    assert services["mlflow"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert "healthcheck" in services["postgres"]
    image = (CLUSTER / "mlflow" / "Dockerfile").read_text()
    for package in ("mlflow", "psycopg2-binary"):
        assert f"{package}=={pinned(package)}" in image
    options = {option for parameter in server.params for option in parameter.opts}
    assert {word for word in services["mlflow"]["command"] if word.startswith("--")} <= options
    variables = {parameter.envvar for parameter in server.params}
    assert {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION"} <= variables
