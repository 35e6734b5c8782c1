#!/usr/bin/env bash
# What one NVIDIA GPU does, in at most eight minutes: fused attention against XLA's, the sampler's latency and throughput,
# the training step, the trajectory job, PixArt and T5. Prints sections of Markdown; benchmarks/RESULTS.md has a run's.
#   [PYTHON=python3] [SECONDS_EACH=4] benchmarks/gpu.sh [ITEM …]
# An item that takes over its share of the time is stopped, and the next goes on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
each=${SECONDS_EACH:-4}
items=("$@")
[[ $# -gt 0 ]] || items=(attention sampling training trajectories pixart t5)

echo "# One GPU, $(date -u +%F)"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 2
for item in "${items[@]}"; do
  module=speed
  case "$item" in attention | pixart | t5) module=gpu ;; esac
  started=$SECONDS
  timeout "${LIMIT_EACH:-150}" "$python" -m "benchmarks.$module" --only "$item" --seconds "$each" ||
    echo "$item did not end in its time, or failed"
  echo "($item: $((SECONDS - started)) s)"
done
