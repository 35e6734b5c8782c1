"""The Hugging Face hub: sources that lie there, and folders that are put there.

Its address, the token and the cache are huggingface_hub's own (HF_ENDPOINT, `hf auth login`, HF_HOME); no token
is read, shown or kept here.
"""

import pathlib
import re
from collections.abc import Iterable

from ard_jax.errors import UserError, first_line
from ard_jax.files import local_path
from ard_jax.weights.tensors import WEIGHT_SUFFIXES, variant


def fetch_source(source: str, revision: str | None = None) -> pathlib.Path:
    """A path as it is, and "hf:ORG/NAME" downloaded from the Hugging Face hub (or its cache) into a folder.

    `revision` is a branch, a tag or a commit of the repository, None for the newest.

    Raises:
        UserError: the path is not there, or the repository cannot be had: no net, no such name, no leave.
    """
    if not source.startswith("hf:"):
        path = local_path(source)
        if not path.exists():
            raise UserError(f"{source} is not there: give a file, a folder or hf:ORG/NAME.")
        return path
    repository = source.removeprefix("hf:")
    if not is_repository(repository):
        raise UserError(f"{source!r} names no repository: write hf:ORG/NAME, such as hf:facebook/DiT-XL-2-256.")
    return _download(repository, revision)


def is_repository(name: str) -> bool:
    """Whether a name can be that of a repository: ORG/NAME."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def _download(repository: str, revision: str | None) -> pathlib.Path:
    """The folder with a hub repository's files, just the `needed_files`; without a net, what the cache has of them."""
    import huggingface_hub

    try:
        siblings = huggingface_hub.model_info(repository, revision=revision, timeout=10).siblings or []
        files = needed_files(file.rfilename for file in siblings)
        return pathlib.Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as error:  # every layer below raises its own, from sockets to the hub's
        reason = first_line(error)
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception:
        at = f" at the revision {revision!r}" if revision else ""
        raise UserError(
            f"hf:{repository}{at} cannot be downloaded ({reason}): see that there is a net and that the name is "
            f"right, or give a folder with a copy of it."
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


def check_push(repository: str) -> None:
    """Raises UserError if a name is none of a repository, or there is no token to write with."""
    import huggingface_hub

    if not is_repository(repository):
        raise UserError(f"--push is {repository!r}, which names no repository: write ORG/NAME.")
    if huggingface_hub.get_token() is None:
        raise UserError("--push needs a token that may write to the hub: log in with 'hf auth login' first.")


def push_folder(folder: pathlib.Path, repository: str, is_public: bool) -> str:
    """Puts a folder's files on the hub in one commit, and gives its address; other files there stay.

    Args:
        folder: its files.
        repository: ORG/NAME, which is made if it is not there.
        is_public: of one that is made, or else its owners alone see it.

    Raises:
        UserError: it cannot be had: no net, no leave.
    """
    import huggingface_hub

    try:
        huggingface_hub.create_repo(repository, private=not is_public, exist_ok=True)
        # not upload_folder, which may make several commits of a large one
        added = [
            huggingface_hub.CommitOperationAdd(path.relative_to(folder).as_posix(), path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        pushed = huggingface_hub.create_commit(repository, added, commit_message="Export of ard_jax")
    except Exception as error:  # every layer below raises its own
        raise UserError(
            f"{folder} is whole, but was not put on the hub as {repository} ({first_line(error).rstrip('.')}): see "
            f"that there is a net and that your token may write there, and run the same command again."
        ) from None
    return str(pushed.commit_url)
