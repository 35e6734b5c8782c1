"""Distils the teacher into a student of few steps: ARD, or step distillation with `student.mask=diagonal`.

Reads the teacher and the trajectory store (or, with `distill.online`, the teacher alone) and writes
`distill/<student.name>/`, as the teacher stage does, and `distill/done.json`. Started again, it goes on where it
stopped. `distill.objective` names other methods, see ard_jax/objectives/.
"""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from ard_jax.config import example_shape, make_process, make_student, make_teacher, plain, solver_settings
from ard_jax.data import InMemory
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, DiT, init_from_teacher
from ard_jax.objectives import Given, Method, find_method
from ard_jax.parallel import check_batch, is_first, make_mesh
from ard_jax.stages.fit import Task, fit
from ard_jax.stages.workdir import (
    Stopwatch,
    claim,
    load_student,
    load_teacher,
    merge_done,
    store_folder,
    write_done,
)
from ard_jax.trajectories.generate import stored_settings
from ard_jax.trajectories.store import Store, check_shards, read_manifest

SECTIONS = ("seed", "data", "model", "diffusion", "student", "distill")


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Trains the student to `config.distill.steps`.

    Raises:
        UserError: there is no teacher, the store does not fit the config, or the batch or the workdir do not fit.
    """
    watch, mesh = Stopwatch(), make_mesh(config.mesh)
    settings, student = config.distill, make_student(config)
    directory = workdir / "distill" / config.student.name
    check_batch(settings, mesh, "distill")
    teacher, teacher_params, teacher_hash = load_teacher(config, workdir, mesh)
    inputs = {"teacher": teacher_hash, "store": ""}
    params, start = init_from_teacher(teacher_params, student), None
    if settings.start:
        params, inputs["start"], start = load_start(config, workdir, student, mesh)
    if settings.online:  # the stream's positions are all that is needed
        source, columns = InMemory({"nothing": np.zeros(1, np.int32)}), None
    else:
        source, manifest = open_store(config, workdir, teacher_hash)
        columns = columns_of(manifest["points"], config)
        inputs["store"] = store_hash(manifest)
    method = make_method(config, student, teacher, columns, start)
    # a store's own bounds are part of its hash
    claim(directory, config, SECTIONS, **inputs, max_abs=str(config.trajectories.max_abs) if settings.online else "")
    frozen = {"": None, "teacher": teacher_params, "start": params}[method.reads]
    made = fit(Task(source, method, frozen), params, config, settings, directory, mesh, watch)
    write_done(directory, **made, teacher=teacher_hash)
    if is_first():
        merge_done(workdir / "distill", {config.student.name: made})


def columns_of(stored: Sequence[int], config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Where the student's points stand among the stored ones."""
    return tuple(stored.index(point) for point in config.student.points)


def make_method(
    config: ml_collections.ConfigDict,
    student: DiT,
    teacher: DiT,
    columns: tuple[int, ...] | None,
    start: int | None = None,
) -> Method:
    """The method that `config.distill.objective` names; `columns` and `start` as in `Given`.

    Raises:
        UserError: there is no such method, or it cannot be built from this config.
    """
    settings = config.distill
    return find_method(settings.objective)(
        Given(
            student=student,
            kind=config.student.kind,
            teacher=teacher,
            process=make_process(config),
            solver=solver_settings(config),
            shape=example_shape(config),
            points=tuple(config.student.points),
            target=config.student.target,
            columns=columns,
            start=start,
            max_abs=config.trajectories.max_abs,
            seed=config.seed,
            options=settings.get(settings.objective.rpartition(".")[2], {}),
        )
    )


def training_flops(config: ml_collections.ConfigDict, start: int | None = None) -> float:
    """FLOPs of the whole training that a config asks for, from the config alone; `start` as in `Given`.

    Raises:
        UserError: the method cannot be built from this config.
    """
    settings = config.distill
    columns = None if settings.online else columns_of(config.trajectories.points, config)
    method = make_method(config, make_student(config), make_teacher(config), columns, start)
    return method.flops * settings.batch_size * settings.steps


def load_start(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, student: DiT, mesh: Mesh
) -> tuple[Any, str, int]:
    """The student that `distill.start` names: its averaged parameters, their hash, and its number of steps.

    Raises:
        UserError: it is not there, or it is another network than the one that is to be trained.
    """
    name = config.distill.start
    model, params, sha256, before = load_student(workdir / "distill" / name, mesh)
    if before.student.kind != config.student.kind or form(model) != form(student):
        raise UserError(
            f"distill.start is {name!r}, a student of another form than {config.student.name!r} (kind, steps or "
            f"heads): start from one like it, or from the teacher."
        )
    return params, sha256, len(before.student.points)


def form(student: DiT) -> tuple[Any, ...]:
    """What the shapes of a student's parameters depend on, beside the teacher."""
    return (student.steps, student.heads) if isinstance(student, ARDStudent) else ()


def open_store(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, teacher_hash: str
) -> tuple[Store, dict[str, Any]]:
    """The trajectory store and its manifest.

    Raises:
        UserError: there is none, it does not fit the config, or a shard is broken.
    """
    folder = store_folder(config, workdir)
    manifest = read_manifest(folder)
    check_store(manifest, config, teacher_hash)
    check_shards(folder, manifest, checksums=total_bytes(manifest) <= config.run.in_memory)
    return Store(folder, manifest), manifest


def store_hash(manifest: dict[str, Any]) -> str:
    """One hash for all shards of a store."""
    return hashlib.sha256("".join(shard["sha256"] for shard in manifest["shards"]).encode()).hexdigest()


def total_bytes(manifest: dict[str, Any]) -> int:
    return sum(shard["bytes"] for shard in manifest["shards"])


def check_store(manifest: dict[str, Any], config: ml_collections.ConfigDict, teacher_hash: str) -> None:
    """Compares a store with the config that wants to train on it.

    Raises:
        UserError: it was made by another teacher or with other settings, or lacks a point.
    """
    remedy = "make a store with this config, or use the config that the store was made with"
    if manifest["teacher_sha256"] != teacher_hash:
        raise UserError(
            f"the trajectory store was made by another teacher (weights {manifest['teacher_sha256'][:12]}…, "
            f"the teacher here has {teacher_hash[:12]}…): {remedy}."
        )
    here = stored_settings(plain(config))
    differing = [
        f"{key} {value!r} there, {here.get(key)!r} here"
        for key, value in manifest["settings"].items()
        if here.get(key) != value
    ]
    if differing:
        raise UserError(f"the trajectory store does not fit this config ({'; '.join(differing[:3])}): {remedy}.")
    missing = [point for point in config.student.points if point not in manifest["points"]]
    if missing:
        raise UserError(
            f"student.points has {missing}, but the trajectory store keeps {manifest['points']}: "
            f"choose points out of the store's, or {remedy}."
        )
    if config.student.target == "xt" and not manifest["keep_noisy"]:
        raise UserError(f"student.target is 'xt', but the trajectory store keeps no noisy points: {remedy}.")
