#!/usr/bin/env bash
# Runs a stage where something watches over it (tpu_worker.sh, slurm.sh, a workload on GKE) and says by its exit status
# how it ended: 42 if it was preempted and has saved its state, so that the same command should run again, and otherwise
# the stage's own status (0 done, 2 a user's mistake).
#   launch/stage.sh STAGE [FLAG …]
# The stage itself ends with 0 in both cases, and only its words tell them apart. 42 is a status on which workloads of
# xpk start again by default, and neither Python nor a shell ends with it of its own accord.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
saved="its state is saved: resume by running the same command"

python=.venv/bin/python
if [[ ! -x "$python" ]]; then
  python=python # a container's
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# A file stands between the stage and its output, and no pipe: whatever a preemption kills first, the stage can write.
"$python" -m ard_jax "$@" >"$log" 2>&1 </dev/null &
stage=$!
(
  trap '' TERM # it ends when the stage has
  exec tail --pid="$stage" --sleep-interval=0.2 -n +1 -f "$log"
) &
output=$!
trap 'kill -TERM "$stage" 2>/dev/null || true' TERM # in a container, the signal comes to this shell alone
wait "$stage" || true
while kill -0 "$stage" 2>/dev/null; do # a signal ends `wait` before the stage has ended
  wait "$stage" || true
done
status=0
wait "$stage" || status=$? # its own: what a signal has ended returns that of the signal
wait "$output" || true
if [[ $status == 0 ]] && grep -qF "$saved" "$log"; then
  status=42
fi
exit "$status"
