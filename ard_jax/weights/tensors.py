"""Named arrays in files: safetensors, alone or in shards with an index, and PyTorch's files through `pickles`.

An XL/2 is 2.7 GB, so `open_tensors` reads no array before it is asked for; shapes come from the headers alone.
"""

import functools
import json
import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import overload

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ard_jax.errors import UserError, first_line
from ard_jax.files import atomic_write
from ard_jax.weights.lazy import DTYPES, Stored, Tensors, dtypes_of
from ard_jax.weights.pickles import open_state_dict

log = logging.getLogger("ard_jax")

SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.")  # what wrappers put before every name


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads every array of `open_tensors` into memory."""
    return dict(open_tensors(path))


def open_tensors(path: str | os.PathLike, leave_out: str | tuple[str, ...] = ()) -> Tensors:
    """The arrays of a file, or of a folder as diffusers writes it, types as they are stored.

    Args:
        path: a .safetensors file, a PyTorch file of a state dict, or a folder with one of them or with shards and
            their index. A folder's full-precision safetensors come before its fp16 ones, and those before pickles.
        leave_out: how names end that are left out, whatever their type.

    Raises:
        UserError: it is not there, is truncated or corrupt, or a shard or an array that the index names is missing.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _weights_file(path)
    if not path.is_file():
        raise UserError(f"{path} is not there: give a .safetensors file, or a folder that holds one.")
    if path.suffix == ".json":
        return _open_shards(path, leave_out)
    if path.suffix in PICKLE_SUFFIXES:
        return open_state_dict(path, leave_out)
    return _open_safetensors(path, leave_out)


def _open_safetensors(path: pathlib.Path, leave_out: str | tuple[str, ...]) -> Tensors:
    """The arrays of one .safetensors file, but for names that end on `leave_out`.

    They are read by `pread`: a mapped file would count as this process's memory for as long as it is open.

    Raises:
        UserError: the file is truncated or corrupt, or has arrays that are no floats of 16 bits or more.
    """
    try:
        file = safe_open(path, "np", backend="pread")
        every = file.keys()
        slices = {name: file.get_slice(name) for name in every if not name.endswith(leave_out)}
        headers = {name: (tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or corrupt, or no safetensors file ({first_line(error)}): fetch it again."
        ) from None
    unsupported = [f"{name} is {dtype}" for name, (_, dtype) in headers.items() if dtype not in DTYPES]
    if unsupported:
        raise UserError(
            f"{path} holds arrays that are no floats of 16, 32 or 64 bits ({', '.join(unsupported[:3])}): "
            f"give the weights in one of these, not quantised."
        )
    stored = {
        name: Stored(shape, DTYPES[dtype], functools.partial(file.get_tensor, name))
        for name, (shape, dtype) in headers.items()
    }
    return Tensors(stored, file.metadata())


def _open_shards(index: pathlib.Path, leave_out: str | tuple[str, ...]) -> Tensors:
    """The arrays that an index of shards names, but for names that end on `leave_out`.

    Raises:
        UserError: the index is no index, a shard is missing, or a shard lacks an array.
    """
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()) | {""})[1:]  # raises if one is no string
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of shards (a JSON with a weight_map): fetch it again.") from None
    for shard in shards:
        if pathlib.Path(shard).name != shard or not (index.parent / shard).is_file():
            raise UserError(
                f"the shard {shard!r} that {index} names is missing: fetch it again and put it beside the index."
            )
    opened = {shard: open_tensors(index.parent / shard, leave_out) for shard in shards}
    shard_of = {name: shard for name, shard in shard_of.items() if not name.endswith(leave_out)}
    for name, shard in shard_of.items():
        if name not in opened[shard]:
            raise UserError(
                f"the shard {index.parent / shard} has no array {name!r}, which {index.name} says it has: "
                f"fetch both again."
            )
    metadata = {key: value for shard in opened.values() for key, value in shard.metadata.items()}
    return Tensors({name: opened[shard].stored[name] for name, shard in shard_of.items()}, metadata)


