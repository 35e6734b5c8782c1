"""npz files that may be anybody's: images read a batch at a time, and single arrays."""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np

from ard_jax.errors import UserError, first_line
from ard_jax.files import local_path

# What np.load and zipfile raise for files that are cut, altered, or of another kind.
DAMAGES = (EOFError, ValueError, OSError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
FOREIGN = "fetch it again, or save it anew with np.savez"  # what to do about a damaged file of anybody's


class NpzArray:
    """One array of an npz file, of which memory holds a batch of rows at a time, whether it is compressed or not.

    Attributes:
        path: of the file.
        name: of the array.
        shape, dtype: from its header.
    """

    def __init__(self, path: str | os.PathLike, name: str = "arr_0", remedy: str = FOREIGN):
        """Reads the header.

        Args:
            path, name: of the file and of the array in it.
            remedy: what to do about a damaged file.

        Raises:
            UserError: the file is not there or damaged, has no array of that name, or its values would be unpickled.
        """
        self.path, self.name, self.remedy = local_path(path), name, remedy
        names = array_names(self.path, remedy)
        if name not in names:
            raise UserError(
                f"{self.path} has no array {name!r} (it has {', '.join(map(repr, names[:5])) or 'none'}): give an npz "
                f"whose {name} are images, (N, height, width, 3) uint8."
            )
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                self.shape, fortran, self.dtype = _read_header(file)
        except DAMAGES as error:
            raise _damaged(self.path, error, remedy) from None
        if self.dtype.hasobject or fortran:
            kind = (
                "objects, which would have to be unpickled"
                if self.dtype.hasobject
                else "columns first (Fortran's order)"
            )
            raise UserError(
                f"{name} of {self.path} holds {kind}: save it anew with np.savez of plain, contiguous arrays."
            )

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, wanted: Callable[[int], bool] = lambda start: True) -> Iterator[np.ndarray]:
        """Rows in the file's order, `size` at a time, the last ones fewer; with those the zip's checksum is looked at.

        Args:
            size: rows of a batch.
            wanted: whether to yield the batch that begins with a row; others are passed over.

        Raises:
            UserError: the file is cut or altered; what came before was read.
        """
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as file:
                _read_header(file)
                for start in range(0, len(self), size):
                    count = min(size, len(self) - start)
                    if not wanted(start):
                        file.seek(count * row, os.SEEK_CUR)
                        continue
                    content = file.read(count * row)
                    if len(content) != count * row:
                        raise EOFError(f"it ends after {start} of {len(self)} rows")
                    yield np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])
        except DAMAGES as error:
            raise _damaged(self.path, error, self.remedy) from None

    def rows(self, numbers: Iterable[int]) -> np.ndarray:
        """Some rows in the order of the file, (row, …); others are passed over."""
        chosen = set(map(int, numbers))
        found = [*self.batches(1, chosen.__contains__)]
        return np.concatenate(found) if found else np.empty((0, *self.shape[1:]), self.dtype)


def array_names(path: pathlib.Path, remedy: str = FOREIGN) -> list[str]:
    """Names of the arrays of an npz file.

    Raises:
        UserError: it is not there, or is no npz file.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there: give an .npz file.")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except DAMAGES as error:
        raise _damaged(path, error, remedy) from None


def read_array(path: pathlib.Path, name: str, remedy: str = FOREIGN) -> np.ndarray:
    """One whole array of an npz file.

    Raises:
        UserError: the file is damaged, or the array holds objects, which would have to be unpickled.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return file[name]
    except DAMAGES as error:
        raise _damaged(path, error, remedy) from None


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"a header of version {version}")


def _damaged(path: pathlib.Path, error: Exception, remedy: str) -> UserError:
    return UserError(f"{path} cannot be read as npz ({first_line(error)}): {remedy}.")
