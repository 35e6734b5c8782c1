"""A source whose records lie in memory, how any source gets there, and threads that read records side by side."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from ard_jax.errors import UserError
from ard_jax.progress import progress_bar

# Readers wait for storage: a bucket takes some 30 ms a record, of which a step may want dozens. On a fast disk many
# threads read about as fast as two.
THREADS = 64


Record = Mapping[str, np.ndarray | np.generic]


class Source(Protocol):
    """Random-access records: arrays and numbers by name, of the same shapes and types in every record."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Record:
        """Record number `index`."""


class Indexed(Protocol):
    """What has records by number, of any shapes."""

    def __getitem__(self, index: int, /) -> Any:
        """Record number `index`."""


class InMemory:
    """A source whose records lie decoded in memory, as rows of arrays.

    Attributes:
      arrays: name → array (record, …), read-only because records are views of them.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = {name: array.view() for name, array in arrays.items()}
        for array in self.arrays.values():
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> Record:
        return {name: array[index] for name, array in self.arrays.items()}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of the records `indices` (batch,), copied: name → array (batch, …)."""
        return {name: array[indices] for name, array in self.arrays.items()}


class Readers:
    """Threads that read records side by side, for any number of callers at once.

    Args:
      count: of the threads.
    """

    def __init__(self, count: int = THREADS):
        self._pool, self._count = ThreadPoolExecutor(count), count

    def read(self, source: Indexed, indices: np.ndarray) -> list[Any]:
        """The records `indices` (batch,) in their order; the first exception is raised here."""

        def read(part: np.ndarray) -> list[Any]:
            return [source[int(index)] for index in part]

        return [
            record
            for part in self._pool.map(read, np.array_split(indices, min(self._count, len(indices)) or 1))
            for record in part
        ]


def in_memory(source: Source, limit_bytes: int = 2**30) -> Source:
    """The source with every record decoded into memory, or the source itself where that takes over `limit_bytes`."""
    if isinstance(source, InMemory) or not len(source):
        return source
    first = {name: np.asarray(value) for name, value in source[0].items()}
    if len(source) * sum(value.nbytes for value in first.values()) > limit_bytes:
        return source
    arrays = {name: np.empty((len(source), *value.shape), value.dtype) for name, value in first.items()}

    def read(row: int) -> None:
        for name, value in source[row].items():
            arrays[name][row] = value

    in_threads(read, len(source))
    return InMemory(arrays)


def in_threads(function: Callable[[int], None], count: int, chunk: int = 16) -> None:
    """Calls function(0) … function(count - 1) from several threads; the first exception is raised here."""

    def run(start: int) -> None:
        for index in range(start, min(start + chunk, count)):
            function(index)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(run, range(0, count, chunk)):
            pass


def check_records(source: Source) -> None:
    """Reads every record once.

    Raises:
      UserError: some cannot be read; all of them are named.
    """
    found: list[str] = []

    def read(row: int) -> None:
        try:
            source[row]
        except UserError as error:
            found.append(str(error))
        bar.update()

    with progress_bar(len(source), "record") as bar:
        in_threads(read, len(source))
    if found:
        raise UserError(f"{len(found)} of {len(source)} records cannot be used: {' '.join(sorted(found))}")
