#!/usr/bin/env bash
# Runs a stage on this machine as a pod would: in N processes that find each other through a port of localhost, with two
# CPU devices each (DEVICES=D for another number).
#   launch/local_pod.sh N STAGE [FLAG …]
# Process 0 speaks as the stage does; what the others say has their number in front. It ends with the highest status.
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

count=${1:-}
if [[ ! "$count" =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "local_pod.sh: give the number of processes and a stage: launch/local_pod.sh 2 teacher --config … --workdir …" >&2
  exit 2
fi
shift
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-2}"

processes=()
for ((index = 0; index < count; index++)); do
  place=(--coordinator "localhost:$port" --num-processes "$count" --process-id "$index")
  if ((index == 0)); then
    "$python" -m ard_jax "$@" "${place[@]}" &
  else
    "$python" -m ard_jax "$@" "${place[@]}" > >(trap '' TERM INT; exec sed -u "s/^/[$index] /") 2>&1 &
  fi
  processes+=("$!")
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT

highest=0
for process in "${processes[@]}"; do
  wait "$process" || true
  while kill -0 "$process" 2>/dev/null; do # a signal ends `wait` before the process has ended
    wait "$process" || true
  done
  status=0
  wait "$process" || status=$? # its own: what a signal has ended returns that of the signal
  if ((status > highest)); then
    highest=$status
  fi
done
exit "$highest"
