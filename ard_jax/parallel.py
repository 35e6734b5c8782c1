"""The mesh of devices and how arrays lie on it: parameters on every device, batches split over them."""

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
