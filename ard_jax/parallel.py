"""The mesh of devices and how arrays lie on it: parameters on every device, batches split over them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ard_jax.errors import UserError


def is_first() -> bool:
    """Whether this process is the one that logs, and writes what is written once."""
    return jax.process_index() == 0


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh ("data") over the given devices, by default all of every process."""
    return Mesh(np.asarray(devices or jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over the mesh."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, mesh: Mesh, key: str) -> None:
    """Raises UserError if the devices cannot share a batch evenly."""
    if batch_size % mesh.size:
        raise UserError(
            f"{key} {batch_size} cannot be split evenly over {mesh.size} devices: choose a multiple of {mesh.size}."
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch (a pytree of NumPy arrays) → global arrays split over the mesh.

    Integers become int32, the widest that devices have by default: labels, and positions below 2³¹.
    """
    sharding = batch_sharding(mesh)

    def put(rows):
        rows = rows.astype(np.int32) if np.issubdtype(rows.dtype, np.integer) else rows
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(put, batch)


def in_turns(function: Callable[[jax.Array], jax.Array], rows: jax.Array, mesh: Mesh, limit: int) -> jax.Array:
    """Applies `function` to a split batch a few rows at a time, every device to its own: less memory, the same result.

    Args:
        function: (rows, …) → (rows, …), a row at a time of its own accord.
        rows: (batch, …), split over the mesh.
        mesh: of devices.
        limit: rows a device works on at a time, at most; fewer where that does not divide its share.
    """
    share = len(rows) // mesh.size
    at_once = max(size for size in range(1, min(limit, share) + 1) if share % size == 0)
    turns = rows.reshape(mesh.size, share // at_once, at_once, *rows.shape[1:]).swapaxes(0, 1)
    split = NamedSharding(mesh, PartitionSpec(None, "data"))

    def turn(rows):
        return function(rows.reshape(-1, *rows.shape[2:]))

    results = jax.lax.map(turn, jax.lax.with_sharding_constraint(turns, split))  # turn, device · row, …
    results = results.reshape(*turns.shape[:3], *results.shape[2:]).swapaxes(0, 1)
    return results.reshape(len(rows), *results.shape[3:])


def equal_batches(numbers: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Numbers in batches of one size, so that one program serves: (batch, how many of it count)."""
    for first in range(0, len(numbers), batch_size):
        some = numbers[first : first + batch_size]
        yield np.resize(some, batch_size), len(some)  # the last batch is filled up, then cut


def run_batches(run: Callable[[Any], Any], batches: Iterable[tuple[Any, int]]) -> Iterator[Any]:
    """Runs a program over batches in order: the next is on the device while the last is fetched and written.

    Args:
        run: batch → a pytree of arrays (batch, …).
        batches: (batch, how many of its rows count).

    Yields:
        The results as NumPy arrays (rows that count, …).
    """

    def fetch(results, count):
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], results)

    pending = None
    for batch, count in batches:
        following = run(batch), count
        if pending is not None:
            yield fetch(*pending)
        pending = following
    if pending is not None:
        yield fetch(*pending)
