"""A checkpoint of arrays that are not read yet, leaf by leaf, and the hash of a source's files."""

import asyncio
import concurrent.futures
import hashlib
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

from ard_jax.files import file_sha256, hash_leaf, named_leaves
from ard_jax.types import PyTree
from ard_jax.weights.lazy import Stored


def save_parameters(directory: pathlib.Path, params: PyTree, look: Callable[[str, np.ndarray], None]) -> str:
    """A checkpoint of just the part "ema", at step 0.

    Args:
        directory: of the checkpoints.
        params: a pytree of `Stored`. They are read one at a time, so that memory holds two, however many there are.
        look: sees each with its name, and may raise.

    Returns:
        The parameters' `tree_sha256`.
    """
    writer = _StoredHandler(params, look)
    handlers = ocp.type_handlers.create_type_handler_registry(
        (Stored, writer), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # Weights do not get smaller by being compressed.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=handlers)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(directory.absolute(), options=options, item_handlers={"ema": handler}) as manager:
        manager.save(0, args=ocp.args.Composite(ema=ocp.args.PyTreeSave(params)))
    return writer.digest.hexdigest()


class _StoredHandler(ocp.type_handlers.NumpyHandler):
    """Has Orbax write arrays that are not read yet: while one is written and hashed, the next is read."""

    def __init__(self, params: PyTree, look: Callable[[str, np.ndarray], None]):
        super().__init__(deepcopy_host_arrays=False)  # nobody changes what is read here
        self.leaves, self.look = named_leaves(params), look
        self.digest = hashlib.sha256()

    def _hash(self, name: str, array: np.ndarray) -> None:
        self.look(name, array)
        hash_leaf(self.digest, name, array)

    async def serialize(self, values, infos, args=None):
        """Orbax's hook; all is on disk when it returns, so there are no futures to wait for."""
        positions = {id(value): position for position, value in enumerate(values)}
        with concurrent.futures.ThreadPoolExecutor(1) as reader, concurrent.futures.ThreadPoolExecutor(1) as hasher:
            reading = reader.submit(self.leaves[0][1].read)
            for (name, leaf), (_, following) in zip(self.leaves, [*self.leaves[1:], (None, None)], strict=True):
                array = await asyncio.wrap_future(reading)
                reading = following and reader.submit(following.read)
                hashing = hasher.submit(self._hash, name, array)
                position = positions[id(leaf)]
                info, arg = infos[position], args[position] if args else ocp.SaveArgs()
                for writing in await super().serialize([array], [info], [arg]):
                    await asyncio.to_thread(writing.result)
                await asyncio.wrap_future(hashing)
        return []


def files_sha256(files: tuple[pathlib.Path, ...]) -> str:
    """One file's SHA-256, or that of the hashes of several with their names."""
    hashes = [file_sha256(file) for file in files]
    if len(files) == 1:
        return hashes[0]
    lines = "".join(f"{sha}  {file.name}\n" for sha, file in zip(hashes, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
