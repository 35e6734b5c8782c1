"""Draws images from the teacher and from students, in batches over all devices.

Writes, for each name in `sample.models`, `sample/<name>/samples.npz` (uint8 images under the key `arr_0`, as the ADM
evaluator wants them, and `labels`) and `grid.png`. Models of latents decode theirs with the VAE in WORKDIR/vae or
`vae.dir`; where there is none, they write float32 latents under the key `latents`. Image i has the same noise and label
for every model.

Images are written as they are drawn, in parts of some hundreds, and joined at the end: started again, the stage leaves
alone what is finished and goes on from the last part. What was sampled with other settings is not replaced.

With `sample.prompts`, a benchmark's list of prompts is drawn in `prompts/NAME/`, a workdir of its own, and its images
are laid out there as `sample.layout` says, so that the benchmark's own tool scores them (docs/EVALUATION.md).
"""

import functools
import importlib
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ard_jax.build import make_run_mesh
from ard_jax.captions.conditions import check_text_encoder, inputs_of, load_conditions
from ard_jax.conditions import Conditions
from ard_jax.drawing import (
    Decoder,
    Drawable,
    check_labels,
    checked_levels,
    choose_numbers,
    drawable,
    in_order,
    make_decoder,
    make_drawing,
    numbered_batch,
    to_levels,
)
from ard_jax.errors import UserError
from ard_jax.files import atomic_write, file_sha256, join_npz, read_npz, to_host, write_npz
from ard_jax.parallel import batch_shards, is_first
from ard_jax.picture_grid import image_grid
from ard_jax.progress import Stopwatch, progress_bar
from ard_jax.prompted import Listed, lay_out, open_list
from ard_jax.sampled import are_drawn, drawn_otherwise, drawn_with, has_begun, note_samples
from ard_jax.types import Batch
from ard_jax.workdir import (
    find_vae,
    load_student,
    load_teacher,
    merge_done,
    occupy,
    read_done,
    require_done,
    teacher_folder,
    vae_folder,
)

log = logging.getLogger("ard_jax")

PART = 512  # images, which are lost if the stage is killed


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Samples every model of `config.sample.models`.

    Raises:
        UserError: a model has not been trained, or there are samples of it with other settings.
    """
    if config.sample.prompts:
        return _draw_list(open_list(config, workdir))
    mesh = make_run_mesh(config)
    vae = find_vae(config, workdir)
    if config.data.space == "latent" and vae is None:
        there = vae_folder(config, workdir)
        log.warning("there is no VAE in %s, so latents are written: convert one, or set vae.dir, for images.", there)
    decoder, conditions = make_decoder(vae, config, mesh), load_conditions(config, workdir)
    check_text_encoder(config, workdir, conditions)
    check_labels(config.sample, conditions)
    inputs = drawn_with(inputs_of(conditions), vae, config.data.space)
    missing = [name for name in config.sample.models if not _is_finished(config, workdir, name, inputs)]
    loaded = {name: _load(config, workdir, name, mesh) for name in missing}
    programs = functools.cache(functools.partial(make_drawing, config=config, mesh=mesh))  # one for equal students
    for name, model in loaded.items():
        watch, directory = Stopwatch(), workdir / "sample" / name
        occupy(directory)
        _begin(directory, config, {"ema": model.facts["ema_sha256"], **inputs})
        drawn = functools.partial(programs(model.sampler), model.params)
        _draw(drawn, conditions, decoder, config, mesh, directory / "parts")
        if not is_first():
            continue
        files, seconds_per_image = _join(directory, config.sample)
        hashes = {file: file_sha256(directory / file) for file in files}
        made = {"sha256": hashes, "seconds": round(watch(), 2), "seconds_per_image": seconds_per_image, **model.facts}
        merge_done(workdir / "sample", {name: made})
        shutil.rmtree(directory / "parts")


def _draw_list(listed: Listed) -> None:
    """Encodes a list of prompts, draws it in its own workdir, and lays the images out."""
    importlib.import_module("ard_jax.stages.captions").run(listed.config, listed.workdir)
    run(listed.config, listed.workdir)
    if is_first():
        lay_out(listed)


def _is_finished(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, name: str, inputs: Mapping[str, str]
) -> bool:
    """Whether a model's samples are there, of its weights as they are now; latents are none where there is a VAE now.

    Raises:
        UserError: they are, with other settings, captions or decoder.
    """
    made = (read_done(workdir / "sample") or {}).get("models", {}).get(name)
    folder = teacher_folder(config, workdir) if name == "teacher" else workdir / "distill" / name
    weights = require_done(folder, "teacher" if name == "teacher" else "distill")["sha256"]["ema"]
    directory = workdir / "sample" / name
    if not are_drawn(directory, made, weights, decodes=bool(inputs.get("vae"))):
        return False
    _check_settings(directory, config, inputs)
    log.info("%s has been sampled already.", name)
    return True


def _check_settings(directory: pathlib.Path, config: ml_collections.ConfigDict, inputs: Mapping[str, str]) -> None:
    """Raises UserError if the samples in a folder are of other settings, captions or decoder."""
    if other := drawn_otherwise(directory, config, inputs):
        raise UserError(
            f"{directory} holds samples of other settings ({'; '.join(other[:3])}): use those settings, or another "
            f"--workdir, or move that folder away."
        )


def _begin(directory: pathlib.Path, config: ml_collections.ConfigDict, inputs: Mapping[str, str]) -> None:
    """Notes what a folder's samples are of; parts must be of the same, or of what is no more."""
    if has_begun(directory, inputs):
        _check_settings(directory, config, inputs)
    elif is_first():
        shutil.rmtree(directory / "parts", ignore_errors=True)
        note_samples(directory, config, inputs)


