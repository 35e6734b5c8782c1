"""Encodes images with an autoencoder and stores the latents as a TFDS dataset that teachers train on.

Reads the images of `encode` and the autoencoder in WORKDIR/vae or `vae.dir`, and writes `latents/`. `data` describes
what the networks see, so its image_size and channels are those of the latents. With `encode.horizontal_flip`, record 2i
is image i and record 2i + 1 its mirror image. Record i is a function of (config, autoencoder, i) alone, and every
device encodes batches of `encode.batch_size`, however many devices and hosts there are. Started again, on any number of
hosts, it makes just the shards that are missing, truncated or altered.
"""

import collections
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from ard_jax.build import example_shape
from ard_jax.captions.conditions import check_texts
from ard_jax.captions.texts import texts_of_data, texts_sha256
from ard_jax.config import plain
from ard_jax.convert.vae import diffusers_config
from ard_jax.data import MODES, Source, check_records, identify
from ard_jax.drawing import open_images
from ard_jax.errors import UserError
from ard_jax.files import tree_sha256
from ard_jax.hosts import wait_for_all
from ard_jax.keys import make_key
from ard_jax.models import AutoencoderKL
from ard_jax.models.vae import to_latents
from ard_jax.parallel import equal_batches, is_first, make_mesh, put_batch, replicated_sharding, run_batches
from ard_jax.progress import Stopwatch
from ard_jax.sharded import DTYPES, Layout, Shard, data_folder, describe, number_of_shards, tensor
from ard_jax.types import Batch, Params
from ard_jax.version import __version__
from ard_jax.workdir import claim, keep_identity, load_vae, vae_folder, write_done

log = logging.getLogger("ard_jax")

LAYOUT = Layout("latents", "Latents of labelled images, to train a diffusion model on.")
AHEAD = 2  # batches whose images are read while another is encoded


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, check: bool = False) -> None:
    """Makes the dataset; with `check`, just reads every image once.

    Raises:
        UserError: there is no autoencoder, images are missing or cannot be read, the config does not fit them, the
            workdir belongs to another config, or latents are not finite.
    """
    watch, directory, settings = Stopwatch(), workdir / "latents", config.encode
    model, params = load_vae(config, workdir)
    _check(config, model, vae_folder(config, workdir))
    source = open_images(config, model.in_channels)
    if check:
        return check_records(source)
    identity = identify(config.encode, source)
    features = _features_of(config, identity["classes"])
    vae_hash = tree_sha256({"params": params, "config": diffusers_config(model)})
    check_texts(config, workdir, source)
    claim(directory, config, "encode", vae=vae_hash, images=str(len(source)))
    keep_identity(directory, identity)
    count = len(source) * _views(config)
    _make_latents(model, params, source, config, directory, features)
    wait_for_all("all shards are written")
    if not is_first():
        return
    described = describe(directory, number_of_shards(count, settings.shard_size))
    LAYOUT.finish(directory, features, described, _manifest(config, model, vae_hash, source, described))
    log.info(
        "%d latents written; train on them with --config.data.source=tfds --config.data.space=latent "
        "--config.data.dir=%s",
        count,
        data_folder(directory),
    )
    write_done(directory, {shard["file"]: shard["sha256"] for shard in described}, watch(), records=count)


def _views(config: ml_collections.ConfigDict) -> int:
    """Records an image."""
    return 2 if config.encode.horizontal_flip else 1


def _check(config: ml_collections.ConfigDict, model: AutoencoderKL, folder: pathlib.Path) -> None:
    """Raises UserError if the latents of `encode`'s images are not what `data` describes."""
    size, data = config.encode.image_size, config.data
    if data.space != "latent":
        raise UserError(
            f"data.space is {data.space!r}, but encode makes latents, which `data` has to describe: "
            f"set data.space=latent."
        )
    if model.in_channels not in MODES:
        raise UserError(
            f"the autoencoder in {folder} takes images of {model.in_channels} channels, but images have 1 (grey) or 3 "
            f"(RGB): use another."
        )
    if size % model.downscale:
        raise UserError(
            f"encode.image_size {size} is not a multiple of {model.downscale}, the pixels a side of a latent of the "
            f"autoencoder in {folder}: choose a size that is."
        )
    side, channels = size // model.downscale, model.latent_channels
    if (data.image_size, data.channels) != (side, channels):
        raise UserError(
            f"images of {size}×{size} become latents of {side}×{side} with {channels} channels in the autoencoder in "
            f"{folder}, but data.image_size is {data.image_size} and data.channels is {data.channels}: "
            f"set them to {side} and {channels}, or change encode.image_size."
        )


def _features_of(config: ml_collections.ConfigDict, names: list[str] | None) -> tfds.features.FeaturesDict:
    """The record: latent (H, W, C), label, index, and whether it is of the mirror image."""
    label = tfds.features.ClassLabel(names=names) if names else _numbers(config.data.num_classes)
    return tfds.features.FeaturesDict(
        {
            "latent": tensor(example_shape(config), config.encode.dtype),
            "label": label,
            "index": tfds.features.Scalar(dtype=np.int64),
            "flipped": tfds.features.Scalar(dtype=np.bool_),
        }
    )


