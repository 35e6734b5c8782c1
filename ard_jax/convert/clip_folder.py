"""A CLIP with its tokenizer from a folder, as transformers or open_clip publish it."""

import hashlib
import pathlib
from typing import Any, NamedTuple

from ard_jax.convert.clip import OPEN_CLIP_CONSTANTS, POSITION_IDS, clip_from_open_clip, clip_from_transformers
from ard_jax.errors import UserError
from ard_jax.files import file_sha256, read_json
from ard_jax.models import CLIP
from ard_jax.text import Tokenizer, open_tokenizer
from ard_jax.types import Params
from ard_jax.weights.tensors import open_tensors, to_float32

OPEN_CLIP_CONFIG = "open_clip_config.json"


class OpenedCLIP(NamedTuple):
    """A CLIP.

    Attributes:
        model: its network.
        params: in float32.
        tokenizer: of its texts.
        sha256: of its files' hashes.
    """

    model: CLIP
    params: Params
    tokenizer: Tokenizer
    sha256: str


def open_clip_folder(folder: pathlib.Path) -> OpenedCLIP:
    """The CLIP in a folder: its weights, tokenizer.json, and config.json of transformers or open_clip_config.json.

    Raises:
        UserError: one of them is missing or damaged, or it is no CLIP that we have.
    """
    theirs, ours = folder / OPEN_CLIP_CONFIG, folder / "config.json"
    described = theirs if theirs.is_file() and not ours.is_file() else ours
    for path in (described, folder / "tokenizer.json"):
        if not path.is_file():
            raise UserError(
                f"there is no CLIP in {folder} (no {path.name}): give a folder with its weights, its tokenizer.json, "
                f"and its config.json or {OPEN_CLIP_CONFIG}."
            )
    config = read_json(described, dict[str, Any], "fetch it again")
    convert = clip_from_open_clip if described == theirs else clip_from_transformers
    tensors = open_tensors(folder, leave_out=(*POSITION_IDS, *OPEN_CLIP_CONSTANTS))  # whole numbers, most of them
    model, params = convert(to_float32(tensors, folder), config)
    hashes = [file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()]
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return OpenedCLIP(model, params, open_tokenizer(folder / "tokenizer.json"), digest)
