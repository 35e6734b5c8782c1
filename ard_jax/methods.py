"""Training methods from a config: what the stages distill and finetune train, and what a training costs."""

from collections.abc import Sequence
from typing import cast

import ml_collections

from ard_jax.build import example_shape, make_process, make_solve, make_student, make_teacher
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, Backbone, Network
from ard_jax.objectives import Given, Method, find_method
from ard_jax.objectives.adversarial import adversarial_method, make_judge


def columns_of(stored: Sequence[int], config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """Where the student's points stand among the stored ones."""
    return tuple(stored.index(point) for point in config.student.points)


def make_method(
    config: ml_collections.ConfigDict,
    student: Network,
    teacher: Backbone,
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
            solve=make_solve(config),
            shape=example_shape(config),
            points=tuple(config.student.points),
            target=config.student.target,
            columns=columns,
            start=start,
            max_abs=config.trajectories.max_abs,
            seed=config.seed,
            options=settings.get(settings.objective.rpartition(".")[2], {}),
            horizontal_flip=config.data.horizontal_flip,
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


def finetuned_config(config: ml_collections.ConfigDict, before: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of the fine-tuned student: its form is that of the student it starts from, whatever is asked now.

    Args:
        config: the stage's.
        before: what that student was trained with.

    Raises:
        UserError: that student has no history, so that there is no teacher forcing.
    """
    name, kind = before.student.name, before.student.kind
    if kind != "history":
        raise UserError(
            f"the student {name!r} is of the kind {kind!r}, but the fine-tune trains students of the kind 'history': "
            f"set finetune.start to one."
        )
    config = ml_collections.ConfigDict(config.to_dict())
    config.student.update(before.student.to_dict() | {"name": config.finetune.name})
    config.distill.objective = "adversarial"
    return config


def make_finetune_method(config: ml_collections.ConfigDict, teacher: Backbone, columns: tuple[int, ...]) -> Method:
    """The method of a config of `finetuned_config`; `columns` as in `objectives.Given`."""
    settings = config.finetune
    student = cast(ARDStudent, make_student(config))  # `finetuned_config` refuses the others
    return adversarial_method(
        student,
        make_judge(teacher, tuple(settings.layers), make_process(config), settings.feature_time),
        shape=example_shape(config),
        target=config.student.target,
        columns=columns,
        horizontal_flip=config.data.horizontal_flip,
        weight=settings.weight,
        warmup=settings.warmup,
        spectral_rounds=settings.spectral_rounds,
        optimizer=settings.discriminator_optimizer,
    )
