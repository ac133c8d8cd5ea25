#!/usr/bin/env bash
#SBATCH --job-name=nuwa
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=128G
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=nuwa-%j.log
# The whole pipeline on a Slurm allocation: `sbatch cluster/slurm.sh` from the repository, which lies where all nodes see
# it. Ray starts on every node, `dvc repro` runs on the first, and the cluster goes with the job. Five minutes before
# its time is up the job is queued again, as Slurm does with one that is preempted; it continues from the finished units.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch from the repository}"
source .venv/bin/activate

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
# Jobs that share a node must not share a port.
address="$head:$((20000 + SLURM_JOB_ID % 20000))"
# One token a job, known to its nodes and to no one else: a file that only its owner reads, on the shared file system.
umask 077
token=$(mktemp "$PWD/.ray-token.XXXXXXXXXX")
trap 'rm -f "$token"' EXIT
head -c 32 /dev/urandom | base64 | tr -d '\n' >"$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"
# Of Ray's pages of figures, which ask for no token, none is served.
export RAY_enable_metrics_collection=0 AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
export OMP_NUM_THREADS=1

step=
stop() {  # the driver ends by one line, its MLflow run as interrupted
  if [[ -n $step ]]; then
    kill -TERM "$step" 2>/dev/null || true
    wait "$step" || true
  fi
}
again() {
  echo "the job's time is nearly up: it is queued again" >&2
  stop
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap again USR1
trap 'stop; exit 143' TERM

srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --kill-on-bad-exit=1 \
  ray symmetric-run --address "$address" --min-nodes "$SLURM_NNODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --dashboard-host 127.0.0.1 -- env "RAY_ADDRESS=$address" dvc repro &
step=$!
wait "$step"
