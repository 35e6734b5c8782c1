"""Trains the diffusion teacher on images.

Reads the images of `data` and writes `teacher/`: Orbax checkpoints (parameters, running average, optimiser, place in
the data), metrics.jsonl, TensorBoard files and done.json. Started again, it goes on where it stopped.
"""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections

from ard_jax.config import example_shape, make_process, make_teacher
from ard_jax.data import image_source, in_memory, stream
from ard_jax.files import tree_sha256
from ard_jax.objectives.denoising import denoising
from ard_jax.parallel import check_batch, make_mesh
from ard_jax.stages.workdir import Stopwatch, claim, write_done
from ard_jax.training.flops import teacher_macs
from ard_jax.training.loop import train

SECTIONS = ("seed", "data", "model", "diffusion", "teacher")


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Trains the teacher to `config.teacher.steps`.

    Raises:
        UserError: the data, the batch or the workdir do not fit.
    """
    watch, directory, mesh = Stopwatch(), workdir / "teacher", make_mesh()
    settings, data = config.teacher, config.data
    check_batch(settings.batch_size, mesh, "teacher.batch_size")
    source = image_source(data)
    claim(directory, config, SECTIONS)
    batches = stream(
        in_memory(source, config.run.in_memory),
        batch_size=settings.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.run.workers,
    )
    model, shape = make_teacher(config), example_shape(config)
    one = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    objective = denoising(
        model, make_process(config), label_dropout=settings.label_dropout, horizontal_flip=data.horizontal_flip
    )
    trained = train(
        objective,
        jax.jit(model.init)(jax.random.key(config.seed), *one)["params"],
        batches,
        settings=settings,
        run=config.run,
        seed=config.seed,
        directory=directory,
        mesh=mesh,
        flops_per_example=6 * teacher_macs(model, shape),
    )
    hashes = {"params": tree_sha256(trained.state.params), "ema": tree_sha256(trained.state.ema)}
    write_done(directory, hashes, max(watch(), trained.seconds), step=int(trained.state.step))
