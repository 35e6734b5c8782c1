"""What a folder of weights says of itself: its descriptions, its files, its licence, the names of its classes."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ard_jax.convert.diffusers_config import transformer_class
from ard_jax.errors import UserError
from ard_jax.files import read_json
from ard_jax.weights.tensors import WEIGHT_SUFFIXES

PIPELINE, PART = "model_index.json", "config.json"  # what describes a whole pipeline, and one network


def folder_class(path: pathlib.Path, description: str) -> str | None:
    """The class that a folder's PIPELINE or PART says it holds; None if that is not what describes it.

    Raises:
        UserError: the description is broken.
    """
    found = next((name for name in (PIPELINE, PART) if (path / name).is_file()), None)
    return str(read_description(path / description).get("_class_name")) if found == description else None


def holds_transformer(path: pathlib.Path, name: str) -> bool:
    """Whether a folder is that of one transformer, of this class of diffusers as it is called today.

    Raises:
        UserError: its description is broken.
    """
    return folder_class(path, PART) is not None and transformer_class(read_description(path / PART)) == name


def read_description(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object that describes a folder.

    Raises:
        UserError: it is missing or broken.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, so {path.parent} is not whole: fetch it again.")
    return read_json(path, dict[str, Any], "fetch it again")


def find_text_encoder(folder: pathlib.Path) -> str:
    """Where a pipeline's text encoder is: in its folder, or by the name that its index has; "" if it has none."""
    named = read_description(folder / PIPELINE).get("text_encoder") or ("", "")
    in_it = (folder / "text_encoder").is_dir()
    return str(folder.absolute()) if in_it else str(named[1]) if named[0] == "ard_jax" else ""


def part_files(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """A part's weights and description."""
    return tuple(path for path in sorted(folder.iterdir()) if path.suffix in (*WEIGHT_SUFFIXES, ".json"))


def folder_license(folder: pathlib.Path) -> str | None:
    """What the front matter of a folder's README.md calls its licence, or which file to see."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    lines = front[1].splitlines() if front else []
    entries = {key: value.strip().strip("'\"") for key, _, value in (line.partition(":") for line in lines)}
    if entries.get("license"):
        return entries.get("license_name", "other") if entries["license"] == "other" else entries["license"]
    files = sorted(path.name for path in folder.glob("LICENSE*"))
    return f"see {files[0]}" if files else None


def class_names(id2label: object, count: int, path: pathlib.Path) -> tuple[str, ...]:
    """Names by class index, () if there are none; a class without one is called by its number.

    Raises:
        UserError: they are no names by number.
    """
    if not id2label:
        return ()
    if not isinstance(id2label, Mapping) or not all(str(key).isdigit() for key in id2label):
        raise UserError(f"{path} has an id2label that gives no names by number: mend it.")
    names = {int(key): str(name) for key, name in id2label.items()}
    return tuple(names.get(number, f"class {number}") for number in range(count))
