"""docs/EVALUATION.md's way to the paper's table, every command as it stands there, on random files of the same formats.

    python -m benchmarks.toy_imagenet FOLDER [--count 1000] [--side 256]

A small DiT of XL's shape (patches of 2 in 4 latent channels, learned variances, 1,000 classes), an autoencoder as
diffusers saves it, FID's Inception as torch-fidelity saves it and COUNT real images stand for what is to be had
elsewhere; the reference is made of the real images by the page's own command. COUNT images are drawn of each model,
with balanced labels. `watch` draws while it measures, `evaluate` reads files and is killed once and started again, and
`evaluate --samples` is told nothing of ours: all three must find the same. Numbers mean nothing. Needs PyTorch.
"""

import argparse
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import torch
from PIL import Image

from ard_jax.__main__ import main as command
from ard_jax.build import make_teacher
from ard_jax.config import default_config
from ard_jax.convert import vae_to_diffusers
from ard_jax.convert.published import expected_shapes
from ard_jax.files import read_json, read_json_lines, read_npz, write_json, write_npz
from ard_jax.models import AutoencoderKL, parameter_shapes
from ard_jax.models.layers import position_table
from ard_jax.progress import Stopwatch
from ard_jax.weights.tensors import write_tensors
from benchmarks.inception import random_state_dict
from benchmarks.measure import table

ROOT = pathlib.Path(__file__).parent.parent
WORKDIR, CONFIG, REFERENCE = "runs/in256", "configs/imagenet256.py", "VIRTUAL_imagenet256_labeled.npz"
WIDTH, HEADS = 8, 2
NAMES = ("fid", "fd_interval", "fd_halves", "sfid", "inception_score", "precision", "recall")


class Size:
    """How large the toy is: `count` images of `side` pixels, whose latents are an eighth as wide, or half if small."""

    def __init__(self, count: int, side: int):
        self.count, self.side = count, side
        self.levels = 4 if side >= 64 else 2
        self.latent, self.classes = side // 2 ** (self.levels - 1), min(count, 1000)

    def settings(self, stage: str) -> tuple[str, ...]:
        """What makes the page's config as small as the files."""
        drawn = (f"sample.count={self.count}", "sample.batch_size=8", "sample.grid=4", "sample.labels=balanced")
        measured = (f"evaluate.split={self.count // 2}", "evaluate.paired=4", "evaluate.pictures=2")
        fewer = {
            "trajectories": ("trajectories.count=8", "trajectories.batch_size=8", "trajectories.dtype=float32"),
            "distill": ("distill.steps=4", "distill.checkpoint_every=2", "distill.batch_size=4", "run.loggers=()"),
            "sample": drawn,
            "evaluate": (*drawn, *measured),
            "watch": (*drawn, *measured, "run.loggers=()"),
        }
        model = (
            "model.name=", "model.patch_size=2", f"model.hidden_size={WIDTH}", "model.depth=2",
            f"model.num_heads={HEADS}", "model.remat=none", f"data.image_size={self.latent}",
            "student.history_layers=1", "vae.batch_size=4",
        )  # fmt: skip
        return (*model, *fewer.get(stage, ()))


