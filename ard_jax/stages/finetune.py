"""Fine-tunes a trained student against a discriminator on the frozen teacher's features.

Reads the teacher, the student `finetune.start`, the trajectory store and the real images or latents of `data`, and
writes `distill/<finetune.name>/`, as the distill stage does, so that it is sampled, evaluated and exported as any other
student. Started again, it goes on where it stopped. The losses are in ard_jax/objectives/adversarial.py.
"""

import pathlib

import ml_collections

from ard_jax.build import make_rollout, make_run_mesh
from ard_jax.captions.conditions import check_pictures, check_text_encoder, inputs_of, load_conditions
from ard_jax.data import identify, open_real
from ard_jax.drawing import make_pictures, student_sampler
from ard_jax.methods import columns_of, finetuned_config, make_finetune_method
from ard_jax.parallel import check_batch, is_first
from ard_jax.progress import Stopwatch
from ard_jax.training.fit import Task, fit
from ard_jax.trajectories.store import open_store, store_hash
from ard_jax.workdir import (
    check_same_config,
    claim,
    keep_identity,
    load_student,
    load_teacher,
    merge_done,
    network_settings,
    write_done,
)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Trains the student on, to `config.finetune.steps`.

    Raises:
        UserError: there is no teacher, student or store, they or the real data do not fit each other, or the batch or
            the workdir do not fit.
    """
    watch, mesh, settings = Stopwatch(), make_run_mesh(config, "finetune"), config.finetune
    check_batch(settings, mesh, "finetune")
    teacher, teacher_params, teacher_hash, _ = load_teacher(config, workdir, mesh)
    start = workdir / "distill" / (settings.start or config.student.name)
    student, params, start_hash, before = load_student(start, mesh)
    check_same_config(network_settings(before), network_settings(config), ("data", "model", "diffusion"), start)
    config = finetuned_config(config, before)
    conditions = load_conditions(config, workdir)
    check_text_encoder(config, workdir, conditions)
    source, manifest = open_store(config, workdir, teacher_hash, inputs_of(conditions))
    real = open_real(source, config)
    check_pictures(config, workdir, conditions, real)
    directory = workdir / "distill" / settings.name
    inputs = {"teacher": teacher_hash, "start": start_hash, "store": store_hash(manifest), **inputs_of(conditions)}
    claim(directory, config, "finetune", **inputs)
    keep_identity(directory, identify(config.data, real))
    method = make_finetune_method(config, teacher, columns_of(manifest["points"], config))
    task = Task({"trajectory": source, "real": real}, method, conditions, teacher_params)
    pictures = make_pictures(student_sampler(make_rollout(config, student)), conditions, config, workdir, mesh)
    made = fit(task, params, config, settings, directory, mesh, watch, pictures)
    write_done(directory, **made, teacher=teacher_hash)
    if is_first():
        merge_done(workdir / "distill", {settings.name: made})
