"""The endless, resumable stream of batches that training reads."""

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Mapping

import grain
import jax
import numpy as np

from ard_jax.data.memory import THREADS, InMemory, Readers, Source
from ard_jax.errors import UserError
from ard_jax.types import Batch, Batches, PyTree

# Records that are read before they are wanted, if that is more than two batches: where a step takes 60 ms and 16
# records, what a bucket takes a second for is still there in time.
AHEAD = 256


def stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    memory: int = 2**30,
    complete: Callable[[Batch], Batch] | None = None,
) -> grain.DatasetIterator:
    """Endless shuffled batches: what is read is a function of (source, batch_size, seed, batches read so far) alone.

    The records stand in one endless row, every epoch in a new order; global batch k is positions
    [k·batch_size, (k+1)·batch_size) of it, and process p of P gets its rows [p·B/P, (p+1)·B/P), in that order.

    Args:
      source: any source whose records are dicts of arrays and numbers.
      batch_size: records of a global batch, over all processes.
      seed: of the order, at least 0.
      process_index, process_count: this host and how many there are.
      num_threads: threads that read records, `AHEAD` of them ahead, while the last batch is worked on; 0 for none,
        which is the default for an `InMemory` source.
      memory: bytes that batches read ahead may take; two are in any case.
      complete: batch → batch, which adds what is not in the records, in the threads that read ahead.

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
    if num_threads is None:
        num_threads = 0 if isinstance(source, InMemory) else THREADS  # as Grain advises: threads only cost there
    take = source.take if isinstance(source, InMemory) else functools.partial(_take, source, Readers(num_threads or 1))
    batches = _Batches(take, complete, len(source), seed, batch_size, process_index, process_count)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if num_threads:
        rows = batch_size // process_count
        one = sum(leaf.nbytes for leaf in jax.tree.leaves(batches.rows(np.zeros(1, np.int64))))
        ahead = max(2, min(AHEAD, memory // one) // rows)
        # a thread of Grain's waits for the readers of its batch: as many batches as keep all readers busy, and one more
        options = grain.ReadOptions(num_threads=min(ahead, 2 + num_threads // rows), prefetch_buffer_size=ahead)
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
        """The next batch of each; where one cannot be read, all stay at the last that every one of them gave."""
        before = self.get_state()
        try:
            return {name: next(batches) for name, batches in self.streams.items()}
        except Exception:
            self.set_state(before)
            raise

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
    complete: Callable[[Batch], Batch] | None
    length: int
    seed: int
    batch_size: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size  # the last position still fits 64 bits

    def __getitem__(self, number: int) -> Batch:
        rows = self.batch_size // self.process_count
        first = number * self.batch_size + self.process_index * rows
        return self.rows(np.arange(first, first + rows, dtype=np.int64))

    def rows(self, positions: np.ndarray) -> Batch:
        """What stands at some positions (batch,) of the endless row."""
        batch = self.take(_shuffled(positions, self.length, self.seed)) | {"position": positions}
        return self.complete(batch) if self.complete else batch


def _take(source: Source, readers: Readers, indices: np.ndarray) -> dict[str, np.ndarray]:
    """`InMemory.take` for any source."""
    records = readers.read(source, indices)
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def _shuffled(positions: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Places in the endless row (batch,) → records (batch,)."""
    epochs, offsets = np.divmod(positions, length)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        with _ORDERING:
            order = _order(length, seed, int(epoch))
        indices[here] = order[offsets[here]]
    return indices


_ORDERING = threading.Lock()  # millions of records are permuted once, by the first thread that wants it


@functools.lru_cache(maxsize=4)  # a batch touches one epoch, or two where they meet; two streams may be joined
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: Grain's own shuffle costs 12 µs an index, half a training step for digits."""
    return np.random.default_rng([seed, epoch]).permutation(length)