def _load(config: ml_collections.ConfigDict, workdir: pathlib.Path, name: str, mesh: Mesh) -> Drawable:
    """A model to draw from."""
    is_teacher = name == "teacher"
    loaded = load_teacher(config, workdir, mesh) if is_teacher else load_student(workdir / "distill" / name, mesh)
    return drawable(config, loaded, is_teacher)


def _draw(
    drawn: Callable[[Batch], tuple[jax.Array, jax.Array, jax.Array]],
    conditions: Conditions,
    decoder: Decoder | None,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    folder: pathlib.Path,
) -> None:
    """Writes images 0 … count−1 with their labels in parts, from the first that is not there.

    `drawn` is `make_drawing`'s, of a model. A part is an npz file with "arr_0" (uint8), or without a decoder "latents"
    (float32), "labels", and the "seconds" that an image took once compiled.
    """
    settings = config.sample

    def sample(batch):
        images, *rest = drawn(batch)
        images = decoder(images) if decoder else images
        return images if is_latent else to_levels(images), *rest

    def batch_of(first):
        """Indices beyond the count fill the last batch up."""
        index = np.arange(first, first + batch_size)
        return numbered_batch(index, choose_numbers(settings, index, conditions), conditions, mesh)

    batch_size = settings.batch_size * batch_shards(mesh)
    is_latent = config.data.space == "latent" and decoder is None
    start = sum(len(read_npz(part, ("labels",))["labels"]) for part in _parts(folder)) if is_first() else 0
    if jax.process_count() > 1:
        start = int(multihost_utils.broadcast_one_to_all(np.int64(start)))
    if start >= settings.count:
        return
    if start:
        log.info("going on from image %d of %d.", start, settings.count)
    jax.block_until_ready(sample(batch_of(start)))  # compiles, so that the rate below is the rate
    rows = -(-PART // batch_size) * batch_size
    with progress_bar(settings.count, "image", initial=start) as bar:
        for begin in range(start, settings.count, rows):
            images, labels, started = [], [], time.perf_counter()
            for first in range(begin, min(begin + rows, settings.count), batch_size):
                image, label = in_order(*jax.tree.map(to_host, sample(batch_of(first))))
                images.append(_checked_latents(image) if is_latent else checked_levels(*image))
                labels.append(label)
                bar.update(min(batch_size, settings.count - first))
            seconds = (time.perf_counter() - started) / (len(images) * batch_size)
            if is_first():
                kept = slice(settings.count - begin)
                found = {"latents" if is_latent else "arr_0": np.concatenate(images)[kept]}
                found |= {"labels": np.concatenate(labels)[kept], "seconds": np.asarray(seconds)}
                write_npz(folder / f"{begin:09d}.npz", **found)


def _parts(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("[0-9]*.npz"))


def _checked_latents(latents: np.ndarray) -> np.ndarray:
    """Latents as float32; UserError if one is not finite."""
    if not np.isfinite(latents).all():
        raise UserError("latents are NaN or infinite, so the model diverged: use an earlier checkpoint.")
    return latents.astype(np.float32)


def _join(directory: pathlib.Path, settings: ml_collections.ConfigDict) -> tuple[list[str], float]:
    """Writes a model's samples out of their parts, with a grid of some; the files' names, and seconds an image."""
    parts = _parts(directory / "parts")
    first = read_npz(parts[0])
    name = "arr_0" if "arr_0" in first else "latents"
    shapes = {name: (settings.count, *first[name].shape[1:]), "labels": (settings.count,)}
    join_npz(directory / "samples.npz", parts, shapes)
    seconds = float(np.mean([read_npz(part, ("seconds",))["seconds"] for part in parts]))
    if name == "latents":
        return ["samples.npz"], seconds
    shown, images = [], 0
    for part in parts:
        if images < settings.grid:
            shown.append(read_npz(part)[name][: settings.grid - images])
            images += len(shown[-1])
    grid = image_grid(np.concatenate(shown), columns=int(np.ceil(images**0.5)))
    atomic_write(directory / "grid.png", lambda temporary: grid.save(temporary))
    return ["samples.npz", "grid.png"], seconds
