"""Time and memory of converting a full-size teacher: python -m benchmarks.convert [--folder DIR] [--repeats N]

Makes a random XL/2 checkpoint with the published names (2.7 GB) in DIR, as .safetensors and as .pt, converts each in a
process of its own and removes everything again: DIR needs 6 GB. Prints, as a Markdown table, each file's seconds of

reading plain     every byte into one buffer, which is as fast as the disk or the page cache goes
reading arrays    what a program does that wants the weights: safetensors' or torch's loader, then a sum of every array
converting        `python -m ard_jax convert` after its imports: read, transposed, stacked, written, hashed twice
memory            peak of that process beyond what it has after its imports, over the size of the file

"cold" drops the file from the page cache first (posix_fadvise), "warm" leaves it there. Memory is the greatest of the
repeats; the others are their medians, ratios those of each round's two timings (least–greatest). Every timing starts
after the same pause, in which the system takes back the memory that the one before it has left: on virtual machines
fresh memory is slow, and whoever comes next would have it easier.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
CONVERT, READ = "convert", "read"


def make(folder: pathlib.Path) -> list[pathlib.Path]:
    """The same random weights in both formats."""
    import torch

    from ard_jax.convert.published import expected_shapes
    from ard_jax.models import DiT
    from ard_jax.models.layers import position_table
    from ard_jax.weights.tensors import write_tensors

    rng = np.random.default_rng(0)
    model = DiT(image_size=32)
    shapes = expected_shapes(model) | {"pos_embed": (1, 256, model.hidden_size)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays["pos_embed"] = position_table(16, 16, model.hidden_size)[None]
    paths = [folder / "DiT-XL-2-256x256.safetensors", folder / "DiT-XL-2-256x256.pt"]
    write_tensors(paths[0], arrays)
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, paths[1])
    os.sync()
    return paths


def forget(path: pathlib.Path) -> None:
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plain(path: pathlib.Path) -> float:
    started, buffer = time.perf_counter(), bytearray(2**24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def read_arrays(path: pathlib.Path) -> None:
    """Runs in a process of its own, since a loader's time depends on the memory that the process has already had."""
    if path.suffix == ".pt":
        import torch

        started = time.perf_counter()
        for tensor in torch.load(path, weights_only=True).values():
            tensor.sum()
    else:
        from safetensors.numpy import load_file

        started = time.perf_counter()
        for array in load_file(path).values():
            array.sum()
    print(json.dumps({"seconds": time.perf_counter() - started}))


def memory(kind: str) -> int:
    """This process's memory in bytes: "VmRSS" now, "VmHWM" at its highest."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


def convert(path: pathlib.Path) -> None:
    """Runs in a process of its own."""
    if path.suffix == ".pt":
        import torch  # noqa: F401 (an import, whose time and memory are not the conversion's)
    from ard_jax.command_line import run_stage
    from ard_jax.stages import convert as _  # noqa: F401

    before, started = memory("VmRSS"), time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        status = run_stage("convert", ["--source", str(path), "--workdir", str(path.parent / "run")])
    assert status == 0
    print(json.dumps({"seconds": time.perf_counter() - started, "bytes": memory("VmHWM") - before}))


def in_process(what: str, path: pathlib.Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.convert", "--only", what, "--folder", str(path)]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return json.loads(ended.stdout)


def measure(path: pathlib.Path, cold: bool, pause: float) -> dict[str, float]:
    """One repeat of a row."""

    def prepare():
        shutil.rmtree(path.parent / "run", ignore_errors=True)
        os.sync()  # what earlier repeats wrote is not to be written while this one is timed
        forget(path) if cold else read_plain(path)
        time.sleep(pause)

    prepare()
    plain = read_plain(path)
    prepare()
    arrays = in_process(READ, path)["seconds"]
    prepare()
    converted = in_process(CONVERT, path)
    return {"plain": plain, "arrays": arrays, "convert": converted["seconds"], "bytes": converted["bytes"]}


def table(paths: list[pathlib.Path], repeats: int, pause: float) -> str:
    lines = [
        "| file | cache | reading plain | reading arrays | converting | ÷ plain | ÷ arrays | memory ÷ file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in paths:
        for cold in (True, False):
            rows = [measure(path, cold, pause) for _ in range(repeats)]
            plain, arrays, seconds = (
                statistics.median(row[key] for row in rows) for key in ("plain", "arrays", CONVERT)
            )
            lines.append(
                f"| {path.suffix} | {'cold' if cold else 'warm'} | {plain:.2f} s | {arrays:.2f} s | {seconds:.2f} s "
                f"| {ratio(rows, 'plain')} | {ratio(rows, 'arrays')} "
                f"| {max(row['bytes'] for row in rows) / path.stat().st_size:.2f} |"
            )
    return "\n".join(lines)


def ratio(rows: list[dict[str, float]], key: str) -> str:
    """Of converting to reading: median (least–greatest)."""
    ratios = sorted(row[CONVERT] / row[key] for row in rows)
    return f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}–{ratios[-1]:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/ard_jax-benchmark"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pause", type=float, default=3.0, help="seconds before each timing")
    parser.add_argument("--only", choices=(CONVERT, READ), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        {CONVERT: convert, READ: read_arrays}[args.only](args.folder)
        return
    args.folder.mkdir(parents=True)
    try:
        print(table(make(args.folder), args.repeats, args.pause))
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
