#!/usr/bin/env bash
# Trains on 4 nodes of 8 GPUs under Slurm, again and again until the run is finished:
#
#   sbatch scripts/slurm.sh --config=convit_b --config.data.dir=DATA --workdir=DIR
#
# The arguments are the flags of `convit train`, which must be on the PATH. DIR is on a file system
# that all nodes see, or in a bucket. Partition and account are given to sbatch as usual.

#SBATCH --job-name=convit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# - One process drives all GPUs of a node, and needs CPUs for its workers.
# - 300 seconds before the time limit, Slurm signals the processes of srun. They save after the same
#   step and end with status 75. Then the job is put into the queue again.
# - Slurm itself puts it there after a preemption or the failure of a node (--requeue).
set -euo pipefail

status=0
# Slurm must not end the other processes when the first one has ended: they end together.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  convit train --stopped_status=75 "$@" || status=$?
if [ "$status" -eq 75 ]; then
  # A job that scancel ends is COMPLETING by now, and stays out of the queue.
  case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true) in
    COMPLETING | CANCELLED) ;;
    *) scontrol requeue "$SLURM_JOB_ID" ;;
  esac
fi
exit "$status"
