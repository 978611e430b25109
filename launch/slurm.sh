#!/usr/bin/env bash
# Trains on GPUs under Slurm. Takes the flags of nfnet_jax.experiments.train:
#
#   sbatch launch/slurm.sh --config=f3 --workdir=/shared/runs/f3
#
# JAX reads the coordinator and the process number from Slurm's environment,
# and gives each process one GPU, so a node has as many tasks as GPUs. Slurm
# sends SIGTERM ten minutes before the time limit; the job then saves and is
# requeued.
#
#SBATCH --job-name=nfnet
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

code=0
srun "${PYTHON:-.venv/bin/python}" -m nfnet_jax.experiments.train \
  --require_platform=gpu "$@" || code=$?
if [[ $code = 75 ]]; then # Interrupted and saved.
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
