#!/usr/bin/env bash
# Runs a stage where something watches over it (tpu_worker.sh, slurm.sh, a workload on GKE) and says by its exit status
# how it ended: 42 if it was preempted, so that the same command should run again, and otherwise
# the stage's own status (0 done, 2 a user's mistake).
#   launch/stage.sh STAGE [FLAG …]
# The stage itself ends with 0 if it has saved, and only its words tell that from its end. 42 is a status on which
# workloads of xpk start again by default, and neither Python nor a shell ends with it of its own accord.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
saved="resume by running the same command"
asked=0 # by a signal that came before there was anybody to pass it on to
trap 'asked=1' TERM

python=.venv/bin/python
if [[ ! -x "$python" ]]; then
  python=python # a container's
fi
scratch=$(mktemp -d)
log=$scratch/log
trap 'rm -rf "$scratch"' EXIT

# bash loses the status of a child that ends as a signal comes, unless it is one that it runs in the foreground: so a
# shell beside this one runs the stage and writes its status.
# A file stands between the stage and its output, and no pipe: whatever a preemption kills first, the stage can write.
(
  trap : TERM # the stage saves and ends, and this shell writes how
  status=0
  # shellcheck disable=SC2016 # for the inner shell to expand
  bash -c 'echo "$$" >"$1"; exec "${@:2}"' stage "$scratch/pid" "$python" -m ard_jax "$@" >"$log" 2>&1 </dev/null ||
    status=$?
  echo "$status" >"$scratch/status"
) &
shell=$!
(
  trap '' TERM # it ends when the stage has
  : >"$scratch/shown"
  exec tail --pid="$shell" --sleep-interval=0.2 -n +1 -F "$log" 2>/dev/null
) &
output=$!

# shellcheck disable=SC2317 # the trap calls it
pass_on() { # in a container, the signal comes to this shell alone
  until [[ -s "$scratch/pid" ]] || ! kill -0 "$shell" 2>/dev/null; do # one that it killed itself writes none
    sleep 0.1 || true
  done
  if [[ -s "$scratch/pid" ]]; then
    kill -TERM "$(cat "$scratch/pid")" 2>/dev/null || true
  fi
}
trap pass_on TERM
if ((asked)); then
  pass_on
fi
for child in "$shell" "$output"; do
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before that has ended
    wait "$child" || true
  done
done
if [[ ! -e "$scratch/shown" ]]; then # the signal came to all, and to this one before it was deaf to it
  cat "$log" 2>/dev/null || true
fi
status=$(cat "$scratch/status" 2>/dev/null || echo 143) # if there is none, likewise
# 143: SIGTERM came while Python started or before there was anything to save
if [[ $status == 143 ]] || { [[ $status == 0 ]] && grep -qF "$saved" "$log"; }; then
  status=42
fi
exit "$status"
