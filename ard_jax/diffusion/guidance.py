"""Classifier-free guidance of a conditional network."""

import dataclasses

import jax
import jax.numpy as jnp

from ard_jax.diffusion.processes import Process, per_row
from ard_jax.errors import UserError
from ard_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How far to move from the unconditional to the conditional output.

    Attributes:
        scale: 1 is no guidance.
        channels: how many leading channels are guided; 3 is what the published DiT does with its four latent channels
            (docs/METHOD.md section 2), 0 guides all.
        interval: guidance acts where the way from data (0) to pure noise (1), in network time, lies in it
            (Kynkäänniemi et al. 2024), both ends included.
    """

    scale: float = 1.5
    channels: int = 3
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if len(self.interval) != 2 or not 0.0 <= self.interval[0] <= self.interval[1] <= 1.0:
            raise UserError(
                f"guidance_interval is {self.interval}: give two rising numbers from 0 (data) to 1 (noise)."
            )
        if self.channels < 0:
            raise UserError(f"guided_channels is {self.channels}: give a number of channels, or 0 for all of them.")

    def acts_at(self, time: jax.Array | float, process: Process) -> jax.Array | bool:
        """Whether guidance acts at a network time; at an end of the interval, in the precision of that time."""
        ends = (process.data_time + end * (process.noise_time - process.data_time) for end in self.interval)
        low, high = sorted(ends)
        return (low <= time) & (time <= high)


def prepare_condition(model, params, condition, guidance: Guidance) -> PyTree:
    """What `prepared_output` takes of a condition: the work that is the same at all times is done.

    Args:
        model, params: a backbone and its parameters.
        condition: leaves (batch, …), as the model takes it.
        guidance: as configured.

    Returns:
        Leaves (batch, …), or where there is guidance (batch · 2, …), each example's condition beside the unconditional
        one: so the two calls of an image stay on its device where the batch is split.
    """
    if guidance.scale != 1.0:
        condition = jax.tree.map(_beside, condition, model.unconditional(condition))
    return model.apply({"params": params}, condition, method="prepare")


def _beside(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.stack([left, right], axis=1).reshape(-1, *left.shape[1:])


def guided_output(model, params, x, time, condition, guidance: Guidance, process: Process) -> jax.Array:
    """The network's guided output, its variance half dropped.

    Args:
        model, params: a backbone and its parameters.
        x: states, (batch, height, width, channel).
        time: network time, a scalar, or one a state, (batch,).
        condition: leaves (batch, …), as the model takes it.
        guidance, process: as configured.

    Returns:
        (batch, height, width, channel), in the type of `x`.
    """
    prepared = prepare_condition(model, params, condition, guidance)
    return prepared_output(model, params, x, time, prepared, guidance, process)


def prepared_output(model, params, x, time, condition, guidance: Guidance, process: Process) -> jax.Array:
    """`guided_output` of what `prepare_condition` made of the condition, for all the times of a solve."""
    channels = x.shape[-1]
    times = jnp.broadcast_to(jnp.asarray(time, x.dtype), x.shape[:1])

    def call(x, times, condition):
        return model.apply({"params": params}, x, times, condition)[..., :channels].astype(x.dtype)

    def guided(acts=True):
        both = call(jnp.repeat(x, 2, axis=0), jnp.repeat(times, 2), condition).reshape(-1, 2, *x.shape[1:])
        conditional, unconditional = both[:, 0], both[:, 1]
        moved = unconditional + guidance.scale * (conditional - unconditional)
        kept = guidance.channels or channels
        moved = jnp.concatenate([moved[..., :kept], conditional[..., kept:]], axis=-1)
        return moved if acts is True else jnp.where(per_row(acts, x), moved, conditional)

    if guidance.scale == 1.0:
        return call(x, times, condition)
    if tuple(guidance.interval) == (0.0, 1.0):
        return guided()
    if jnp.ndim(time):
        return guided(guidance.acts_at(times, process))

    def conditional_alone():
        return call(x, times, jax.tree.map(lambda leaf: leaf[::2], condition))

    return jax.lax.cond(guidance.acts_at(time, process), guided, conditional_alone)
