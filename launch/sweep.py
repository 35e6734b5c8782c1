#!/usr/bin/env python3
"""Runs the entries of a sweep file in turn, or prints the commands that do; `--help` and ard_jax/sweep.py say more.

python launch/sweep.py configs/sweeps/masks.py --workdir runs/masks [--only NAME …] [--print python|tpu_pod]
                       [--config.key=value …]
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.chdir(ROOT)  # as all of launch/: configs and workdirs are named from here
sys.path.insert(0, str(ROOT))

from ard_jax.sweep import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
