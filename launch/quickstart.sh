#!/usr/bin/env bash
# From nothing to a four-step student, on a laptop's CPU and real handwritten digits: a teacher is trained, its
# trajectories are stored, step distillation and ARD are distilled from them, and all are sampled, measured and shown.
#   launch/quickstart.sh [WORKDIR] [--config.key=value …]
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

workdir=runs/quickstart
if [[ $# -gt 0 && "$1" != --* ]]; then
  workdir=$1
  shift
fi
started=$SECONDS
stage() { # STAGE STUDENT [FLAG …]
  echo "== $1 ${2:-}"
  "$python" -m ard_jax "$1" --config "configs/digits.py:student=$2" --workdir "$workdir" "${@:3}"
}
students=(ard step ard_noisy step_noisy)
stage teacher ard "$@"
stage trajectories ard "$@"
for student in "${students[@]}"; do
  stage distill "$student" "$@"
done
stage sample ard "$@" --config.sample.models="('teacher', 'ard', 'step', 'ard_noisy', 'step_noisy')"
stage evaluate ard "$@"
stage report ard "$@"
echo "quickstart: $((SECONDS - started)) seconds; open $workdir/report/index.html"
