"""What installing takes, in seconds and MB of each choice of extras, and what importing ARDPipeline takes.

    python -m benchmarks.installing [--source FOLDER] [--only EXTRAS …] [--imports]

Each choice goes into a new environment; the first run fills pip's cache, so keep the figures of a second one. With
--imports, `import jax` and `from ard_jax import ARDPipeline` after it are timed in this environment, in turns.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHOICES = ("", "emoji", "demo,emoji", "train")
TURNS = 7
IMPORTS = """
import time
started = time.perf_counter()
import jax
between = time.perf_counter()
from ard_jax import ARDPipeline
print(between - started, time.perf_counter() - between)
"""


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--source", default=str(ROOT), help="what is installed (default: this repository)")
    flags.add_argument("--only", nargs="*", default=CHOICES, metavar="EXTRAS", help='such as "" train demo,emoji')
    flags.add_argument("--imports", action="store_true", help="time imports, and install nothing")
    args = flags.parse_args()
    if args.imports:
        return time_imports()
    for extras in args.only:
        seconds, size = install(f"{args.source}[{extras}]" if extras else args.source)
        print(f"pip install '.{f'[{extras}]' if extras else ''}': {seconds:.0f} s, {size} MB", flush=True)


def install(what: str) -> tuple[float, int]:
    """Seconds, and the MB of site-packages after it, pip's own left out."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python, (site,) = f"{folder}/bin/python", pathlib.Path(folder).glob("lib/python3*/site-packages")
        before, started = megabytes(site), time.perf_counter()
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", what]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return time.perf_counter() - started, megabytes(site) - before


def megabytes(folder: pathlib.Path) -> int:
    return int(subprocess.run(["du", "-sm", folder], check=True, capture_output=True, text=True).stdout.split()[0])


def time_imports() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)  # the disk is read once
    said = [subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True).stdout.split()
            for _ in range(TURNS)]  # fmt: skip
    for name, column in zip(
        ("import jax", "from ard_jax import ARDPipeline, after it"), zip(*said, strict=True), strict=True
    ):
        seconds = sorted(map(float, column))
        print(f"{name}: median {statistics.median(seconds):.2f} s of {TURNS} ({seconds[0]:.2f}–{seconds[-1]:.2f})")


if __name__ == "__main__":
    main()