def write_files(folder: pathlib.Path, size: Size) -> None:
    """The files that the page names, but for the reference."""
    rng, config = np.random.default_rng(0), default_config()
    config.model.update(name="", patch_size=2, hidden_size=WIDTH, depth=2, num_heads=HEADS)
    config.data.update(image_size=size.latent, channels=4, num_classes=1000, space="latent")
    shapes = expected_shapes(make_teacher(config))
    dit = {name: 0.2 * rng.normal(size=shape) for name, shape in shapes.items()}
    dit["pos_embed"] = position_table(size.latent // 2, size.latent // 2, WIDTH)[None]
    for name, arrays in {
        "DiT-XL-2-256x256.pt": dit,
        "weights-inception-2015-12-05-6726825d.pth": random_state_dict(),
    }.items():
        torch.save({key: torch.from_numpy(np.float32(array)) for key, array in arrays.items()}, folder / name)
    vae = AutoencoderKL(block_out_channels=(8,) * size.levels, layers_per_block=1, norm_num_groups=2, latent_channels=4)
    like = parameter_shapes(vae, jax.ShapeDtypeStruct((1, size.side, size.side, 3), "float32"))
    params = jax.tree.map(lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape)), like)
    weights, about = vae_to_diffusers(vae, params)
    write_json(folder / "sd-vae-ft-ema" / "config.json", about)
    write_tensors(folder / "sd-vae-ft-ema" / "diffusion_pytorch_model.safetensors", weights)
    for number in range(size.count):
        path = folder / "IMAGES" / f"{number % size.classes:04d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = rng.integers(0, 256, (4, 4, 3), np.uint8)
        image = cells.repeat(size.side // 4, axis=0).repeat(size.side // 4, axis=1)
        Image.fromarray(image ^ rng.integers(0, 32, image.shape, np.uint8)).save(path)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Stages and their flags, as the page has them for the paper's table; the reference's, which all need, first."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "EVALUATION.md").read_text(), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    lines = [words for words in lines if words[:3] == ["python", "-m", "ard_jax"] and "runs/sigma" not in words]
    for words in sorted(lines, key=lambda words: "--make-reference" not in words):
        yield words[3], words[4:]


def smaller(stage: str, flags: list[str], size: Size) -> list[str]:
    """The flags of a command of the page, with those that make it small."""
    if "--samples" in flags:
        return [*flags, "--split", str(size.count // 2)]
    if CONFIG not in {flag.partition(":")[0] for flag in flags}:
        return [*flags, *(("--num-heads", str(HEADS)) if "DiT-XL-2-256x256.pt" in flags else ())]
    settings = [f"--config.{setting}" for setting in size.settings(stage)]
    if "--make-reference" in flags:
        settings += [f"--config.encode.image_size={size.side}", f"--config.data.num_classes={size.classes}"]
    given = {setting.partition("=")[0] for setting in settings}
    return [flag for flag in flags if flag.partition("=")[0] not in given] + settings


def kill_midway(stage: str, flags: Sequence[str], part: pathlib.Path) -> None:
    """Runs a command in a process of its own, which is killed as soon as it has written a part."""
    running = subprocess.Popen([sys.executable, "-m", "ard_jax", stage, *flags])
    while running.poll() is None and not part.exists():
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it ended before it was killed"


def run_all(folder: pathlib.Path, size: Size, kill: bool = True) -> dict[str, float]:
    """Runs the commands; the seconds of each. This process moves to the folder, where there must be nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    pathlib.Path("configs").symlink_to(ROOT / "configs")
    write_files(folder, size)
    seconds: dict[str, float] = {}
    for number, (stage, flags) in enumerate(commands()):
        flags, watch = smaller(stage, flags, size), Stopwatch()
        if kill and stage == "evaluate" and "--workdir" in flags and "--make-reference" not in flags:
            kill_midway(stage, flags, pathlib.Path(WORKDIR, "evaluate", "parts", "teacher", f"{0:09d}.npz"))
        status = command([stage, *flags])
        assert status == 0, f"{stage} {' '.join(flags)} ended with {status}"
        seconds[f"{number} {stage}"] = round(watch(), 1)
        if "--make-reference" in flags:  # ADM's file says nothing of itself
            arrays = read_npz(pathlib.Path("mine.npz"))
            write_npz(pathlib.Path(REFERENCE), **{name: array for name, array in arrays.items() if name != "about"})
    return seconds


def found(folder: pathlib.Path) -> dict[str, dict]:
    """What was measured: by model, of the student at each step by `watch`, and of its file by `evaluate --samples`."""
    home = folder / WORKDIR / "evaluate"
    lines = read_json_lines(home / "curve.jsonl")
    curve = {f"ard at step {line['step']}, by watch": line for line in lines}
    return read_json(home / "results.json")["models"] | curve | {"ard's file": read_json(folder / "ard.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--side", type=int, default=256)
    args = parser.parse_args()
    seconds = run_all(args.folder.absolute(), Size(args.count, args.side))
    rows = found(args.folder.absolute())
    print(table(("", *NAMES), [(name, *(shown(row.get(key)) for key in NAMES)) for name, row in rows.items()]))
    print(", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    last = [row for name, row in rows.items() if name.startswith("ard at")][-1]
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        np.testing.assert_allclose([rows["ard"][name], last[name]], rows["ard's file"][name], rtol=1e-4)


def shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "–".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"


if __name__ == "__main__":
    main()