def _weights_file(folder: pathlib.Path) -> pathlib.Path:
    """The one weights file, or the index of shards, of a folder.

    Raises:
        UserError: there is none, or more than one that could be meant.
    """
    for suffix in ("safetensors", "bin"):
        files = [path for path in sorted(folder.glob(f"*.{suffix}")) if not path.name.startswith(".")]
        indices = sorted(folder.glob(f"*.{suffix}.index*.json"))
        whole = [path for path in files if not SHARD.search(path.name)]
        if files and not whole and not indices:
            raise UserError(f"{folder} has shards such as {files[0].name} but not their index: fetch the index too.")
        choices = sorted([*whole, *indices], key=lambda path: len(variant(path)))
        best = [path for path in choices if len(variant(path)) == len(variant(choices[0]))]
        if len({path.name.split(".")[0] for path in best}) > 1:
            raise UserError(
                f"{folder} has several weights files ({', '.join(path.name for path in best)}): name the one you mean."
            )
        if best:
            return best[0]
    raise UserError(f"{folder} holds no weights: a .safetensors file, or shards with their index, belong there.")


def variant(path: pathlib.PurePath) -> list[str]:
    """What a file's name says beside its kind: ["fp16"] for diffusion_pytorch_model.fp16.safetensors."""
    words = SHARD.sub(".", path.name).split(".")[1:]
    return [word for word in words if word not in ("safetensors", "bin", "index", "json")]


def without_prefixes(tensors: Tensors) -> Tensors:
    """Names as the model's own, without what wrappers put before all of them."""
    stored = tensors.stored
    while prefix := next((p for p in PREFIXES if stored and all(name.startswith(p) for name in stored)), None):
        stored = {name.removeprefix(prefix): array for name, array in stored.items()}
    return Tensors(stored, tensors.metadata)


@overload
def to_float32(tensors: Tensors, where: str | os.PathLike) -> Tensors: ...


@overload
def to_float32(tensors: Mapping[str, np.ndarray], where: str | os.PathLike) -> Mapping[str, np.ndarray]: ...


def to_float32(tensors: Mapping[str, np.ndarray], where: str | os.PathLike) -> Mapping[str, np.ndarray]:
    """The arrays as float32; half precision loses nothing by that, and the log says so once.

    Args:
        tensors: names to arrays; `Tensors` stay unread.
        where: they come from, for the log.
    """
    others = sorted({dtype.name for dtype in dtypes_of(tensors).values() if dtype != np.float32})
    if not others:
        return tensors
    log.info("%s holds %s weights, which become float32 here.", where, " and ".join(others))
    if not isinstance(tensors, Tensors):
        return {name: np.asarray(array, np.float32) for name, array in tensors.items()}
    stored = {
        name: Stored(array.shape, np.dtype(np.float32), functools.partial(_read_float32, array))
        for name, array in tensors.stored.items()
    }
    return Tensors(stored, tensors.metadata)


def _read_float32(array: Stored) -> np.ndarray:
    return np.asarray(array.read(), np.float32)


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one .safetensors file, whole or not at all; the same arrays and words give the same bytes.

    Args:
        path: of the file.
        tensors: names to NumPy or JAX arrays of floats, bfloat16 included.
        metadata: words beside them.
    """
    # safetensors takes raw memory; np.ascontiguousarray would make a vector of a single number
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}

    def write(temporary: pathlib.Path) -> None:
        save_file(arrays, temporary, dict(metadata or {}))
        _sort_metadata(temporary)

    atomic_write(path, write)


def _sort_metadata(path: pathlib.Path) -> None:
    """Puts a file's metadata, which safetensors writes in an order of chance, into that of its names."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if words := header.pop("__metadata__", None):
            header = {"__metadata__": dict(sorted(words.items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # what is left over is filled with spaces, as the format has it
            file.seek(8)
            file.write(text.ljust(length))
