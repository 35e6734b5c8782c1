# shellcheck shell=bash
# Sourced by the other scripts: makes or reuses .venv and installs requirements.txt into it when one of its files has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! -x .venv/bin/python ]]; then
  for python in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [[ -n "$python" ]] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv .venv
      break
    fi
  done
fi
if [[ ! -x .venv/bin/python ]]; then
  echo "ard_jax needs Python 3.11 or newer: install it, or name it with PYTHON=/path/to/python." >&2
  exit 2
fi
if ! cat requirements.txt requirements/*.txt | cmp -s - .venv/installed-requirements.txt; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
  cat requirements.txt requirements/*.txt >.venv/installed-requirements.txt
fi
# shellcheck disable=SC2034 # for the scripts that source this
python=.venv/bin/python
# On a CPU, a training step spends a tenth of its time on finding memory page by page; huge pages save nearly all of it.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
