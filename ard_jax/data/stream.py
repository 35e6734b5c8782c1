"""The endless, resumable stream of batches that training reads."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np

from ard_jax.data.memory import THREADS, InMemory, Record, Source
from ard_jax.errors import UserError
from ard_jax.types import Batch, Batches, PyTree


def stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = THREADS,
) -> grain.DatasetIterator:
    """Endless shuffled batches: what is read is a function of (source, batch_size, seed, batches read so far) alone.

    The records stand in one endless row, every epoch in a new order; global batch k is positions
    [k·batch_size, (k+1)·batch_size) of it, and process p of P gets its rows [p·B/P, (p+1)·B/P), in that order.

    Args:
      source: any source whose records are dicts of arrays and numbers.
      batch_size: records of a global batch, over all processes.
      seed: of the order, at least 0.
      process_index, process_count: this host and how many there are.
      num_threads: threads that read records while the last batch is worked on; an `InMemory` source needs none.

    Returns:
      A Grain iterator of dicts name → array (batch_size / process_count, …): the records' own entries, and
      "position" int64, each record's place in the endless row, for noise, times and dropout to be drawn from.
      `get_state()` is a JSON-serialisable count of the batches handed out, the same on every process and for
      every process count; `set_state()` of it goes on with the next batch, bit for bit.

    Raises:
      UserError: batch_size is not a positive multiple of process_count, seed is negative, the source is empty.
        Iterating raises what reading a record raises.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size is {batch_size}, but it must be a positive multiple of the {process_count} processes (hosts)."
        )
    if seed < 0:
        raise UserError(f"The data seed is {seed}, but it must be 0 or more.")
    if not len(source):
        raise UserError("The data source holds no records, but training needs at least one: check the data section.")
    if isinstance(source, InMemory):
        take = source.take
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # as Grain advises: threads only cost here
    else:
        take = functools.partial(_take, source, ThreadPoolExecutor(num_threads), num_threads)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)  # batches; each is read by the pool
    batches = _Batches(take, len(source), seed, batch_size, process_index, process_count)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


class Joined:
    """Several streams read side by side: the batches of each under its name, and one state for all.

    Args:
      streams: name → what `stream` returns.
    """

    def __init__(self, streams: Mapping[str, Batches]):
        self.streams = dict(streams)

    def __iter__(self) -> "Joined":
        return self

    def __next__(self) -> Batch:
        return {name: next(batches) for name, batches in self.streams.items()}

    def get_state(self) -> dict[str, PyTree]:
        return {name: batches.get_state() for name, batches in self.streams.items()}

    def set_state(self, state: Mapping[str, PyTree]) -> None:
        """Goes on where a state of `get_state` was taken, bit for bit."""
        for name, batches in self.streams.items():
            batches.set_state(state[name])


@dataclasses.dataclass(frozen=True)
class _Batches:
    """This process's part of every global batch, by the batch's number.

    Grain would shuffle and batch record by record, which costs a millisecond for 64 digits; one gather costs 20 µs.
    """

    take: Callable[[np.ndarray], dict[str, np.ndarray]]
    length: int
    seed: int
    batch_size: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size  # the last position still fits 64 bits

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        rows = self.batch_size // self.process_count
        first = number * self.batch_size + self.process_index * rows
        positions = np.arange(first, first + rows, dtype=np.int64)
        return self.take(_shuffled(positions, self.length, self.seed)) | {"position": positions}


def _take(source: Source, pool: ThreadPoolExecutor, parts: int, indices: np.ndarray) -> dict[str, np.ndarray]:
    """`InMemory.take` for any source: the records are read by `pool` in `parts` runs."""

    def read(part: np.ndarray) -> list[Record]:
        return [source[int(index)] for index in part]

    records = [record for part in pool.map(read, np.array_split(indices, parts)) for record in part]
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def _shuffled(positions: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Places in the endless row (batch,) → records (batch,)."""
    epochs, offsets = np.divmod(positions, length)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _order(length, seed, int(epoch))[offsets[here]]
    return indices


@functools.lru_cache(maxsize=4)  # a batch touches one epoch, or two where they meet; two streams may be joined
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: Grain's own shuffle costs 12 µs an index, half a training step for digits."""
    return np.random.default_rng([seed, epoch]).permutation(length)
