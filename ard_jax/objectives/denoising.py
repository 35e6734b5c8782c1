"""The teacher's objective: E‖network(x_t, t, c) − target‖² (DDPM, equation 14; flow matching's velocity likewise)."""

from typing import Any

import jax
import jax.numpy as jnp

from ard_jax.diffusion import Process, per_row
from ard_jax.models import Backbone
from ard_jax.objectives import Objective


def denoising(model: Backbone, process: Process, *, label_dropout: float, horizontal_flip: bool) -> Objective:
    """Builds the objective.

    Args:
        model: the teacher.
        process: says what the network predicts, noise or velocity.
        label_dropout: how often the condition becomes the unconditional one, for guidance.
        horizontal_flip: mirror half of the images.

    The batch holds "image" (batch, height, width, channel) in [-1, 1], "condition" (leaves (batch, …))
    and "position" (batch,).
    With a learned variance, its half of the output gets no loss: sampling discards it (docs/METHOD.md section 2).
    """

    def augment(key, image):
        """Draws everything that one example needs."""
        flip, drop, time, noise = jax.random.split(key, 4)
        if horizontal_flip:
            image = jnp.where(jax.random.bernoulli(flip), image[:, ::-1], image)
        dropped = jax.random.bernoulli(drop, label_dropout)
        return image, dropped, process.sample_times(time, 1)[0], jax.random.normal(noise, image.shape)

    def loss(params, frozen, batch, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["position"])
        image, dropped, time, noise = jax.vmap(augment)(keys, batch["image"])
        condition = jax.tree.map(
            lambda own, null: jnp.where(per_row(dropped, own), null, own),
            batch["condition"],
            model.unconditional(batch["condition"]),
        )
        output: Any = model.apply({"params": params}, process.noised(image, noise, time), time, condition)
        error = output[..., : model.channels].astype(jnp.float32) - process.target(image, noise)
        return jnp.mean(error**2), {}

    return loss
