"""PyTorch's files, through `torch.load(weights_only=True)` alone: nothing in them is ever run.

torch is not among ard_jax's own requirements, so it is imported when such a file is met.
"""

import argparse
import ctypes
import mmap
import pathlib
import pickle
import re
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ard_jax.errors import UserError, first_line
from ard_jax.weights.lazy import DTYPES, Stored, Tensors


def _import_torch(path: pathlib.Path) -> types.ModuleType:
    """torch; UserError with the command that installs it where it is missing."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is PyTorch's own format, which torch reads: pip install torch (the CPU build will do), or give "
            f"safetensors."
        ) from None
    return torch


def load(path: pathlib.Path) -> Any:
    """What a PyTorch file holds: tensors (mapped from the file where its format allows), containers, plain values, and
    the `argparse.Namespace` that published training checkpoints keep their arguments in.

    Raises:
        UserError: it holds anything else, which is refused unread; it is truncated or corrupt; there is no torch.
    """
    torch = _import_torch(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f" ({refused[1]})" if refused else ""
        raise UserError(
            f"{path} is corrupt or holds more than arrays and plain values{found}, so it was refused and nothing in it "
            f"was run: give a state dict or safetensors."
        ) from None
    except Exception as error:  # zip, pickle and torch each raise their own
        raise UserError(
            f"{path} is truncated or corrupt, or no PyTorch file ({first_line(error)}): fetch it again."
        ) from None


def open_state_dict(path: pathlib.Path, leave_out: str | tuple[str, ...] = ()) -> Tensors:
    """The arrays of a PyTorch file that is a state dict and nothing else, but for names that end on `leave_out`.

    Raises:
        UserError: it is something else, or what `load` raises.
    """
    return state_dict_tensors(load(path), path, leave_out)


def state_dict_tensors(loaded: Any, path: pathlib.Path, leave_out: str | tuple[str, ...] = ()) -> Tensors:
    """A loaded state dict as `Tensors`; they hold the file open, and no array in memory.

    Names that end on `leave_out` are left out, whatever their type.

    Raises:
        UserError: it is no state dict, or has tensors that are no floats of 16 bits or more.
    """
    torch = _import_torch(path)
    if not isinstance(loaded, Mapping) or not all(torch.is_tensor(value) for value in loaded.values()) or not loaded:
        keys = f" (it has {', '.join(map(repr, list(loaded)[:5]))})" if isinstance(loaded, Mapping) else ""
        raise UserError(f"{path} is no state dict of names and tensors{keys}: give one with the published names.")
    loaded = {name: tensor for name, tensor in loaded.items() if not str(name).endswith(leave_out)}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in loaded.items()}
    supported = [dtype.name for dtype in DTYPES.values()]
    unsupported = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in supported]
    if unsupported:
        raise UserError(
            f"{path} holds tensors that are no floats of 16, 32 or 64 bits ({', '.join(unsupported[:3])}): "
            f"give the weights in one of these, not quantised."
        )
    mapped = _is_mapped(path)
    stored = {
        str(name): Stored(tuple(tensor.shape), np.dtype(dtypes[name]), _reader(torch, tensor, mapped))
        for name, tensor in loaded.items()
    }
    return Tensors(stored)


def _is_mapped(path: pathlib.Path) -> bool:
    """Whether `load` leaves the file's arrays in the file: a zip whose bytes need no swapping."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    return all(order == sys.byteorder.encode() for order in orders)


def _reader(torch: types.ModuleType, tensor: Any, mapped: bool) -> Callable[[], np.ndarray]:
    """A function that copies a tensor into memory of its own, and lets the mapped pages of the file go."""

    def read():
        values = tensor.detach().contiguous()
        if values.dtype == torch.bfloat16:
            array = values.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        else:
            array = values.numpy().copy()
        if mapped:
            storage = tensor.untyped_storage()
            _release_pages(storage.data_ptr(), storage.nbytes())
        return array

    return read


def _release_pages(address: int, size: int) -> None:
    """Drops the whole pages of a read-only mapping from this process's memory; reading them again maps them again.

    Without it a converted file counts twice: as its pages and as the copies.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
