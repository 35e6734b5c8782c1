"""What few-step objectives share: a distance; and of students that are told the time, states at the nodes of a grid."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ard_jax.diffusion import Grid, Guidance, LinearVP, Process, per_row
from ard_jax.errors import UserError
from ard_jax.objectives import Given
from ard_jax.types import Batch


def require_store(given: Given) -> None:
    """Raises UserError if there are no stored samples of the teacher."""
    if given.columns is None:
        raise UserError(
            "distill.online is set, but this objective reads the samples of a trajectory store: set "
            "distill.online=False and run the stage 'trajectories' first."
        )


def teacher_samples(given: Given, batch: Batch) -> jax.Array:
    """The teacher's samples, the last point of the store's records, (batch, height, width, channel) float32."""
    assert given.columns is not None  # see `require_store`
    return batch["x0"][:, given.columns[-1]].astype(jnp.float32)


def distance(left: jax.Array, right: jax.Array, huber: float) -> jax.Array:
    """Pseudo-Huber distance √(m + c²) − c of the rows, m being their mean square and c `huber`; m itself if that is 0.

    Song and Dhariwal (2024), section 3.3, divided by the square root of the number of dimensions, as c is.

    Args:
        left, right: (…, height, width, channel).
        huber: c.

    Returns:
        (…).
    """
    square = jnp.mean((left - right) ** 2, axis=(-3, -2, -1))
    return jnp.sqrt(square + huber**2) - huber if huber else square


def calls_of(guidance: Guidance) -> int:
    """Network calls of one row; both are made for every row, also for those outside of the guidance's interval."""
    return 1 if guidance.scale == 1 else 2


class Span(NamedTuple):
    """A range whose ends are known when the program runs alone."""

    start: jax.Array
    stop: jax.Array


def draw_nodes(
    key: jax.Array, positions: jax.Array, nodes: range | Span, shape: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """A node, uniform over `nodes`, and noise for each example, functions of the key and its position alone.

    Args:
        key: random key.
        positions: in the stream of data, (batch,).
        nodes: indices into a grid, without gaps.
        shape: (height, width, channel).

    Returns:
        Nodes (batch,) int32, and noise (batch, height, width, channel) float32.
    """

    def draw(position):
        node_key, noise_key = jax.random.split(jax.random.fold_in(key, position))
        return jax.random.randint(node_key, (), nodes.start, nodes.stop), jax.random.normal(noise_key, shape)

    return jax.vmap(draw)(positions)


def named_grid(process: Process, steps: int, name: str) -> Grid:
    """The grid that `grid` of the options of the method `name` asks of a process.

    Raises:
        UserError: the process has fewer timesteps than that.
    """
    if isinstance(process, LinearVP) and steps > process.train_steps:
        raise UserError(
            f"distill.{name}.grid has {steps} steps, but the process has {process.train_steps} timesteps: "
            f"choose a number from 1 to {process.train_steps}."
        )
    return process.grid(steps)


def at_node(x0: jax.Array, noise: jax.Array, grid: Grid, node: jax.Array) -> jax.Array:
    """α·x_0 + σ·ε at each row's node: noised examples, or from a `Prediction` where DDIM steps to.

    Args:
        x0, noise: (batch, height, width, channel).
        grid: of K steps.
        node: 0 … K, (batch,).
    """
    alpha, sigma = (per_row(jnp.asarray(values, x0.dtype)[node], x0) for values in (grid.alpha, grid.sigma))
    return alpha * x0 + sigma * noise


def mix_noise(
    own: jax.Array, fresh: jax.Array, steps: Grid, node: jax.Array, grid: Grid, later: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Trajectory matching's ε' of x_τ = α_τ·x̂_0 + σ_τ·ε', and the rows' importance weights (batch,).

    Args:
        own, fresh: the noise ε̂ in what a step arrives at, and that to be added, (batch, height, width, channel).
        steps, node: the student's grid, and where its step arrives.
        grid, later: where τ is; `later` is (batch,).
    """
    alpha, sigma = (jnp.asarray(values, own.dtype) for values in (grid.alpha, grid.sigma))
    kept = alpha[later] / jnp.asarray(steps.alpha, own.dtype)[node] * jnp.asarray(steps.sigma, own.dtype)[node]
    added = jnp.sqrt(jnp.maximum(sigma[later] ** 2 - kept**2, 0.0))
    mixed = (per_row(kept, own) * own + per_row(added, own) * fresh) / per_row(sigma[later], own)
    ours, theirs = (jnp.mean(noise**2, axis=(1, 2, 3)) for noise in (mixed, fresh))
    return mixed, jnp.exp((theirs - ours) / 2)
