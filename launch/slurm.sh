#!/usr/bin/env bash
# Runs a stage on a Slurm cluster, on GPUs or on CPUs, and again after each preemption or end of time until it is done.
# Submit it from the repository's folder, which every node must see at the same path:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=8:00:00 launch/slurm.sh STAGE --config FILE --workdir DIR
#   sbatch --nodes=4 --cpus-per-task=32 --time=8:00:00 launch/slurm.sh STAGE --config FILE --workdir DIR   # CPUs
# A task is a process of JAX, which finds the others through Slurm's variables and, of its node's GPUs, takes the one
# with its local number: hence as many tasks a node as GPUs, and --gpus-per-node. With --gpus-per-task Slurm would hide
# all but one GPU from a task, under number 0. On CPUs, one task a node.
#SBATCH --job-name=ard_jax
#SBATCH --ntasks-per-node=1
#SBATCH --output=ard_jax-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Two minutes before the time is over, and when the job is preempted, the tasks (not this script) get SIGTERM and save.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch: sbatch launch/slurm.sh STAGE --config FILE --workdir DIR}"
if [[ ! -f launch/env.sh ]]; then # Slurm runs a copy of this script, so that it cannot find the others by itself
  echo "slurm.sh: $PWD is not the repository's folder: change to that folder and submit launch/slurm.sh from there." >&2
  exit 2
fi
# shellcheck source=launch/env.sh
source launch/env.sh
if [[ -n "${SLURM_GPUS_ON_NODE:-}" ]]; then
  if [[ "$SLURM_GPUS_ON_NODE" != "${SLURM_NTASKS_PER_NODE:-1}" ]]; then
    echo "slurm.sh: ${SLURM_NTASKS_PER_NODE:-1} tasks a node would use so many of its $SLURM_GPUS_ON_NODE GPUs:" \
      "give --ntasks-per-node=$SLURM_GPUS_ON_NODE." >&2
    exit 2
  fi
  "$python" -m pip install --quiet --disable-pip-version-check "jax[cuda12]" # newer drivers run it too
fi

trap : TERM # Slurm may signal this script too, which waits for what the tasks say
status=0
# Newer versions of srun do not take this one over from sbatch by themselves.
srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} bash launch/stage.sh "$@" || status=$?
if [[ $status == 42 ]]; then # saved
  echo "slurm.sh: back into the queue, to go on from what is saved."
  scontrol requeue "$SLURM_JOB_ID" || true # where a preemption has done that already, Slurm refuses
fi
exit "$status"
