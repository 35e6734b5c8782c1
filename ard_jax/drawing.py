"""Samplers and decoders of a run's models, as the stages that draw, measure and plan share them."""

import functools
import re
from collections.abc import Callable
from typing import Any

import grain
import jax
import ml_collections
from jax.sharding import Mesh

from ard_jax.build import example_shape
from ard_jax.data import image_source
from ard_jax.errors import UserError
from ard_jax.models import AutoencoderKL
from ard_jax.models.vae import to_images
from ard_jax.parallel import in_turns, on_mesh, replicated
from ard_jax.sampling import Rollout, draw_noise_and_labels, sampling_key

# (params, noise, labels) → images or latents (batch, height, width, channel)
Sampler = Callable[[Any, jax.Array, jax.Array], jax.Array]


# latents (batch, height, width, channel), split over the mesh → images in [-1, 1]
Decoder = Callable[[jax.Array], jax.Array]


def make_decoder(
    vae: tuple[AutoencoderKL, Any] | None, config: ml_collections.ConfigDict, mesh: Mesh
) -> Decoder | None:
    """The decoder of `find_vae`'s result, jitted; every device decodes `vae.batch_size` images at a time."""
    if vae is None:
        return None
    model, params = vae

    @jax.jit
    def decode(params, latents):
        return in_turns(functools.partial(to_images, model, params), latents, mesh, config.vae.batch_size)

    return functools.partial(decode, jax.device_put(params, replicated(mesh)))


def student_sampler(rollout: Rollout) -> Sampler:
    def sampler(params, noise, y):
        return rollout(params, noise, y)[:, -1]

    return sampler


def make_drawing(
    sampler: Sampler, config: ml_collections.ConfigDict, mesh: Mesh
) -> Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array, jax.Array]]:
    """The jitted function (params, {"index", "label": (batch,)}) → images or latents, labels and indices.

    The labels of the batch count only where `sample.labels` chooses them.
    """
    key, shape = sampling_key(config.sample.seed), example_shape(config)

    @jax.jit
    @on_mesh(mesh)
    def drawn(params, batch):
        noise, label = draw_noise_and_labels(key, batch["index"], shape, config.data.num_classes)
        label = batch["label"] if len(config.sample.labels) else label
        return sampler(params, noise, label), label, batch["index"]

    return drawn


def open_images(config: ml_collections.ConfigDict, model: AutoencoderKL) -> grain.sources.RandomAccessDataSource:
    """The images that `encode` names, as `image_source` gives them.

    Raises:
        UserError: what `image_source` raises, in terms of `encode`.
    """
    images = config.encode.copy_and_resolve_references()
    with images.unlocked():
        images.update(channels=model.in_channels, num_classes=config.data.num_classes, space="pixel")
    try:
        return image_source(images)
    except UserError as error:
        raise UserError(re.sub(r"\bdata\.(?=(source|name|dir|split|image_size)\b)", "encode.", str(error))) from None
