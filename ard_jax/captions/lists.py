"""Lists of prompts that benchmarks of text-to-image models publish, as they publish them."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

from etils import epath

from ard_jax.data import lines_of, read_lines, read_text
from ard_jax.errors import UserError
from ard_jax.files import read_json


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        text: in one line.
        name: what the benchmark calls it, which its images are named after: its number, unless the list says another.
        told: what else the list says of it, which the benchmark's own tool asks for again.
    """

    text: str
    name: str
    told: Mapping[str, Any] = {}


def read_prompts(path: pathlib.Path) -> list[Prompt]:
    """The prompts of a list, in its order.

    Args:
        path: a text file of one a line, of which a tab ends the prompt (T2I-CompBench's *_val.txt); a .jsonl with
            "prompt" or "text" in each line (GenEval's evaluation_metadata.jsonl); a .json of COCO's captions, of which
            each image has its first; or a folder of text files of one prompt each (DPG-Bench's prompts).

    Raises:
        UserError: there is no such list, it is damaged, or holds no prompt or an empty one.
    """
    readers: dict[str, Callable[[pathlib.Path], list[Prompt]]] = {".jsonl": _of_objects, ".json": _of_coco}
    if not path.exists():
        raise UserError(f"sample.prompts is {str(path)!r}, which is not there: give a list of prompts.")
    prompts = _of_folder(path) if path.is_dir() else readers.get(path.suffix, _of_lines)(path)
    if not prompts:
        raise UserError(f"{path} holds no prompt: give at least one.")
    empty = [prompt.name for prompt in prompts if not prompt.text]
    if empty:
        raise UserError(f"{path} has an empty prompt ({empty[0]}): take it out, or say what shall be drawn.")
    return prompts


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _of_lines(path: pathlib.Path) -> list[Prompt]:
    """Empty lines are left out."""
    texts = [_in_one_line(line.partition("\t")[0]) for line in lines_of(read_text(epath.Path(path)))]
    return [Prompt(text, f"{number:05d}") for number, text in enumerate(filter(None, texts))]


def _of_objects(path: pathlib.Path) -> list[Prompt]:
    prompts = []
    for number, (where, line) in enumerate(read_lines(epath.Path(path))):
        text = line.get("prompt", line.get("text"))
        if not isinstance(text, str):
            raise UserError(f'{where} has no string "prompt" or "text": give it one.')
        prompts.append(Prompt(_in_one_line(text), f"{number:05d}", line))
    return prompts


class _Annotation(TypedDict):
    id: int
    image_id: int
    caption: str


class _Annotations(TypedDict):
    annotations: list[_Annotation]


def _of_coco(path: pathlib.Path) -> list[Prompt]:
    found = read_json(path, _Annotations, "give one of COCO's captions_*.json, whole")["annotations"]
    first: dict[int, str] = {}
    for annotation in sorted(found, key=lambda one: one["id"]):
        first.setdefault(annotation["image_id"], annotation["caption"])
    return [Prompt(_in_one_line(text), f"{image:012d}") for image, text in sorted(first.items())]


def _of_folder(path: pathlib.Path) -> list[Prompt]:
    return [Prompt(_in_one_line(read_text(epath.Path(file))), file.stem) for file in sorted(path.glob("*.txt"))]
