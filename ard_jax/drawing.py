"""Samplers and decoders of a run's models, as the stages that draw, measure and plan share them."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from ard_jax.build import example_shape
from ard_jax.data import Source, image_source
from ard_jax.errors import UserError
from ard_jax.models import AutoencoderKL, Condition, Network
from ard_jax.models.flops import student_macs, teacher_macs
from ard_jax.models.vae import to_images
from ard_jax.parallel import in_turns, on_mesh, replicated_sharding
from ard_jax.sampling import Rollout, draw_noise, sampling_key
from ard_jax.types import Batch, Params

# (params, noise, condition) → images or latents (batch, height, width, channel)
Sampler = Callable[[Params, jax.Array, Condition], jax.Array]


# latents (batch, height, width, channel), split over the mesh → images in [-1, 1]
Decoder = Callable[[jax.Array], jax.Array]


def make_decoder(
    vae: tuple[AutoencoderKL, Params] | None, config: ml_collections.ConfigDict, mesh: Mesh
) -> Decoder | None:
    """The decoder of `find_vae`'s result, jitted; every device decodes `vae.batch_size` images at a time."""
    if vae is None:
        return None
    model, params = vae

    @jax.jit
    def decode(params, latents):
        return in_turns(functools.partial(to_images, model, params), latents, mesh, config.vae.batch_size)

    return functools.partial(decode, jax.device_put(params, replicated_sharding(mesh)))


def student_sampler(rollout: Rollout) -> Sampler:
    def sampler(params, noise, condition):
        return rollout(params, noise, condition)[:, -1]

    return sampler


def make_drawing(
    sampler: Sampler, config: ml_collections.ConfigDict, mesh: Mesh
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """The jitted function (params, {"index", "label": (batch,), "condition"}) → images or latents, labels, indices."""
    key, shape = sampling_key(config.sample.seed), example_shape(config)

    @jax.jit
    @on_mesh(mesh)
    def drawn(params, batch):
        noise = draw_noise(key, batch["index"], shape)
        return sampler(params, noise, batch["condition"]), batch["label"], batch["index"]

    return drawn


@jax.jit
def to_levels(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`data.to_uint8` on the device, so a quarter is fetched: uint8 images, and how many pixels of each are NaN."""
    levels = (images.astype(jnp.float32) + 1) * 127.5
    bad = jnp.isnan(levels).sum(axis=(1, 2, 3))
    return jnp.clip(jnp.rint(levels), 0, 255).astype(jnp.uint8), bad


def open_images(config: ml_collections.ConfigDict, channels: int) -> Source:
    """The images that `encode` names, as `image_source` gives them with so many channels.

    Raises:
        UserError: what `image_source` raises, in terms of `encode`.
    """
    try:
        return image_source(images_of_encode(config, channels))
    except UserError as error:
        raise UserError(re.sub(r"\bdata\.(?=(source|name|dir|split|image_size)\b)", "encode.", str(error))) from None


def images_of_encode(config: ml_collections.ConfigDict, channels: int) -> ml_collections.ConfigDict:
    """What `encode` says of images, as a `data` section says it."""
    images = config.encode.copy_and_resolve_references()
    with images.unlocked():
        images.update(channels=channels, num_classes=config.data.num_classes, space="pixel")
        images.caption_key = config.data.caption_key
    return images


def open_real_images(config: ml_collections.ConfigDict, vae: tuple[AutoencoderKL, Params] | None) -> Source:
    """The images that a run's samples are held against: those that `encode` names for models of latents, else `data`'s.

    Args:
        config: the run's.
        vae: of `find_vae`.

    Raises:
        UserError: what `image_source` raises.
    """
    return image_source(config.data) if vae is None else open_images(config, vae[0].in_channels)


def image_shape(config: ml_collections.ConfigDict, vae: tuple[AutoencoderKL, Params] | None) -> tuple[int, int, int]:
    """(height, width, channel) of the images that a run's models draw; `vae` as in `open_real_images`."""
    height, width, channels = example_shape(config)
    if vae is None:
        return height, width, channels
    return height * vae[0].downscale, width * vae[0].downscale, vae[0].out_channels


def rollout_macs(config: ml_collections.ConfigDict, student: Network) -> int:
    """Multiply-accumulates of one image of the student that a config describes."""
    shape, steps = example_shape(config), len(config.student.points)
    return student_macs(student, shape) if config.student.kind == "history" else steps * teacher_macs(student, shape)
