"""Host memory of sampling and evaluating 50,000 images of 256×256, beyond what a process has at its start.

    python -m benchmarks.memory FOLDER [--count 50000] [--weights FILE]

Parts of random images stand for the sampler's, which costs days on a CPU and whose own memory is its batch's: what is
measured joins them, trains the classifier on as many real images and looks at all of them, and measures them by
Inception's definitions. Without --weights Inception's network, a device's business, is random features of its widths.
FOLDER takes 25 GB for a while.
"""

import argparse
import json
import pathlib
import shutil

import jax
import numpy as np

from ard_jax.conditions import Labels
from ard_jax.config import default_config
from ard_jax.evaluation import InceptionFeatures
from ard_jax.evaluation.inception import NUM_CLASSES, NUM_FEATURES, NUM_SPATIAL, Features
from ard_jax.evaluation.npz import NpzArray
from ard_jax.files import write_npz
from ard_jax.measuring import Samples
from ard_jax.measuring.classifier import train_classifier
from ard_jax.measuring.inception import open_inception
from ard_jax.progress import Stopwatch
from ard_jax.stages import sample

SIDE, PART = 256, 512


class Pictures:
    """A source of random pictures with classes, made when they are read."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.generic]:
        rng = np.random.default_rng(index)
        cells = rng.random((8, 8, 3), np.float32).repeat(SIDE // 8, axis=0).repeat(SIDE // 8, axis=1)
        return {"image": cells * 2 - 1, "label": np.int32(index % 10)}


class RandomFeatures:
    """In the network's place: features of its widths, which the images' first pixels decide."""

    is_published, sha256 = False, "0" * 64

    def over(self, devices: object) -> "RandomFeatures":
        return self

    def stream(self, batches, batch_size: int):
        for images in batches:
            rng = np.random.default_rng(int(images[0, 0, 0].sum()))
            widths = (NUM_FEATURES, NUM_SPATIAL, NUM_CLASSES)
            yield Features(*(rng.random((len(images), width), np.float32) for width in widths))


def peak(reset: bool = False) -> float:
    """This process's highest resident memory since it was last reset, GB."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def write_parts(folder: pathlib.Path, count: int) -> None:
    """Parts as `sample` writes them."""
    rng = np.random.default_rng(0)
    for start in range(0, count, PART):
        rows = min(PART, count - start)
        images = rng.integers(0, 256, (rows, SIDE, SIDE, 3), np.uint8)
        labels = (np.arange(start, start + rows) % 10).astype(np.int32)
        write_npz(folder / f"{start:09d}.npz", arr_0=images, labels=labels, seconds=np.asarray(0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--weights", type=pathlib.Path)
    args = parser.parse_args()
    config, folder = default_config(), args.folder / "memory"
    config.sample.count, config.data.num_classes = args.count, 10
    config.evaluate.update(feature_steps=50, weights=str(args.weights), reference=str(folder / "reference.npz"))
    if args.weights is None:
        InceptionFeatures.from_file = classmethod(lambda cls, path: RandomFeatures())
    write_parts(folder / "parts", args.count)
    write_npz(
        folder / "reference.npz", arr_0=np.zeros((10_000, SIDE, SIDE, 3), np.uint8) + np.arange(3, dtype=np.uint8)
    )
    jax.block_until_ready(jax.numpy.zeros(1))  # the device is there
    found: dict[str, object] = {"count": args.count, "start_gb": round(peak(reset=True), 2)}

    def measured(name, function):
        start, watch = peak(reset=True), Stopwatch()
        result = function()
        found[name] = {"gb_beyond_start": round(peak() - start, 2), "seconds": round(watch(), 1)}
        print(json.dumps({name: found[name]}), flush=True)
        return result

    measured("join", lambda: sample._join(folder, config.sample))
    shutil.rmtree(folder / "parts")
    images = NpzArray(folder / "samples.npz")
    samples = Samples(images, np.zeros(args.count, np.int32), "0")
    conditions = Labels(10)
    classifier = measured("train", lambda: train_classifier(config, Pictures(args.count), None, conditions))
    measured("classifier", lambda: classifier.measure(samples, folder / "parts" / "classifier"))
    inception = open_inception(config, (SIDE, SIDE, 3), conditions, folder / "parts" / "reference")
    measured("inception", lambda: inception.measure(samples, folder / "parts" / "inception"))
    shutil.rmtree(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
