"""Distils the teacher into a student of few steps: ARD, or step distillation with `student.mask=diagonal`.

Reads the teacher and the trajectory store (or, with `distill.online`, the teacher alone) and writes
`distill/<student.name>/`, as the teacher stage does, and `distill/done.json`. Started again, it goes on where it
stopped.
"""

import hashlib
import pathlib
from typing import Any

import ml_collections
import numpy as np

from ard_jax.config import example_shape, make_student, network_calls, plain, solver_settings
from ard_jax.data import InMemory
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, DiT, init_from_teacher
from ard_jax.objectives.ard import ard, online_ard
from ard_jax.parallel import check_batch, is_first, make_mesh
from ard_jax.stages.fit import Task, fit
from ard_jax.stages.workdir import (
    Stopwatch,
    claim,
    load_teacher,
    merge_done,
    store_folder,
    write_done,
)
from ard_jax.training.flops import student_macs, teacher_macs
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
    store = None if settings.online else store_folder(config, workdir)
    manifest = read_manifest(store) if store else None
    teacher, teacher_params, teacher_hash = load_teacher(config, workdir, mesh)
    if manifest:
        check_store(manifest, config, teacher_hash)
        check_shards(store, manifest, checksums=total_bytes(manifest) <= config.run.in_memory)
    bounds = "" if manifest else str(config.trajectories.max_abs)  # a store's own are part of its hash
    claim(directory, config, SECTIONS, teacher=teacher_hash, store=store_hash(manifest), max_abs=bounds)
    task = stored(student, config, store, manifest) if manifest else online(student, config, teacher, teacher_params)
    made = fit(task, init_from_teacher(teacher_params, student), config, settings, directory, mesh, watch)
    write_done(directory, **made, teacher=teacher_hash)
    if is_first():
        merge_done(workdir / "distill", {config.student.name: made})


def stored(student: ARDStudent, config: ml_collections.ConfigDict, store: pathlib.Path, manifest: dict) -> Task:
    """Distillation from a trajectory store."""
    columns = tuple(manifest["points"].index(point) for point in config.student.points)
    return Task(
        source=Store(store, manifest),
        objective=ard(student, target=config.student.target, columns=columns),
        frozen=None,
        flops=6 * student_macs(student, example_shape(config)),
    )


def online(student: ARDStudent, config: ml_collections.ConfigDict, teacher: DiT, teacher_params: Any) -> Task:
    """Distillation with the teacher inside the training step: every position of the stream is a new trajectory."""
    solver, shape = solver_settings(config), example_shape(config)
    objective = online_ard(
        student,
        teacher,
        target=config.student.target,
        points=tuple(config.student.points),
        shape=shape,
        seed=config.seed,
        max_abs=config.trajectories.max_abs,
        **solver,
    )
    teacher_flops = 2 * network_calls(solver) * teacher_macs(teacher, shape)
    return Task(
        source=InMemory({"nothing": np.zeros(1, np.int32)}),  # the stream's positions are all that is needed
        objective=objective,
        frozen=teacher_params,
        flops=6 * student_macs(student, shape) + teacher_flops,
    )


def store_hash(manifest: dict[str, Any] | None) -> str:
    """One hash for all shards of a store, "" for none."""
    if manifest is None:
        return ""
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
