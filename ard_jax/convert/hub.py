"""Sources that lie on the Hugging Face hub."""

import pathlib
import re
from collections.abc import Iterable

from ard_jax.errors import UserError, first_line
from ard_jax.files import local_path
from ard_jax.weights.tensors import WEIGHT_SUFFIXES, variant


def fetch_source(source: str) -> pathlib.Path:
    """A path as it is, and "hf:ORG/NAME" downloaded from the Hugging Face hub (or its cache) into a folder.

    Raises:
        UserError: the path is not there, or the repository cannot be had: no net, no such name, no leave.
    """
    if not source.startswith("hf:"):
        path = local_path(source)
        if not path.exists():
            raise UserError(f"{source} is not there: give a file, a folder or hf:ORG/NAME.")
        return path
    repository = source.removeprefix("hf:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{source!r} names no repository: write hf:ORG/NAME, such as hf:facebook/DiT-XL-2-256.")
    return _download(repository)


def _download(repository: str) -> pathlib.Path:
    """The folder with a hub repository's files, just the `needed_files`; without a net, what the cache has of them."""
    import huggingface_hub

    try:
        siblings = huggingface_hub.model_info(repository, timeout=10).siblings or []
        files = needed_files(file.rfilename for file in siblings)
        return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # every layer below raises its own, from sockets to the hub's
        reason = first_line(error)
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    except Exception:
        raise UserError(
            f"hf:{repository} cannot be downloaded ({reason}): see that there is a net and that the name is right, or "
            f"give a folder with a copy of it."
        ) from None


def needed_files(files: Iterable[str]) -> list[str]:
    """Which of a repository's files we read: its words, and in each folder weights of the first of `WEIGHT_SUFFIXES`.

    Variants, such as fp16, are left there where the plain file is.
    """
    paths = [pathlib.PurePosixPath(file) for file in files]
    kept = [path for path in paths if path.suffix in (".json", ".md", ".model") or path.name.startswith("LICENSE")]
    for folder in dict.fromkeys(path.parent for path in paths):
        here = [path for path in paths if path.parent == folder]
        by_suffix = [[path for path in here if path.suffix == suffix] for suffix in WEIGHT_SUFFIXES]
        weights = next(filter(None, by_suffix), [])
        fewest = min((len(variant(path)) for path in weights), default=0)
        kept += [path for path in weights if len(variant(path)) == fewest]
    return [str(path) for path in kept]
