"""What the stages that train have in common: they stream a source into the loop and hash what comes out."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ard_jax.conditions import Conditions, with_conditions
from ard_jax.data import InMemory, Source, in_memory
from ard_jax.data.stream import Joined, stream
from ard_jax.files import tree_sha256
from ard_jax.objectives import Method
from ard_jax.training.loop import train
from ard_jax.training.pictures import Pictures
from ard_jax.types import Batches, Params, PyTree


class Task(NamedTuple):
    """What a network is trained on.

    Attributes:
        source: random-access records; or several such by name, whose batches the objective gets by these names.
        method: its objective, and what that needs.
        conditions: what the records' labels stand for.
        frozen: parameters that the objective reads and that are not trained, or None.
        numbers: positions in the stream (batch,) → labels, where the records have none.
    """

    source: Source | Mapping[str, Source]
    method: Method
    conditions: Conditions
    frozen: PyTree = None
    numbers: Callable[[np.ndarray], np.ndarray] | None = None


def fit(
    task: Task,
    params: Params,
    config: ml_collections.ConfigDict,
    settings: ml_collections.ConfigDict,
    directory: pathlib.Path,
    mesh: Mesh,
    watch: Callable[[], float],
    pictures: Pictures | None = None,
) -> dict[str, Any]:
    """Trains to the last step, from the newest checkpoint in `directory` if there is one.

    Args:
        task: what to train on.
        params: where a fresh run starts; freed as `train` says.
        config: `seed` and `run` count.
        settings: the stage's section: steps, batch_size, accumulate, checkpoint_every, optimizer.
        directory: of the run.
        mesh: of devices.
        watch: seconds since the stage started.
        pictures: as `train` takes them.

    Returns:
        What `write_done` takes: "sha256" of the parameters and their average, "seconds", "step", and what the training
        took in "examples" and "flops".
    """
    trained = train(
        task.method,
        params,
        _open_stream(task, config, settings.batch_size),
        settings=settings,
        run=config.run,
        seed=config.seed,
        directory=directory,
        mesh=mesh,
        frozen=task.frozen,
        pictures=pictures,
    )
    state = trained.state
    examples = settings.batch_size * int(state.step)
    return {
        "sha256": {"params": tree_sha256(state.params), "ema": tree_sha256(state.ema)},
        "seconds": round(max(watch(), trained.seconds), 2),
        "step": int(state.step),
        "examples": examples,
        "flops": examples * task.method.flops,
    }


def _open_stream(task: Task, config: ml_collections.ConfigDict, batch_size: int) -> Batches:
    """This process's rows of the batches of a `Task`, with one position to resume from.

    Of several sources, each has an order of its own, even if they have as many records.
    """
    if not isinstance(task.source, Mapping):
        return _open_one(task.source, task, config, batch_size, config.run.in_memory)
    parts = enumerate(task.source.items())
    share = config.run.in_memory // len(task.source)
    return Joined({name: _open_one(part, task, config, batch_size, share, place) for place, (name, part) in parts})


def _open_one(
    source: Source, task: Task, config: ml_collections.ConfigDict, batch_size: int, memory: int, place: int = 0
) -> Batches:
    source = in_memory(source, memory)
    nothing_to_read = isinstance(source, InMemory) and task.conditions.in_memory
    return stream(
        source,
        batch_size=batch_size,
        seed=config.seed + place,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=0 if nothing_to_read else config.run.workers,
        memory=memory,
        complete=functools.partial(with_conditions, conditions=task.conditions, numbers=task.numbers),
    )
