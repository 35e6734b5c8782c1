"""The mesh of devices and how arrays lie on it.

A batch is split over `data` and `fsdp`. Parameters, their average and the optimiser's state are split over `fsdp`, each
layer's being gathered when it is its turn, and over `tensor`, whose devices share the heads and the MLP of a layer.
`partition.logical_axes` says what the axes of a parameter stand for, `RULES` what lies along which axis of the mesh.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ard_jax.errors import UserError
from ard_jax.models.partition import divisible_spec, logical_axes
from ard_jax.types import PyTree

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
log = logging.getLogger("ard_jax")
DATA_ONLY = {"data": -1, "fsdp": 1, "tensor": 1}
RULES = (("batch", BATCH), ("embed", "fsdp"), ("heads", "tensor"), ("mlp", "tensor"))


# What a TPU computes and sends at once; narrower parts are padded. By libtpu's programs XL/2's step sends 8 GB a chip
# with parts of 18, and 4 with parts of 144.
LANES = 128

# A chip computes with a layer's weights for as long as it takes to send them (v5e: 197 TFLOP/s, 200 GB/s).
TOKENS = 1024

# Bytes of the training's state that a chip of 16 GB has room for where little of it should be sent.
STATE_PART = 4e9

# A layer's parameters are gathered whole before it is their turn. libtpu would rather multiply by one chip's part at a
# time, which are thin here (72 of XL/2's width on 16 chips), and add to the result in memory each time: by its own
# programs that moves 6 times the bytes in sampling.
LIBTPU_FLAG = "--xla_jf_spmd_threshold_for_windowed_einsum_mib"


def set_up_libtpu() -> None:
    """Settings of TPU's compiler, for runs and plans alike; they count if they come before it is loaded."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    if LIBTPU_FLAG not in given:
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {LIBTPU_FLAG}=1000000".strip()


def is_first() -> bool:
    """Whether this process is the one that logs, and writes what is written once."""
    return jax.process_index() == 0


