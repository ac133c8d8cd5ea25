#!/usr/bin/env bash
#SBATCH --job-name=nuwa
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=128G
#SBATCH --time=1-00:00:00
#SBATCH --output=nuwa-%j.log
# The whole pipeline on a Slurm allocation: `sbatch cluster/slurm.sh` from the repository, which lies where all nodes see
# it. Ray starts on every node, `dvc repro` runs on the first, and the cluster goes with the job. Submitted again, it
# continues from the finished units.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch from the repository}"
source .venv/bin/activate

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
# Jobs that share a node must not share a port.
address="$head:$((20000 + SLURM_JOB_ID % 20000))"
# One token a job, known to its nodes and to no one else.
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | base64 | tr -d '\n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
export OMP_NUM_THREADS=1

srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --kill-on-bad-exit=1 \
  ray symmetric-run --address "$address" --min-nodes "$SLURM_NNODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" -- env "RAY_ADDRESS=$address" dvc repro
