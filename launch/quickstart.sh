#!/usr/bin/env bash
# From nothing to a four-step student, on a laptop's CPU and real handwritten digits: a teacher is trained, its
# trajectories are stored, step distillation and ARD are distilled from them, and all are sampled, measured and shown.
#   launch/quickstart.sh [WORKDIR] [--config.key=value …]
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Compiled by XLA's level 2 in place of 3, networks as small as these are trained a tenth faster on a CPU, and sooner; large
# ones more slowly: benchmarks/RESULTS.md, "Compiling on a CPU".
export XLA_FLAGS="${XLA_FLAGS:---xla_backend_optimization_level=2}"

workdir=runs/quickstart
if [[ $# -gt 0 && "$1" != --* ]]; then
  workdir=$1
  shift
fi
started=$SECONDS
students=(ard step ard_noisy step_noisy)
commands=("teacher,trajectories" --config configs/digits.py:student=ard --workdir "$workdir" "$@")
word="then"
for student in "${students[@]}"; do
  commands+=("$word" distill --config "configs/digits.py:student=$student" --workdir "$workdir" "$@")
  word=beside
done
commands+=("then" "sample,evaluate,report" --config configs/digits.py:student=ard --workdir "$workdir" "$@")
"$python" -m "${ARD_MODULE:-ard_jax}" run "${commands[@]}" "--config.sample.models=('teacher', 'ard', 'step', 'ard_noisy', 'step_noisy')"
echo "quickstart: $((SECONDS - started)) seconds; open $workdir/report/index.html"
