"""Trains the diffusion teacher on images.

Reads the images of `data` and writes `teacher/`: Orbax checkpoints (parameters, running average, optimiser, place in
the data), metrics.jsonl, TensorBoard files, labels.json (names of the classes), with `run.sample_every` pictures in
progress/, and done.json. Started again, it goes on where it stopped.
"""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from ard_jax.build import example_shape, make_process, make_run_mesh, make_solve, make_teacher
from ard_jax.captions.conditions import check_pictures, inputs_of, load_conditions
from ard_jax.data import check_records, identify, image_source
from ard_jax.drawing import make_pictures, teacher_sampler
from ard_jax.keys import make_key
from ard_jax.models import Backbone
from ard_jax.models.backbone import condition_like
from ard_jax.models.flops import teacher_macs
from ard_jax.objectives import Method
from ard_jax.objectives.denoising import denoising
from ard_jax.parallel import check_batch, sharding_of
from ard_jax.progress import Stopwatch
from ard_jax.training.fit import Task, fit
from ard_jax.types import Params
from ard_jax.workdir import claim, keep_identity, write_done


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, check: bool = False) -> None:
    """Trains the teacher to `config.teacher.steps`; with `check`, just reads every image once.

    Raises:
        UserError: the data, the batch or the workdir do not fit.
    """
    watch, directory, mesh = Stopwatch(), workdir / "teacher", make_run_mesh(config, "teacher")
    settings, data = config.teacher, config.data
    check_batch(settings, mesh, "teacher")
    source = image_source(data)
    if check:
        return check_records(source)
    conditions = load_conditions(config, workdir)
    check_pictures(config, workdir, conditions, source)
    claim(directory, config, "teacher", **inputs_of(conditions))
    keep_identity(directory, identify(data, source))
    model, shape = make_teacher(config), example_shape(config)
    params = init_parameters(model, shape, config.seed, mesh)
    objective = denoising(
        model, make_process(config), label_dropout=settings.label_dropout, horizontal_flip=data.horizontal_flip
    )
    task = Task(source, Method(objective, flops=6 * teacher_macs(model, shape)), conditions)
    pictures = make_pictures(teacher_sampler(model, make_solve(config)), conditions, config, workdir, mesh)
    write_done(directory, **fit(task, params, config, settings, directory, mesh, watch, pictures))


def init_parameters(model: Backbone, shape: tuple[int, int, int], seed: int, mesh: Mesh) -> Params:
    """Fresh parameters, made where they lie, so that no device ever holds all of them."""

    def init():
        one = jnp.zeros((1, *shape)), jnp.zeros(1), condition_like(model, 1)
        return model.init(make_key(seed), *one)["params"]

    return jax.jit(init, out_shardings=sharding_of(jax.eval_shape(init), mesh))()
