"""The trajectory job: solves the teacher's ODE from numbered noises and stores the points.

Record i is a function of (config, teacher weights, seed, i) alone: its noise and condition are drawn from (seed, i),
and every device always solves batches of `trajectories.batch_size`, however many devices and hosts there are.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from jax.sharding import Mesh

from ard_jax.build import example_shape, make_solve
from ard_jax.conditions import Conditions, draw_numbers
from ard_jax.errors import UserError
from ard_jax.models import Backbone
from ard_jax.parallel import batch_shards, equal_batches, on_mesh, put_batch, run_batches
from ard_jax.sampling import draw_noise, is_within_bounds, sample_teacher, take_points, trajectory_key
from ard_jax.sharded import Record, Shard
from ard_jax.trajectories import store
from ard_jax.types import Batch, Params
from ard_jax.version import __version__

DIVERGED = 8  # trajectories in a row that are NaN: of a teacher that is, since single ones are just dropped


def make_solver(
    model: Backbone, config: ml_collections.ConfigDict, mesh: Mesh
) -> Callable[[Params, Batch], tuple[dict[str, jax.Array], jax.Array]]:
    """The jitted function (params, {"index", "label": (batch,), "condition"}) → records, leaves (batch, …).

    The records have the store's type already, and "kept" says which are within bounds.
    """
    trajectories, how = config.trajectories, make_solve(config)
    points, dtype = tuple(trajectories.points), jnp.dtype(store.DTYPES[trajectories.dtype])
    key = trajectory_key(config.seed)

    @jax.jit
    @on_mesh(mesh)
    def solve(params, batch):
        noise = draw_noise(key, batch["index"], example_shape(config))
        solution = sample_teacher(model, params, noise, batch["condition"], how)
        x0 = take_points(solution.x0, points, how.steps)
        record = {"noise": noise.astype(dtype), "x0": x0.astype(dtype)}
        record |= {"label": batch["label"], "index": batch["index"]}
        if trajectories.keep_noisy:
            record["xt"] = take_points(solution.xt, points, how.steps).astype(dtype)
        return record, is_within_bounds(x0, min(trajectories.max_abs or jnp.inf, float(jnp.finfo(dtype).max)))

    return solve


def make_store(
    model: Backbone,
    params: Params,
    conditions: Conditions,
    config: ml_collections.ConfigDict,
    directory: pathlib.Path,
    mesh: Mesh,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> None:
    """Makes this process's shards that are missing, truncated or altered.

    Args:
        model, params: the teacher and its parameters.
        conditions: that are drawn from; records keep their numbers.
        config: `trajectories`, `diffusion`, `data` and `seed` count.
        directory: of the store.
        mesh: of this process's own devices.
        process_index, process_count: which shards are this process's: every process_count-th.
    """
    trajectories, solver = config.trajectories, make_solver(model, config, mesh)

    def solve(indices):
        numbers = draw_numbers(trajectory_key(config.seed), indices, conditions.for_training)
        batch = {"index": indices, "label": numbers, "condition": conditions.rows(numbers)}
        return solver(params, put_batch(batch, mesh))

    def records(indices, dropped, bar):
        batches = equal_batches(indices, trajectories.batch_size * batch_shards(mesh))
        return drop_out_of_bounds(run_batches(solve, batches), dropped, bar)

    store.LAYOUT.make_shards(
        directory,
        features_of(config),
        trajectories.count,
        trajectories.shard_size,
        records,
        "trajectories",
        process_index,
        process_count,
    )


def features_of(config: ml_collections.ConfigDict) -> tfds.features.FeaturesDict:
    trajectories = config.trajectories
    return store.record_features(
        example_shape(config), len(trajectories.points), trajectories.dtype, trajectories.keep_noisy
    )


def drop_out_of_bounds(
    batches: Iterator[tuple[dict[str, np.ndarray], np.ndarray]], dropped: list[int], bar: tqdm.tqdm
) -> Iterator[Record]:
    """Yields the records that are within bounds, and notes the numbers of the others in `dropped`.

    Raises:
        UserError: `DIVERGED` in a row are NaN.
    """
    in_a_row = 0
    for records, kept in batches:
        is_nan = [bool(np.isnan(row).any()) for row in records["x0"].astype(np.float32)]
        in_a_row = in_a_row + len(kept) if all(is_nan) else 0
        if in_a_row >= DIVERGED:
            raise UserError(
                "the teacher's trajectories are NaN: it has diverged, or its numbers are too large for model.dtype; "
                "train it anew with a lower learning rate, or set model.dtype=float32."
            )
        for row, good in enumerate(kept):
            record = {name: values[row] for name, values in records.items()}
            if good:
                yield record
            else:
                dropped.append(int(record["index"]))
        bar.update(len(kept))


def manifest(
    config: ml_collections.ConfigDict, settings: dict[str, Any], inputs: Mapping[str, str], shards: list[Shard]
) -> dict[str, Any]:
    """How the store was made, of the inputs "teacher" and, where there are such, "captions"."""
    trajectories = config.trajectories
    dropped = sum(len(shard["dropped"]) for shard in shards)
    return {
        "format": 1,
        "code_version": __version__,
        "teacher_sha256": inputs["teacher"],
        **({"captions_sha256": inputs["captions"]} if "captions" in inputs else {}),
        "seed": config.seed,
        "settings": settings,
        "points": list(trajectories.points),
        "keep_noisy": trajectories.keep_noisy,
        "dtype": trajectories.dtype,
        "max_abs": trajectories.max_abs,
        "batch_size": trajectories.batch_size,
        "tried": trajectories.count,
        "kept": trajectories.count - dropped,
        "dropped": dropped,
        "shards": shards,
    }
