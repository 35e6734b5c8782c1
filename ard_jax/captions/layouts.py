"""Folders of images as the tools of text-to-image benchmarks expect them.

Sources: BLIPvqa_eval/BLIP_vqa.py and GORS_finetune/inference_eval.py of Karine-Huang/T2I-CompBench,
evaluation/evaluate_images.py of djghosh13/geneval, dpg_bench/compute_dpg_bench.py of TencentQQGYLab/ELLA.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ard_jax.captions.lists import Prompt
from ard_jax.errors import UserError
from ard_jax.files import whole_folder

LONGEST_NAME = 255  # bytes of a file's name


class Layout(NamedTuple):
    """A way to lay images out.

    Attributes:
        each: images of a prompt, unless another number is asked for.
        write: (folder, the prompt's number, the prompt, its images (repetition, height, width, channel)) → files.
        check: raises UserError for a prompt that has no place in it, or a number of images.
        listed: whether metadata.jsonl of the folder says which image is of what.
    """

    each: int
    write: Callable[[pathlib.Path, int, Prompt, np.ndarray], None]
    check: Callable[[Prompt, int], None] = lambda prompt, each: None
    listed: bool = False


def _compbench_name(number: int, prompt: Prompt) -> str:
    return f"{prompt.text}_{number:06d}.png"


def _write_compbench(folder: pathlib.Path, number: int, prompt: Prompt, images: np.ndarray) -> None:
    """samples/PROMPT_NUMBER.png, numbered through: the tool reads the prompt off the name, and sorts by the number."""
    for repetition, image in enumerate(images):
        _save(folder / "samples" / _compbench_name(number * len(images) + repetition, prompt), image)


def _check_compbench(prompt: Prompt, each: int) -> None:
    if "/" in prompt.text or "_" in prompt.text or len(_compbench_name(0, prompt).encode()) > LONGEST_NAME:
        raise UserError(
            f"the prompt {prompt.text[:60]!r} cannot be the name of a file of T2I-CompBench, which has no '/' or '_' "
            f"and at most {LONGEST_NAME} bytes: take it out, or choose another sample.layout."
        )


def _write_geneval(folder: pathlib.Path, number: int, prompt: Prompt, images: np.ndarray) -> None:
    """NUMBER/metadata.jsonl, the prompt's own line, and NUMBER/samples/REPETITION.png."""
    own = folder / f"{number:05d}"
    for repetition, image in enumerate(images):
        _save(own / "samples" / f"{repetition:05d}.png", image)
    (own / "metadata.jsonl").write_text(json.dumps(prompt.told) + "\n", encoding="utf-8")


def _check_geneval(prompt: Prompt, each: int) -> None:
    if not {"tag", "include", "prompt"} <= prompt.told.keys():
        raise UserError(
            f"the prompt {prompt.text[:60]!r} has no tag and include, which GenEval's tool asks for: give its "
            f"evaluation_metadata.jsonl, or choose another sample.layout."
        )


def _write_dpg(folder: pathlib.Path, number: int, prompt: Prompt, images: np.ndarray) -> None:
    """NAME.png, with four images as two rows of two; the tool cuts them apart by --resolution."""
    if len(images) == 4:
        images = np.concatenate([np.concatenate(pair, axis=1) for pair in (images[:2], images[2:])])[None]
    _save(folder / f"{prompt.name}.png", images[0])


def _check_dpg(prompt: Prompt, each: int) -> None:
    if each not in (1, 4):
        raise UserError(f"sample.per_prompt is {each}, but DPG-Bench's tool takes 4 or 1: set it to one of them.")
    if "." in prompt.name:  # where the tool ends an item's name
        raise UserError(
            f"the prompt {prompt.name!r} has a dot in its name, which DPG-Bench's have not: rename its file."
        )


def _file_name(prompt: Prompt, repetition: int, each: int) -> str:
    return f"{prompt.name}.png" if each == 1 else f"{prompt.name}_{repetition:02d}.png"


def _write_named(folder: pathlib.Path, number: int, prompt: Prompt, images: np.ndarray) -> None:
    """NAME.png, or of several NAME_REPETITION.png."""
    for repetition, image in enumerate(images):
        _save(folder / _file_name(prompt, repetition, len(images)), image)


LAYOUTS = {
    "folder": Layout(1, _write_named, listed=True),
    "coco": Layout(1, _write_named),
    "compbench": Layout(10, _write_compbench, _check_compbench),
    "geneval": Layout(4, _write_geneval, _check_geneval),
    "dpg": Layout(4, _write_dpg, _check_dpg),
}


def _save(path: pathlib.Path, image: np.ndarray) -> None:
    """Writes uint8 (height, width, channel) as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)


def check_layout(name: str, prompts: Sequence[Prompt], each: int) -> None:
    """Raises UserError for a layout that does not exist, and for prompts that have no place in it."""
    if name not in LAYOUTS:
        raise UserError(f"sample.layout is {name!r}: choose one of {', '.join(LAYOUTS)}.")
    for prompt in prompts:
        LAYOUTS[name].check(prompt, each)


def write_layout(folder: pathlib.Path, name: str, prompts: Sequence[Prompt], images: Iterable[np.ndarray]) -> None:
    """Fills a folder, which is whole or as it was.

    Args:
        folder: its place.
        name: of the layout.
        prompts: that were drawn.
        images: of each of them, uint8 (repetition, height, width, channel); memory holds those of one.
    """
    layout, listed = LAYOUTS[name], []
    with whole_folder(folder) as new:
        for number, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
            layout.write(new, number, prompt, own)
            names = [_file_name(prompt, repetition, len(own)) for repetition in range(len(own))]
            listed += [{"file_name": file, "text": prompt.text} for file in names]
        if layout.listed:
            lines = "".join(json.dumps(line) + "\n" for line in listed)
            (new / "metadata.jsonl").write_text(lines, encoding="utf-8")
