"""Makes images with the model in this folder, with jax and numpy alone (and Pillow for a .png).

python run.py --labels 207 360 --seed 0 --out images.png
python run.py --prompts "a red apple" --seed 0 --out images.png    (a model of captions; needs its tokenizer's library)

Or from Python:

import run
generate = run.load("FOLDER")
images = generate(run.draw_noise("FOLDER", seed=0, count=2), [207, 360])

Images are float32 in [0, 1], (batch, height, width, channel). Labels are class numbers; the command line takes the
names in signature.json too. A model of captions takes generate(noise, *run.encode(FOLDER, texts)).
Image i of a seed is the same here and in the pipeline that this folder was exported from.
"""

import argparse
import json
import pathlib

import jax
import numpy as np
from jax import export


def load(folder):
    """A function (noise (batch, height, width, channel), labels (batch,)) → images. It compiles once a batch size.

    Of a model of captions, (noise, tokens (batch, token, channel), mask (batch, token)) → images. It raises ValueError
    for what the model cannot take.
    """
    folder = pathlib.Path(folder)
    signature = read_signature(folder)
    modules = {size: jax.jit(read_module(folder / file).call) for size, file in signature["modules"].items()}
    weights = read_weights(folder / "weights.npz", signature["weights"])
    inputs = {name: found for name, found in signature["inputs"].items() if name != "noise"}
    shape = signature["inputs"]["noise"]["shape"][1:]

    def generate(noise, *condition):
        noise, told = np.asarray(noise, np.float32), [np.asarray(array) for array in condition]
        if len(told) != len(inputs):
            raise ValueError(f"{len(told)} arrays were given beside noise, but it wants {', '.join(inputs)}.")
        count = len(told[0])
        if noise.shape != (count, *shape):
            raise ValueError(f"noise is {noise.shape}, but {count} {next(iter(inputs))} need {(count, *shape)}.")
        told = [check(name, array, count, inputs[name]) for name, array in zip(inputs, told, strict=True)]
        size = count if "any" in modules else smallest(modules, count)
        rows = np.arange(size) % count  # a batch that is too small is filled up
        run = modules.get("any") or modules[str(size)]
        return np.asarray(run(weights, noise[rows], *(array[rows] for array in told)))[:count]

    return generate


def check(name, array, count, found):
    """An input in its type; raises ValueError if the model cannot take it."""
    shape, dtype = (count, *found["shape"][1:]), np.dtype(found["dtype"])
    if "range" in found:
        last = found["range"][1]
        if not count or array.dtype.kind not in "iu" or array.min() < 0 or array.max() > last:
            raise ValueError(f"{name} are {array.tolist()}: give class numbers from 0 to {last}.")
    if array.shape != shape:
        raise ValueError(f"{name} is {array.shape}, but {shape} was expected.")
    return array.astype(dtype)


def encode(folder, texts):
    """Texts → the vectors of their tokens (text, token, channel) and which are their own (text, token)."""
    folder = pathlib.Path(folder)
    about = read_signature(folder).get("text_encoder")
    if about is None:
        raise ValueError("this folder has no text encoder: give tokens and mask of your own to generate.")
    if about["cleaning"] == "clean":
        raise ValueError("its captions were cleaned, which this file does not do: clean and encode them elsewhere.")
    texts = [text.lower().strip() if about["cleaning"] == "lower" else text for text in texts]
    ids, mask = np.zeros((2, len(texts), about["length"]), np.int32)
    for row, own in enumerate(tokenize(folder / about["tokenizer"], texts, about["length"])):
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
    run = jax.jit(read_module(folder / "text_encoder.stablehlo").call)
    weights = read_weights(folder / "text_encoder.npz", about["weights"])
    return np.where(mask[..., None], run(weights, ids, mask.astype(bool)), 0), mask.astype(bool)


def tokenize(path, texts, length):
    """Ids of each text, at most `length`, by the library that its tokenizer's file is for."""
    if path.suffix == ".json":
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
        return [found.ids for found in tokenizer.encode_batch(texts)]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [[*ids[: length - 1], 1] for ids in processor.encode(texts)]


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


def read_weights(path, arrays):
    """The arrays of an .npz in the order that its module takes them; NumPy has no bfloat16 and keeps its bits."""
    with np.load(path, allow_pickle=False) as file:
        return [jax.device_put(file[array["name"]].view(array["dtype"])) for array in arrays]


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
    parser = argparse.ArgumentParser(description="Makes images of the given classes, or prompts.")
    told = parser.add_mutually_exclusive_group(required=True)
    told.add_argument("--labels", nargs="+", help="class numbers, or names in signature.json")
    told.add_argument("--prompts", nargs="+", help="of a model of captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="images.npy", help="a .npy, or a picture such as a .png")
    given = parser.parse_args()
    try:
        labels = given.prompts or class_numbers(given.labels, read_signature(folder))
        condition = encode(folder, labels) if given.prompts else (labels,)
        save(load(folder)(draw_noise(folder, given.seed, len(labels)), *condition), given.out)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(labels)} images: {given.out}")


if __name__ == "__main__":
    main()
