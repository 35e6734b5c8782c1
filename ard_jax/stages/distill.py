"""Distils the teacher into a student of few steps: ARD, or step distillation with `student.mask=diagonal`.

Reads the teacher and the trajectory store (or, with `distill.online`, the teacher alone) and writes
`distill/<student.name>/`, as the teacher stage does, and `distill/done.json`. Started again, it goes on where it
stopped. `distill.objective` names other methods, see ard_jax/objectives/.
"""

import functools
import pathlib

import ml_collections
import numpy as np
from jax.sharding import Mesh

from ard_jax.build import make_rollout, make_run_mesh, make_student
from ard_jax.captions.conditions import check_pictures, check_text_encoder, inputs_of, load_conditions
from ard_jax.conditions import draw_numbers
from ard_jax.data import InMemory, Source, identify, open_real
from ard_jax.drawing import make_pictures, student_sampler
from ard_jax.errors import UserError
from ard_jax.methods import columns_of, make_method
from ard_jax.models import init_from_teacher
from ard_jax.parallel import check_batch, is_first
from ard_jax.progress import Stopwatch
from ard_jax.sampling import trajectory_key
from ard_jax.training.fit import Task, fit
from ard_jax.training.state import release
from ard_jax.trajectories.store import open_store, store_hash
from ard_jax.types import Params
from ard_jax.workdir import (
    claim,
    keep_identity,
    load_student,
    load_teacher,
    merge_done,
    write_done,
)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Trains the student to `config.distill.steps`.

    Raises:
        UserError: there is no teacher, the store does not fit the config, or the batch or the workdir do not fit.
    """
    watch, mesh = Stopwatch(), make_run_mesh(config, "distill")
    settings, student, conditions = config.distill, make_student(config), load_conditions(config, workdir)
    check_text_encoder(config, workdir, conditions)
    directory = workdir / "distill" / config.student.name
    check_batch(settings, mesh, "distill")
    teacher, teacher_params, teacher_hash, _ = load_teacher(config, workdir, mesh)
    inputs = {"teacher": teacher_hash, "store": "", **inputs_of(conditions)}
    params, start = init_from_teacher(teacher_params, student), None
    if settings.start:
        params, inputs["start"], start = _load_start(config, workdir, mesh)
    source: Source
    columns: tuple[int, ...] | None
    if settings.online:  # the stream's positions are all that is needed
        source, columns = InMemory({"nothing": np.zeros(1, np.int32)}), None
        numbers = functools.partial(draw_numbers, trajectory_key(config.seed), count=conditions.for_training)
    else:
        (source, manifest), numbers = open_store(config, workdir, teacher_hash, inputs_of(conditions)), None
        columns = columns_of(manifest["points"], config)
        inputs["store"] = store_hash(manifest)
    method = make_method(config, student, teacher, columns, start)
    real = open_real(source, config) if method.real else None
    if real is not None:
        check_pictures(config, workdir, conditions, real)
    # a store's own bounds are part of its hash
    claim(directory, config, "distill", **inputs, max_abs=str(config.trajectories.max_abs) if settings.online else "")
    records: Source | dict[str, Source] = source
    if real is not None:
        keep_identity(directory, identify(config.data, real))
        records = {"trajectory": source, "real": real}
    frozen = {"": None, "teacher": teacher_params, "start": params}[method.reads]
    release(teacher_params, (params, frozen))
    task = Task(records, method, conditions, frozen, numbers)
    pictures = make_pictures(student_sampler(make_rollout(config, student)), conditions, config, workdir, mesh)
    made = fit(task, params, config, settings, directory, mesh, watch, pictures)
    write_done(directory, **made, teacher=teacher_hash)
    if is_first():
        merge_done(workdir / "distill", {config.student.name: made})


def _load_start(config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> tuple[Params, str, int]:
    """The student that `distill.start` names: its averaged parameters, their hash, and its number of steps.

    Raises:
        UserError: it is not there, or it is another network than the one that is to be trained.
    """
    name = config.distill.start
    _, params, sha256, before = load_student(workdir / "distill" / name, mesh)
    if _form(before) != _form(config):
        raise UserError(
            f"distill.start is {name!r}, a student of another form than {config.student.name!r} (kind, steps or "
            f"heads): start from one like it, or from the teacher."
        )
    return params, sha256, len(before.student.points)


def _form(config: ml_collections.ConfigDict) -> tuple[object, ...]:
    """What the shapes of a student's parameters depend on, and how it is sampled, beside the teacher."""
    student = config.student
    return (student.kind, *((len(student.points), student.heads) if student.kind == "history" else ()))
