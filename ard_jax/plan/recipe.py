"""What a whole run takes: places on disk, and hours of chips."""

import math
from typing import Any

import jax
import ml_collections
import numpy as np

from ard_jax.config import example_shape, make_teacher
from ard_jax.models import count_parameters
from ard_jax.models.flops import teacher_macs
from ard_jax.plan.cost import Cost
from ard_jax.stages.workdir import student_shapes, teacher_shapes
from ard_jax.training.state import make_optimizer, start_state


def store_bytes(config: ml_collections.ConfigDict) -> int:
    """Bytes of the trajectory store's arrays: the noise, and each point once or, with noisy points, twice."""
    settings = config.trajectories
    states = 1 + len(settings.points) * (2 if settings.keep_noisy else 1)
    label_and_index = 2 * np.dtype(np.int64).itemsize
    width = {"float16": 2, "bfloat16": 2, "float32": 4}[settings.dtype]
    return settings.count * (states * math.prod(example_shape(config)) * width + label_and_index)


def checkpoint_bytes(params: Any, settings: ml_collections.ConfigDict) -> int:
    """Bytes of one checkpoint: parameters, their average and the optimiser's state."""
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    state = jax.eval_shape(lambda params: start_state(params, optimizer, 0), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def storage(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Bytes on disk at the end of a run, by folder."""
    kept, teacher = config.run.keep_checkpoints, teacher_shapes(make_teacher(config))
    return {
        "trajectories": store_bytes(config),
        "teacher": kept * checkpoint_bytes(teacher, config.teacher),
        "distill": kept * checkpoint_bytes(student_shapes(config), config.distill),
    }


def parameters(config: ml_collections.ConfigDict) -> int:
    """Of the student."""
    return count_parameters(student_shapes(config))


def chip_hours(config: ml_collections.ConfigDict, step: Cost, sampler: Cost, trajectory: Cost) -> dict[str, float]:
    """Hours of chips of each stage at the bounds of its programs.

    The teacher's training is not compiled: it is given the utilisation of the distillation step.
    """
    teacher_flops = 6 * teacher_macs(make_teacher(config), example_shape(config)) * config.teacher.batch_size
    seconds = {
        "teacher": config.teacher.steps * teacher_flops / (step.chip.flops * step.utilisation),
        "trajectories": runs(config.trajectories.count, trajectory) * of_all_chips(trajectory),
        "distill": config.distill.steps * of_all_chips(step),
        "sample": runs(config.sample.count, sampler) * of_all_chips(sampler),
    }
    return {stage: spent / 3600 for stage, spent in seconds.items()}


def runs(count: int, cost: Cost) -> int:
    """Runs of a program that make `count` rows."""
    return math.ceil(count / cost.work.rows)


def of_all_chips(cost: Cost) -> float:
    """Chip-seconds of one run."""
    return cost.bound * cost.work.mesh.size
