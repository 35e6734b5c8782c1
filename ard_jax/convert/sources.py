"""What a file or folder of weights is, told from its names, shapes and descriptions; no array is read for that."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

from ard_jax.convert.families import autoencoder, diffusers_folder, exported, pixart, published_file
from ard_jax.convert.families.base import Hints, Source
from ard_jax.convert.families.folders import PART, PIPELINE, folder_class, folder_license
from ard_jax.errors import UserError
from ard_jax.weights.tensors import WEIGHT_SUFFIXES


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of source.

    Attributes:
        recognise: opens a path that is of this family, None if it is not.
        pipelines: what it takes of folders with a model_index.json, in words.
        parts: what it takes of folders with a config.json alone, in words.
    """

    recognise: Callable[[pathlib.Path, Hints], Source | None]
    pipelines: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


# The first that recognises a path opens it, so a family that tells its own by a file's names stands before the last.
FAMILIES = (
    Family(diffusers_folder.recognise, pipelines=("DiTPipeline",), parts=("a DiT",)),
    Family(pixart.recognise, pipelines=pixart.PIPELINES, parts=("a PixArt transformer",)),
    Family(exported.recognise, pipelines=("ARDPipeline",), parts=("a DiT", "an ARD student")),
    Family(autoencoder.recognise, parts=("an AutoencoderKL",)),
    Family(published_file.recognise),
)


def open_source(path: pathlib.Path, hints: Hints | None = None) -> Source:
    """Recognises a file or folder; a folder with just one file of weights is that file.

    Raises:
        UserError: it is nothing that we know, is not whole, does not fit together, contradicts `hints`, or leaves
            something open that `hints` must say.
    """
    hints = hints or Hints()
    for family in FAMILIES:
        if source := family.recognise(path, hints):
            return source
    if not path.is_dir():
        raise UserError(f"{path} is no file of weights: give one of {', '.join(WEIGHT_SUFFIXES)}, or a folder.")
    if name := folder_class(path, PIPELINE):
        pipelines = _alternatives(word for family in FAMILIES for word in family.pipelines)
        raise UserError(f"{path} holds a {name}: only a {pipelines} can be converted.")
    if name := folder_class(path, PART):
        parts = _alternatives(word for family in FAMILIES for word in family.parts)
        raise UserError(f"{path} holds a {name}: only {parts} can be converted.")
    files = [file for file in sorted(path.iterdir()) if file.suffix in WEIGHT_SUFFIXES]
    if len(files) == 1:
        source = open_source(files[0], hints)
        return dataclasses.replace(source, license=hints.license or folder_license(path) or source.license)
    raise UserError(
        f"{path} is no pipeline, since it has no model_index.json or config.json, and it holds {len(files)} files of "
        f"weights: give a pipeline's folder, or the file that you mean."
    )


def _alternatives(words: Iterable[str]) -> str:
    """ "x", "x or y", "x, y or z", each word once."""
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last
