"""Files that are either whole or absent, and the hashes that say what is in them."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import platform
import re
import secrets
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
from jax.experimental import multihost_utils

from ard_jax.errors import UserError, first_line
from ard_jax.types import PyTree

log = logging.getLogger("ard_jax")

PACKAGE = pathlib.Path(__file__).resolve().parent


def find_repository() -> pathlib.Path:
    """The folder that launch/, pipelines/ and requirements/ are in: what the package lies in, or, where that is
    installed, the current folder; the former where neither is it.
    """
    places = (PACKAGE.parent, pathlib.Path.cwd())
    return next((place for place in places if (place / "launch" / "quickstart.sh").is_file()), places[0])


def local_path(path: str | os.PathLike) -> pathlib.Path:
    """A path as its user meant it: `~` is a home folder.

    Raises:
        UserError: it has a scheme, such as gs://, or there is no such home.
    """
    text = os.fspath(path)
    if re.match(r"[a-z][a-z0-9+.-]+:/", text):
        raise UserError(
            f"{text} is no path on this machine, and nothing is read or written elsewhere: mount it (gcsfuse does a "
            f"bucket, and launch/tpu_pod.sh does so on a pod by itself) and give the path where it is mounted."
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text} cannot be used ({first_line(error)}): write the whole path.") from None


def cache_folder() -> pathlib.Path:
    """Where the user keeps what can be made again; it need not be there."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ard_jax"


def atomic_write(path: str | os.PathLike, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write(temporary)` and renames the result to `path` only if it succeeded.

    The temporary file lies in the same folder, so that the rename is atomic; it keeps
    the suffix of `path`, since many writers choose their format by it.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # it has its name before it is there: a signal may come at any instruction, and nothing shall be left
    temporary = path.with_name(f".partial-{secrets.token_hex(8)}{path.suffix}")
    try:
        write(temporary)
        temporary.chmod(0o644)  # results are meant to be read
        _sync(temporary)
        os.replace(temporary, path)
        _sync_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: pathlib.Path) -> None:
    """Waits until a file is on the disk: a crash of the machine may come at any time."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_names(folder: pathlib.Path) -> None:
    """The same of the names in a folder, where the file system knows how."""
    with contextlib.suppress(OSError):
        _sync(folder)


@contextlib.contextmanager
def locked(path: pathlib.Path, wait: bool = False) -> Iterator[None]:
    """A lock that one process at a time has; it is free again when that ends, however it ends.

    Args:
        path: of the lock's file, which says who has it, and is there just while somebody does.
        wait: for whoever has it.

    Raises:
        UserError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{path.parent} is in use by {owner}: wait until that has ended, or choose another --workdir."
            ) from None
        except OSError as error:  # some file systems know no locks
            log.warning("%s cannot be locked (%s), so two processes may meet there.", path.parent, first_line(error))
            break
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # whoever had it has taken the file away meanwhile
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill, which takes the place of `folder` if nothing fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
        new = pathlib.Path(temporary) / "new"
        new.mkdir()
        yield new
        for path in new.rglob("*"):
            (_sync_names if path.is_dir() else _sync)(path)
        if folder.exists():
            os.replace(folder, pathlib.Path(temporary) / "old")
        os.replace(new, folder)
        _sync_names(folder.parent)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=False, allow_nan=True) + "\n"
    write_text(path, text)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file as UTF-8, atomically."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


AGAIN = "restore it from a copy, or move it away and run the stage that wrote it again"


def read_json(path: str | os.PathLike, of: Any = Any, remedy: str = AGAIN) -> Any:
    """A JSON file's value.

    Args:
        path: of the file.
        of: what it must be: a type, or a TypedDict with the keys that are read.
        remedy: what to do about a damaged file.

    Raises:
        UserError: the file is empty, cut or otherwise damaged, or holds something else.
        OSError: it cannot be opened.
    """
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        msgspec.convert(value, of)
        return value  # with the keys that nobody reads here
    except ValueError as error:  # of the encoding, of JSON and of msgspec
        raise UserError(f"{path} is damaged ({first_line(error)}): {remedy}.") from None


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a file of one a line, but for lines that are damaged; none if there is no such file."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(msgspec.convert(json.loads(line), dict[str, Any]))
    return found


def file_sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(tree: PyTree, look: Callable[[str, np.ndarray], None] = lambda name, array: None) -> str:
    """SHA-256 of a pytree of arrays: names, types, shapes and bytes, in the order of the names; `look` sees each.

    Leaves are fetched one at a time, so the host never holds a second copy of the tree. Where they are spread over
    several processes, all of them have to ask.
    """
    digest = hashlib.sha256()
    for name, leaf in named_leaves(tree):
        array = to_host(leaf)
        look(name, array)
        hash_leaf(digest, name, array)
    return digest.hexdigest()


def named_leaves(tree: PyTree) -> list[tuple[str, PyTree]]:
    """The leaves of a pytree with their names, in the order of the names."""
    return sorted(
        ((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)),
        key=lambda named: named[0],
    )


def hash_leaf(digest: "hashlib._Hash", name: str, array: np.ndarray) -> None:
    """Adds the next of `named_leaves` to the hash that `tree_sha256` makes."""
    digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # no copy: stacks have gigabytes


def require_finite(name: str, array: np.ndarray) -> None:
    """Raises UserError for a parameter that holds NaN or infinity."""
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise UserError(
            f"the weights {name} hold {bad} numbers that are NaN or infinite, of {array.size}: they have diverged or "
            f"were damaged on the way, so take an earlier checkpoint, or fetch them again."
        )


def to_host(array: jax.typing.ArrayLike) -> np.ndarray:
    """An array of this process or of several, as a whole."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> None:
    """Arrays by name."""
    # NumPy's annotations take every name for that of its flag `allow_pickle` too
    atomic_write(path, lambda temporary: np.savez(temporary, **arrays))  # type: ignore[arg-type]


def join_npz(
    path: pathlib.Path,
    parts: Sequence[pathlib.Path],
    shapes: Mapping[str, tuple[int, ...]],
    others: Mapping[str, np.ndarray] = types.MappingProxyType({}),
) -> None:
    """Writes one npz file of what lies in several, row after row: byte for byte what `write_npz` would write.

    Args:
        path: of the file.
        parts: npz files; memory holds an array of one of them at a time.
        shapes: of the whole arrays by name, in their order.
        others: whole arrays that come after these.
    """

    def write(temporary: pathlib.Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
            for name, shape in shapes.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    for number, part in enumerate(parts):
                        rows = np.ascontiguousarray(read_npz(part, (name,))[name])
                        if not number:
                            header = np.lib.format.header_data_from_array_1_0(rows) | {"shape": shape}
                            np.lib.format.write_array_header_1_0(entry, header)
                        entry.write(rows.data)
            for name, array in others.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)

    atomic_write(path, write)


def read_npz(path: pathlib.Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name, all or those of some names that are there.

    Raises:
        UserError: it is not there, is cut short or altered, or holds objects, which would have to be unpickled.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file if names is None or name in names}
    except (FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}), since it was altered or lost: move its "
            f"folder away and run the stage that wrote it again."
        ) from None
