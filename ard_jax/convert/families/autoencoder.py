"""An AutoencoderKL alone, in a folder as diffusers writes it."""

import pathlib

from ard_jax.convert.families.base import Hints, Source
from ard_jax.convert.families.folders import PART, folder_class, folder_license, part_files


def recognise(path: pathlib.Path, hints: Hints) -> Source | None:
    """An autoencoder's folder; nothing of it is checked before it is read."""
    if folder_class(path, PART) != "AutoencoderKL":
        return None
    return Source(
        what="an autoencoder of diffusers",
        files=part_files(path),
        vae=path,
        license=hints.license or folder_license(path),
    )
