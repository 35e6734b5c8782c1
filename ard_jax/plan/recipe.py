"""What a whole run takes: places on disk, and hours of chips."""

import math
from collections.abc import Collection, Mapping

import jax
import ml_collections
import numpy as np

from ard_jax.build import example_shape, make_student, make_teacher
from ard_jax.models import count_parameters, network_shapes
from ard_jax.models.flops import teacher_macs
from ard_jax.plan.cost import Cost
from ard_jax.plan.programs import Work
from ard_jax.training.checkpoints import kept_steps
from ard_jax.training.state import make_optimizer, start_state
from ard_jax.types import PyTree


def is_made(stage: str, config: ml_collections.ConfigDict, trained: Collection[str]) -> bool:
    """Whether a run makes its teacher, or its store: neither if it has a `dir`, nor a store that nothing reads.

    Args:
        stage: "teacher" or "trajectories".
        config: the run's.
        trained: the stages that train a student.
    """
    read = stage == "teacher" or "finetune" in trained or not config.distill.online
    return read and not config[stage].dir


def store_bytes(config: ml_collections.ConfigDict) -> int:
    """Bytes of the trajectory store's arrays: the noise, and each point once or, with noisy points, twice."""
    settings = config.trajectories
    states = 1 + len(settings.points) * (2 if settings.keep_noisy else 1)
    label_and_index = 2 * np.dtype(np.int64).itemsize
    width = {"float16": 2, "bfloat16": 2, "float32": 4}[settings.dtype]
    return settings.count * (states * math.prod(example_shape(config)) * width + label_and_index)


def state_bytes(state: PyTree) -> int:
    """Bytes of one checkpoint of a training's state: every network, their averages, the optimisers' state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def storage(config: ml_collections.ConfigDict, steps: Mapping[str, Work]) -> dict[str, int]:
    """Bytes on disk at the end of a run, by stage; of those that are made (`is_made`).

    Args:
        config: the run's.
        steps: of the stages that train a student, by name.
    """
    trained = {stage: work.arguments[0] for stage, work in steps.items()}
    if is_made("teacher", config, steps):
        trained = {"teacher": _teacher_state(config), **trained}
    sizes = {name: kept_checkpoints(config, name) * state_bytes(state) for name, state in trained.items()}
    return {"trajectories": store_bytes(config), **sizes} if is_made("trajectories", config, steps) else sizes


def _teacher_state(config: ml_collections.ConfigDict) -> PyTree:
    """Shapes of the state of the teacher's training."""
    optimizer = make_optimizer(config.teacher.optimizer, config.teacher.steps)
    return jax.eval_shape(lambda params: start_state(params, optimizer, 0), network_shapes(make_teacher(config)))


def kept_checkpoints(config: ml_collections.ConfigDict, stage: str) -> int:
    """How many checkpoints a stage that trains leaves, but for those that `watch` asks for."""
    settings, run = config[stage], config.run
    saved = sorted({*range(settings.checkpoint_every, settings.steps, settings.checkpoint_every), settings.steps})
    return len(kept_steps(saved, run.keep_checkpoints, run.keep_every))


def parameters(config: ml_collections.ConfigDict) -> int:
    """Of the student."""
    return count_parameters(network_shapes(make_student(config)))


def chip_hours(
    config: ml_collections.ConfigDict, steps: Mapping[str, Cost], sampler: Cost, trajectory: Cost
) -> dict[str, float]:
    """Hours of chips of each stage that is run (`is_made`), at the bounds of its programs.

    The teacher's training is not compiled: it is given the utilisation of the distillation step.

    Args:
        config: the run's.
        steps: of the stages that train a student, "distill" among them, by name.
        sampler, trajectory: the other programs.
    """
    teacher_flops = 6 * teacher_macs(make_teacher(config), example_shape(config)) * config.teacher.batch_size
    distill = steps["distill"]
    seconds = {
        "teacher": config.teacher.steps * teacher_flops / (distill.chip.flops * distill.utilisation),
        "trajectories": _runs(config.trajectories.count, trajectory) * _of_all_chips(trajectory),
    }
    seconds = {stage: spent for stage, spent in seconds.items() if is_made(stage, config, steps)}
    seconds |= {stage: config[stage].steps * _of_all_chips(step) for stage, step in steps.items()}
    seconds["sample"] = _runs(config.sample.count, sampler) * _of_all_chips(sampler)
    return {stage: spent / 3600 for stage, spent in seconds.items()}


def _runs(count: int, cost: Cost) -> int:
    """Runs of a program that make `count` rows."""
    return math.ceil(count / cost.work.rows)


def _of_all_chips(cost: Cost) -> float:
    """Chip-seconds of one run."""
    return cost.bound * cost.work.mesh.size
