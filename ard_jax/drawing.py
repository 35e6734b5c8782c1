"""Samplers and decoders of a run's models, as the stages that draw, measure and plan share them."""

import functools
import logging
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ard_jax.build import example_shape, make_rollout, make_solve
from ard_jax.checks import listed_labels
from ard_jax.conditions import Conditions, draw_numbers
from ard_jax.data import Source, image_source
from ard_jax.errors import UserError
from ard_jax.files import to_host
from ard_jax.models import AutoencoderKL, Backbone, Condition, Network, count_parameters
from ard_jax.models.flops import student_macs, teacher_macs
from ard_jax.models.vae import to_images
from ard_jax.parallel import batch_shards, in_turns, on_mesh, put_batch, replicated_sharding
from ard_jax.picture_grid import image_grid
from ard_jax.sampling import Rollout, Solve, draw_noise, network_calls, sample_teacher, sampling_key
from ard_jax.training.pictures import Pictures
from ard_jax.types import Batch, Params, PyTree
from ard_jax.workdir import Loaded, find_vae, vae_folder

log = logging.getLogger("ard_jax")

SHOWN = 16  # images in a picture of a training

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


def teacher_sampler(teacher: Backbone, how: Solve) -> Sampler:
    def sampler(params, noise, condition):
        return sample_teacher(teacher, params, noise, condition, how).xt[:, -1]

    return sampler


class Drawable(NamedTuple):
    """A model as it is drawn from.

    Attributes:
        sampler: of its images or latents.
        params: that the sampler takes.
        facts: what an image costs, and which weights they are; fields of `results.Measured`.
    """

    sampler: Sampler
    params: Params
    facts: dict[str, Any]


def drawable(config: ml_collections.ConfigDict, loaded: Loaded, is_teacher: bool) -> Drawable:
    """The teacher with the solver of a config, or a student as it was trained."""
    shape, model = example_shape(config), loaded.model
    if is_teacher:
        how = make_solve(config)
        steps, calls = how.steps, network_calls(how)
        macs = calls * teacher_macs(model, shape)
        sampler = teacher_sampler(model, how)
    else:
        steps = calls = len(loaded.config.student.points)
        macs = rollout_macs(loaded.config, model)
        sampler = student_sampler(make_rollout(loaded.config, model))
    facts = {"steps": steps, "network_calls": calls, "ema_sha256": loaded.sha256}
    facts |= {"parameters": count_parameters(loaded.params), "gmac_per_image": macs / 1e9}
    return Drawable(sampler, loaded.params, facts)


@functools.cache
def student_sampler(rollout: Rollout) -> Sampler:
    """A student's images; one function for one rollout, as `student_rollout` is one for equal students."""

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


def numbered_batch(index: np.ndarray, numbers: np.ndarray, conditions: Conditions, mesh: Mesh) -> Batch:
    """The batch that `make_drawing` takes, split over the mesh, each process putting its rows.

    Args:
        index: of the images' noises, (batch,).
        numbers: of their conditions, (batch,).
        conditions: what these stand for.
        mesh: of devices.
    """
    index, numbers = (np.array_split(rows, jax.process_count())[jax.process_index()] for rows in (index, numbers))
    return put_batch({"index": index, "label": numbers, "condition": conditions.rows(numbers)}, mesh)


def in_order(images: PyTree, label: np.ndarray, index: np.ndarray) -> tuple[PyTree, np.ndarray]:
    """Rows in the order of their indices: which host has which rows of a batch is up to the mesh."""
    order = np.argsort(index)
    return jax.tree.map(lambda rows: rows[order], images), label[order]


def make_pictures(
    sampler: Sampler, conditions: Conditions, config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: Mesh
) -> Pictures | None:
    """What a training draws of its network, by `run.sample_every`: noises 0 … 15, with conditions from first to last.

    Args:
        sampler: of the network.
        conditions: that it is told.
        config, workdir: of the run.
        mesh: that the training has.

    Returns:
        None if nothing is to be drawn, or latents that there is no VAE for.

    Raises:
        UserError: what `find_vae` raises.
    """
    if not config.run.sample_every:
        return None
    vae = find_vae(config, workdir)
    if config.data.space == "latent" and vae is None:
        there = vae_folder(config, workdir)
        log.warning("there is no VAE in %s, so no pictures are drawn: convert one, or set vae.dir.", there)
        return None
    drawn, decoder = make_drawing(sampler, config, mesh), make_decoder(vae, config, mesh)
    index = np.arange(-(-SHOWN // batch_shards(mesh)) * batch_shards(mesh))  # every device has as many
    batch = numbered_batch(index, index % SHOWN * conditions.for_training // SHOWN, conditions, mesh)

    def draw(params: Params) -> np.ndarray:
        images, *rest = drawn(params, batch)
        levels, _ = to_levels(decoder(images) if decoder else images)
        shown, _ = in_order(*map(to_host, (levels, *rest)))
        return np.asarray(image_grid(shown[:SHOWN], columns=4).convert("RGB"))

    return Pictures(draw, config.run.sample_every)


@jax.jit
def to_levels(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`data.to_uint8` on the device, so a quarter is fetched: uint8 images, and how many pixels of each are NaN."""
    levels = (images.astype(jnp.float32) + 1) * 127.5
    bad = jnp.isnan(levels).sum(axis=(1, 2, 3))
    return jnp.clip(jnp.rint(levels), 0, 255).astype(jnp.uint8), bad


def checked_levels(levels: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Images of `to_levels`; UserError if a pixel of them is NaN."""
    if bad.any():
        raise UserError(
            f"{bad.sum()} of {levels.size} pixels are NaN, but pictures need numbers: the model that made them has "
            f"diverged, use an earlier checkpoint."
        )
    return levels


def choose_numbers(settings: ml_collections.ConfigDict, index: np.ndarray, conditions: Conditions) -> np.ndarray:
    """The numbers of the conditions of images `index`: int32 (batch,)."""
    if labels := listed_labels(settings):
        return np.asarray(labels, np.int32)[index % len(labels)]
    if settings.labels == "balanced":
        numbers = (index % conditions.for_training).astype(np.int32)
    else:
        numbers = draw_numbers(sampling_key(settings.seed), index, conditions.for_training)
    beyond = index - (settings.count - settings.held_out)
    if not settings.held_out:
        return numbers
    held_out = conditions.for_training + beyond % (len(conditions) - conditions.for_training)
    return np.where(beyond < 0, numbers, held_out).astype(np.int32)


def check_labels(settings: ml_collections.ConfigDict, conditions: Conditions) -> None:
    """Raises UserError for a number that no condition has, and for images of held-out captions that cannot be."""
    labels = listed_labels(settings)
    outside = [label for label in labels if not 0 <= label < len(conditions)]
    if outside:
        raise UserError(f"sample.labels has {outside[0]!r}, but there are {len(conditions)}: count from 0.")
    if settings.held_out and conditions.for_training == len(conditions):
        raise UserError(f"sample.held_out is {settings.held_out}, but nothing is held out of training: set it to 0.")
    if settings.held_out and (labels or settings.held_out > settings.count):
        raise UserError(
            f"sample.held_out is {settings.held_out}, but it must be at most sample.count, which is {settings.count}, "
            f"and sample.labels must be (): set one of them otherwise."
        )


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
