"""Makes images with the model in this folder, with jax and numpy alone (and Pillow for a .png).

python run.py --labels 207 360 --seed 0 --out images.png

Or from Python:

import run
generate = run.load("FOLDER")
images = generate(run.draw_noise("FOLDER", seed=0, count=2), [207, 360])

Images are float32 in [0, 1], (batch, height, width, channel). Labels are class numbers; the command line takes the
names in signature.json too. Image i of a seed is the same here and in the pipeline that this folder was exported from.
"""

import argparse
import json
import pathlib

import jax
import numpy as np
from jax import export


def load(folder):
    """A function (noise (batch, height, width, channel), labels (batch,)) → images. It compiles once a batch size.

    It raises ValueError for noise or labels that the model cannot take.
    """
    folder = pathlib.Path(folder)
    signature = read_signature(folder)
    modules = {size: jax.jit(read_module(folder / file).call) for size, file in signature["modules"].items()}
    weights = read_weights(folder, signature)
    shape, last = signature["inputs"]["noise"]["shape"][1:], signature["inputs"]["labels"]["range"][1]

    def generate(noise, labels):
        noise, labels = np.asarray(noise, np.float32), np.asarray(labels)
        count = len(labels)
        if noise.shape != (count, *shape):
            raise ValueError(f"noise is {noise.shape}, but {count} labels need {(count, *shape)}.")
        if not count or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > last:
            raise ValueError(f"labels are {labels.tolist()}: give class numbers from 0 to {last}.")
        size = count if "any" in modules else smallest(modules, count)
        rows = np.arange(size) % count  # a batch that is too small is filled up
        run = modules.get("any") or modules[str(size)]
        return np.asarray(run(weights, noise[rows], labels[rows].astype(np.int32)))[:count]

    return generate


def smallest(sizes, count):
    """The smallest of the exported batch sizes that holds `count` images."""
    fitting = [int(size) for size in sizes if int(size) >= count]
    if not fitting:
        raise ValueError(f"{count} images are too many at once: this folder has batches of {', '.join(sizes)}.")
    return min(fitting)


def draw_noise(folder, seed, count):
    """Noise of images 0 … count−1 of a seed, (count, height, width, channel)."""
    draw = read_module(pathlib.Path(folder) / "noise.stablehlo").call
    return jax.jit(draw)(np.int32(seed), np.arange(count, dtype=np.int32))


def read_signature(folder):
    return json.loads((pathlib.Path(folder) / "signature.json").read_text(encoding="utf-8"))


def read_module(path):
    return export.deserialize(bytearray(path.read_bytes()))


def read_weights(folder, signature):
    """The arrays of weights.npz in the order that the module takes them; NumPy has no bfloat16 and keeps its bits."""
    with np.load(folder / "weights.npz", allow_pickle=False) as file:
        return [jax.device_put(file[array["name"]].view(array["dtype"])) for array in signature["weights"]]


def class_numbers(labels, signature):
    """Numbers as they are, and names in signature.json by their number."""
    numbers = {name.casefold(): int(number) for number, name in signature["labels"].items()}
    unknown = [label for label in labels if not label.isdecimal() and label.casefold() not in numbers]
    if unknown:
        raise ValueError(f"no class is named {unknown[0]!r}: signature.json lists the names, if there are any.")
    return [int(label) if label.isdecimal() else numbers[label.casefold()] for label in labels]


def save(images, path):
    """Writes a .npy with the images as they are, or a picture with all of them side by side."""
    if path.suffix == ".npy":
        np.save(path, images)
        return
    from PIL import Image

    row = np.rint(np.concatenate(images, axis=1) * 255).astype(np.uint8)
    Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row).save(path)


def main():
    folder = pathlib.Path(__file__).parent
    parser = argparse.ArgumentParser(description="Makes images of the given classes.")
    parser.add_argument("--labels", nargs="+", required=True, help="class numbers, or names in signature.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="images.npy", help="a .npy, or a picture such as a .png")
    given = parser.parse_args()
    try:
        labels = class_numbers(given.labels, read_signature(folder))
        save(load(folder)(draw_noise(folder, given.seed, len(labels)), labels), given.out)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(labels)} images: {given.out}")


if __name__ == "__main__":
    main()
