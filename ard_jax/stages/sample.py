"""Draws images from the teacher and from students, in batches over all devices.

Writes, for each name in `sample.models`, `sample/<name>/samples.npz` (uint8 images under the key `arr_0`, as the ADM
evaluator wants them, and `labels`) and `grid.png`. Models of latents decode theirs with the VAE in WORKDIR/vae or
`vae.dir`; where there is none, they write float32 latents under the key `latents`. Image i has the same noise and label
for every model.
"""

import logging
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ard_jax.build import example_shape, make_conditions, make_rollout, make_solve
from ard_jax.conditions import draw_numbers
from ard_jax.config import plain
from ard_jax.data import to_uint8
from ard_jax.drawing import Decoder, Sampler, make_decoder, make_drawing, rollout_macs, student_sampler
from ard_jax.errors import UserError
from ard_jax.files import atomic_write, file_sha256, to_host, write_json, write_npz
from ard_jax.models import count_parameters
from ard_jax.models.flops import teacher_macs
from ard_jax.parallel import batch_shards, is_first, make_mesh, put_batch
from ard_jax.progress import progress_bar
from ard_jax.report import image_grid
from ard_jax.sampling import network_calls, sample_teacher, sampling_key
from ard_jax.types import Params
from ard_jax.workdir import Stopwatch, find_vae, load_student, load_teacher, merge_done, occupy, vae_folder

log = logging.getLogger("ard_jax")


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Samples every model of `config.sample.models`.

    Raises:
        UserError: a model has not been trained.
    """
    mesh = make_mesh(config.mesh)
    vae = find_vae(config, workdir)
    if config.data.space == "latent" and vae is None:
        there = vae_folder(config, workdir)
        log.warning("there is no VAE in %s, so latents are written: convert one, or set vae.dir, for images.", there)
    decoder = make_decoder(vae, config, mesh)
    loaded = {name: _load_sampler(config, workdir, name, mesh) for name in config.sample.models}
    for name, (sampler, params, facts) in loaded.items():
        watch, directory = Stopwatch(), workdir / "sample" / name
        occupy(directory)
        images, labels, seconds_per_image = _draw(sampler, params, decoder, config, mesh)
        if not is_first():
            continue
        write_json(directory / "config.json", plain(config) | {"inputs": {"ema": facts["ema_sha256"]}})
        files = _write(directory, images, labels, config.sample.grid)
        hashes = {file: file_sha256(directory / file) for file in files}
        made = {"sha256": hashes, "seconds": round(watch(), 2), "seconds_per_image": seconds_per_image, **facts}
        merge_done(workdir / "sample", {name: made})


def _load_sampler(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, name: str, mesh: Mesh
) -> tuple[Sampler, Params, dict[str, Any]]:
    """A model's sampler, its parameters, and what it costs."""
    shape = example_shape(config)
    facts: dict[str, Any]
    if name == "teacher":
        teacher, params, sha, _ = load_teacher(config, workdir, mesh)
        how = make_solve(config)
        evaluations = network_calls(how)
        facts = {"steps": how.steps, "network_calls": evaluations}
        macs = evaluations * teacher_macs(teacher, shape)

        def sampler(params, noise, condition):
            return sample_teacher(teacher, params, noise, condition, how).xt[:, -1]

    else:
        model, params, sha, trained = load_student(workdir / "distill" / name, mesh)
        steps = len(trained.student.points)
        facts = {"steps": steps, "network_calls": steps}
        macs = rollout_macs(trained, model)
        sampler = student_sampler(make_rollout(trained, model))
    facts |= {"ema_sha256": sha, "parameters": count_parameters(params), "gmac_per_image": macs / 1e9}
    return sampler, params, facts


def _draw(
    sampler: Sampler, params: Params, decoder: Decoder | None, config: ml_collections.ConfigDict, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray, float]:
    """Images 0 … count−1 with their labels, and the seconds that one takes once compiled.

    The images are uint8; without a decoder, latents are float32 as they are.
    """
    settings, chosen = config.sample, np.asarray(config.sample.labels, np.int32)
    drawn, conditions, key = make_drawing(sampler, config, mesh), make_conditions(config), sampling_key(settings.seed)

    def sample(batch):
        images, *rest = drawn(params, batch)
        return (decoder(images) if decoder else images), *rest

    def batch_of(first):
        """This process's rows; indices beyond the count fill the last batch up."""
        index = np.array_split(np.arange(first, first + batch_size), jax.process_count())[jax.process_index()]
        numbers = chosen[index % len(chosen)] if len(chosen) else draw_numbers(key, index, len(conditions))
        return put_batch({"index": index, "label": numbers, "condition": conditions.rows(numbers)}, mesh)

    batch_size = settings.batch_size * batch_shards(mesh)
    is_latent = config.data.space == "latent" and decoder is None
    images, labels = [], []
    sample(batch_of(0))[0].block_until_ready()  # compiles, so that the rate below is the rate
    started = time.perf_counter()
    with progress_bar(settings.count, "image") as bar:
        for first in range(0, settings.count, batch_size):
            image, label = _in_order(*jax.tree.map(to_host, sample(batch_of(first))))
            if is_latent and not np.isfinite(image).all():
                raise UserError("latents are NaN or infinite, so the model has diverged: use an earlier checkpoint.")
            images.append(image.astype(np.float32) if is_latent else to_uint8(image))
            labels.append(label)
            bar.update(min(batch_size, settings.count - first))
    seconds = (time.perf_counter() - started) / (len(images) * batch_size)
    return np.concatenate(images)[: settings.count], np.concatenate(labels)[: settings.count], seconds


def _in_order(image: np.ndarray, label: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of their indices: which host has which rows of a batch is up to the mesh."""
    order = np.argsort(index)
    return image[order], label[order]


def _write(directory: pathlib.Path, images: np.ndarray, labels: np.ndarray, shown: int) -> list[str]:
    """Writes a model's samples, float32 latents or uint8 images of which `shown` go on a grid; the files' names."""
    if images.dtype == np.float32:
        write_npz(directory / "samples.npz", latents=images, labels=labels)
        return ["samples.npz"]
    write_npz(directory / "samples.npz", arr_0=images, labels=labels)
    images = images[:shown]
    grid = image_grid(images, columns=int(np.ceil(len(images) ** 0.5)))
    atomic_write(directory / "grid.png", lambda temporary: grid.save(temporary))
    return ["samples.npz", "grid.png"]