def _numbers(classes: int) -> tfds.features.FeatureConnector:
    """The feature of a class, or where there are none of a caption's number."""
    return tfds.features.ClassLabel(num_classes=classes) if classes else tfds.features.Scalar(dtype=np.int64)


def _make_encoder(model: AutoencoderKL, config: ml_collections.ConfigDict) -> Callable[[Params, Batch], jax.Array]:
    """The jitted function (params, {"image", "index"}) → latents (batch, height, width, channel) as they are stored."""
    dtype, sample = jnp.dtype(DTYPES[config.encode.dtype]), config.encode.sample
    key = jax.random.fold_in(make_key(config.seed), 2)  # trajectories have 0, samples 1

    def encode(params, batch):
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["index"]) if sample else None
        return to_latents(model, params, batch["image"], keys).astype(dtype)

    return jax.jit(encode)


def _make_latents(
    model: AutoencoderKL,
    params: Params,
    source: Source,
    config: ml_collections.ConfigDict,
    directory: pathlib.Path,
    features: tfds.features.FeaturesDict,
) -> None:
    """Makes this process's shards that are missing, truncated or altered."""
    settings, mesh = config.encode, make_mesh(devices=jax.local_devices())
    encoder, params = _make_encoder(model, config), jax.device_put(params, replicated_sharding(mesh))
    threads = ThreadPoolExecutor(config.run.workers)

    def encode(batch):
        image = batch.pop("image")
        return batch | {"latent": encoder(params, put_batch({"image": image, "index": batch["index"]}, mesh))}

    def records(numbers, _, bar):
        batches = equal_batches(numbers, settings.batch_size * mesh.size)
        for batch in run_batches(encode, read_ahead(source, batches, _views(config), threads)):
            check_finite(batch, settings.dtype)
            for row in range(len(batch["index"])):
                yield {name: values[row] for name, values in batch.items()}
            bar.update(len(batch["index"]))

    try:
        LAYOUT.make_shards(
            directory,
            features,
            len(source) * _views(config),
            settings.shard_size,
            records,
            "latents",
            jax.process_index(),
            jax.process_count(),
        )
    finally:
        threads.shutdown(cancel_futures=True)


def read_ahead(
    source: Source,
    batches: Iterable[tuple[np.ndarray, int]],
    views: int,
    threads: ThreadPoolExecutor,
) -> Iterator[tuple[Batch, int]]:
    """Batches of record numbers → batches with their images, which threads read `AHEAD` batches ahead."""

    def start(numbers: np.ndarray) -> dict[int, Future]:
        return {image: threads.submit(source.__getitem__, image) for image in np.unique(numbers // views).tolist()}

    def collect(numbers: np.ndarray, reading: dict[int, Future]) -> Batch:
        images = [reading[image].result() for image in (numbers // views).tolist()]
        flipped = numbers % views == 1
        pixels = [image["image"][:, :: -1 if mirror else 1] for image, mirror in zip(images, flipped, strict=True)]
        labels = np.asarray([image["label"] for image in images])
        return {"image": np.stack(pixels), "label": labels, "index": numbers, "flipped": flipped}

    waiting: collections.deque[tuple[np.ndarray, dict[int, Future], int]] = collections.deque()
    for numbers, count in batches:
        waiting.append((numbers, start(numbers), count))
        if len(waiting) > AHEAD:
            first, reading, rows = waiting.popleft()
            yield collect(first, reading), rows
    for first, reading, rows in waiting:
        yield collect(first, reading), rows


def check_finite(batch: Batch, dtype: str) -> None:
    """Raises UserError if a latent is not finite in the type that is stored."""
    finite = np.isfinite(batch["latent"].astype(np.float32)).all((1, 2, 3))
    if not finite.all():
        raise UserError(
            f"the latent of record {batch['index'][~finite][0]} is not finite in {dtype}: see that the autoencoder's "
            f"weights are whole, or set encode.dtype=float32."
        )


def _manifest(
    config: ml_collections.ConfigDict,
    model: AutoencoderKL,
    vae_hash: str,
    source: Source,
    shards: list[Shard],
) -> dict[str, Any]:
    """How the dataset was made."""
    told = not config.data.num_classes and config.encode.source != "tfds"  # whose texts take minutes to read
    return {
        "format": 1,
        "code_version": __version__,
        "vae_sha256": vae_hash,
        "scaling_factor": model.scaling_factor,
        "shift_factor": model.shift_factor,
        "seed": config.seed,
        "settings": plain(config)["encode"],
        "latent_shape": list(example_shape(config)),
        "num_classes": config.data.num_classes,
        "images": len(source),
        "texts_sha256": texts_sha256(texts_of_data(config, source).texts) if told else "",
        "records": sum(shard["records"] for shard in shards),
        "shards": shards,
    }