def make_mesh(
    settings: Mapping[str, int] = DATA_ONLY, devices: Sequence[jax.Device] | None = None, width: int | None = None
) -> Mesh:
    """The mesh of `config.mesh` over the given devices, by default all of every process.

    Args:
        settings: sizes of "data", "fsdp" and "tensor"; one of them may be -1, which is what the others leave.
        devices: to lay out.
        width: of the network whose parameters fsdp splits. It then gets the largest share of its devices that divides
            the width, or if it is -1, that leaves each a part of `LANES` at least; data gets the rest, and it is said.

    Raises:
        UserError: the sizes do not fit the number of devices, or the tensor axis would cross hosts.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: settings[axis] for axis in AXES}
    count, asked = len(devices), ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    rest = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) > 1 or count % fixed or (not rest and fixed != count):
        raise UserError(
            f"the mesh {asked} does not fit {count} devices: the product of data, fsdp and tensor must be {count}, "
            f"where one of them may be -1 for what the others leave."
        )
    sizes |= {axis: count // fixed for axis in rest}
    if width is not None:
        share = fsdp_share(width, sizes["fsdp"], least=LANES if rest == ["fsdp"] else 1)
        if share != sizes["fsdp"]:
            _say_once(
                f"mesh.fsdp: the network's width {width} is split over {share} of the {sizes['fsdp']} devices, and "
                f"mesh.data takes the rest."
            )
            sizes |= {"data": sizes["data"] * sizes["fsdp"] // share, "fsdp": share}
    shape = tuple(sizes[axis] for axis in AXES)
    # a TPU's neighbours along an axis are then neighbours by wire
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if _crosses_hosts(grid):
        by_host = sorted(devices, key=lambda device: (device.process_index, device.id))
        grid = np.asarray(by_host).reshape(shape)
    if _crosses_hosts(grid):
        here = count // len({device.process_index for device in devices})
        raise UserError(
            f"mesh.tensor is {sizes['tensor']}, but a host has {here} devices: choose a divisor of that, since each "
            f"host reads the rows of its own devices, and those of a tensor axis share theirs."
        )
    return Mesh(grid, AXES)


def tensor_share(devices: Sequence[jax.Device], heads: int, batch_size: int, tokens: int) -> int:
    """How many devices should share each layer of a training: one, unless the batch is small for the devices.

    With fewer than `TOKENS` tokens a device, gathering the weights takes longer than computing with them, and of two
    devices that share a layer, each gathers half. And a batch of fewer rows than devices needs to be shared.

    Args:
        devices: of the mesh.
        heads: of the network.
        batch_size: of the training.
        tokens: of a row of the batch.
    """
    count, host = len(devices), len(devices) // len({device.process_index for device in devices})
    if batch_size % count == 0 and batch_size * tokens // count > TOKENS:
        return 1
    shares = (share for share in range(2, host + 1) if host % share == heads % share == batch_size * share % count == 0)
    return next(shares, 1)


def state_share(devices: int, width: int, state_bytes: int) -> int:
    """The fewest of some devices that split a training's state into parts of `STATE_PART`, evenly; or the most."""
    parts = [part for part in range(1, devices + 1) if devices % part == 0 == width % part]
    return next((part for part in parts if state_bytes // part <= STATE_PART), parts[-1])


def fsdp_share(width: int, devices: int, least: int = 1) -> int:
    """The largest divisor of `devices` that splits a width into equal parts of `least` or more; 1 if none does."""
    parts = (part for part in range(1, devices + 1) if devices % part == 0 == width % part)
    return max(part for part in parts if part == 1 or width // part >= least)


@functools.cache
def _say_once(line: str) -> None:
    if is_first():
        log.info(line)


def _crosses_hosts(grid: np.ndarray) -> bool:
    """Whether devices (data, fsdp, tensor) along the tensor axis belong to different hosts."""
    hosts = np.vectorize(lambda device: device.process_index)(grid)
    return bool((hosts != hosts[..., :1]).any())


def local_mesh(settings: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a job that every host does alone: its own devices, split by tensor and fsdp as far as they go."""
    devices = jax.local_devices() if devices is None else devices
    tensor = max(1, settings["tensor"])
    fsdp = math.gcd(max(1, settings["fsdp"]), max(1, len(devices) // tensor))
    return make_mesh(DATA_ONLY | {"fsdp": fsdp, "tensor": tensor}, devices)


def on_mesh(mesh: Mesh) -> Callable[[Callable], Callable]:
    """Decorates a function to be jitted: while it is traced, `partition.constrain` obeys the mesh and `RULES`."""

    def decorate(function):
        @functools.wraps(function)
        def traced(*args):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
                return function(*args)

        return traced

    return decorate


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def sharding_of(tree: PyTree, mesh: Mesh) -> PyTree:
    """How parameters, and states that hold such trees (averages, an optimiser's moments), lie on a mesh.

    Args:
        tree: of arrays or shapes; what an axis of a leaf stands for is told by the names that its path ends in.
        mesh: of devices.

    Returns:
        The same tree of NamedShardings. An axis that its part of the mesh does not divide stays whole.

    Raises:
        UserError: nothing says what the axes of a matrix stand for.
    """

    def sharding(path, leaf):
        spec = nn.logical_to_mesh_axes(logical_axes(path, len(leaf.shape)), RULES)
        assert spec is not None  # Flax has None for no names alone
        return NamedSharding(mesh, divisible_spec(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def whole_matrices(tree: PyTree, mesh: Mesh, large: int = 2**20) -> dict[str, int]:
    """Large matrices that every device keeps whole where others are split: bytes by name, largest first.

    Args:
        tree, mesh: as `sharding_of` takes them.
        large: bytes from which on a matrix counts.
    """
    if mesh.shape["fsdp"] == 1:
        return {}  # as was asked for
    shardings = jax.tree.leaves(sharding_of(tree, mesh))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size * leaf.dtype.itemsize
        for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(tree), shardings, strict=True)
        if len(leaf.shape) > 1 and sharding.is_fully_replicated
    }
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return {name: size for name, size in ordered if size >= large}


def with_shardings(shapes: PyTree, mesh: Mesh) -> PyTree:
    """Shapes with the sharding that their arrays shall have, see `sharding_of`."""

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, sharding_of(shapes, mesh))


def check_batch(settings: Mapping[str, int], mesh: Mesh, section: str) -> None:
    """Raises UserError if the devices cannot share a stage's batch, or each of its microbatches, evenly."""
    size, accumulate = settings["batch_size"], settings["accumulate"]
    unit = batch_shards(mesh) * accumulate
    if size % unit:
        over = f"{batch_shards(mesh)} parts (mesh.data × mesh.fsdp)"
        over += f" of {accumulate} microbatches" if accumulate > 1 else ""
        raise UserError(f"{section}.batch_size {size} cannot be split evenly over {over}: choose a multiple of {unit}.")


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """This process's rows of a batch (a pytree of NumPy arrays) → global arrays split over the mesh.

    Integers become int32, the widest that devices have by default: labels, and positions below 2³¹.
    """
    sharding = batch_sharding(mesh)

    def put(rows):
        rows = rows.astype(np.int32) if np.issubdtype(rows.dtype, np.integer) else rows
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(put, batch)


def split_in_turns(rows: jax.Array, mesh: Mesh, turns: int) -> jax.Array:
    """A split batch (batch, …) → (turn, batch / turns, …), every device keeping its own rows."""
    shards = batch_shards(mesh)
    parts = rows.reshape(shards, turns, -1, *rows.shape[1:]).swapaxes(0, 1)
    parts = parts.reshape(turns, -1, *rows.shape[1:])
    return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, BATCH)))


def in_turns(function: Callable[[jax.Array], jax.Array], rows: jax.Array, mesh: Mesh, limit: int) -> jax.Array:
    """Applies `function` to a split batch a few rows at a time, every device to its own: less memory, the same result.

    Args:
        function: (rows, …) → (rows, …), a row at a time of its own accord.
        rows: (batch, …), split over the mesh.
        mesh: of devices.
        limit: rows a device works on at a time, at most; fewer where that does not divide its share.
    """
    shards = batch_shards(mesh)
    share = len(rows) // shards
    at_once = max(size for size in range(1, min(limit, share) + 1) if share % size == 0)
    results = jax.lax.map(function, split_in_turns(rows, mesh, share // at_once))  # turn, device · row, …
    results = results.reshape(share // at_once, shards, at_once, *results.shape[2:]).swapaxes(0, 1)
    return results.reshape(len(rows), *results.shape[3:])


def equal_batches(numbers: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Numbers in batches of one size, so that one program serves: (batch, how many of it count)."""
    for first in range(0, len(numbers), batch_size):
        some = numbers[first : first + batch_size]
        yield np.resize(some, batch_size), len(some)  # the last batch is filled up, then cut


def run_batches(run: Callable[[PyTree], PyTree], batches: Iterable[tuple[PyTree, int]]) -> Iterator[PyTree]:
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
