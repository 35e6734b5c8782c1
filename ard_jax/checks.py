"""What a config must satisfy before anything is compiled: each value, and what several must satisfy together."""

import functools
from operator import getitem

import ml_collections

from ard_jax.build import compute_dtype, make_rollout, make_solve, make_student, make_teacher
from ard_jax.config import LABELS, ROWS
from ard_jax.curve import check_metric
from ard_jax.errors import UserError, settings_of
from ard_jax.models.attention import choose_backend, target_platform
from ard_jax.objectives import find_method
from ard_jax.training.state import make_optimizer


def _check_points(points: tuple[int, ...], steps: int, key: str) -> None:
    """Points are respaced indices, strictly falling and ending at 0 (docs/METHOD.md section 3)."""
    whole = all(isinstance(point, int) for point in points)
    if not points or not whole or list(points) != sorted(set(points), reverse=True) or points[-1] or points[0] >= steps:
        raise UserError(
            f"{key} is {tuple(points)}: give strictly falling indices below the teacher's {steps} steps, "
            f"the last one 0, such as (15, 10, 5, 0) for 4 of 25 steps."
        )


def _check_interval(interval: tuple[float, ...], key: str) -> None:
    """Raises UserError for anything but two rising numbers from 0 (data) to 1 (noise)."""
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"{key} is {tuple(interval)}: give two rising numbers from 0 (data) to 1 (noise).")


# Keys that results.json, pictures.npz, edits.npz and gallery.npz have beside the models' names.
RESERVED = (
    "teacher", "config", "degradation_ratio", "degradation_ratios", "features", "halves", "judge", "labels",
    "measured_with", "paired", "real_images", "samples", "seconds", "label", "noise", "source", "teacher_xt",
    "real", "held_out",
)  # fmt: skip


def is_folder_name(name: object) -> bool:
    """Whether a model's name can be that of its folder."""
    return isinstance(name, str) and name.replace("_", "").replace("-", "").isalnum()


def is_student_name(name: object) -> bool:
    """Whether a student may have that name."""
    return is_folder_name(name) and name not in RESERVED


def check_values(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first setting whose value its row in config.py does not allow, NaN included."""
    for key, allowed in ((key, row.allowed) for key, row in ROWS.items() if row.allowed):
        value = functools.reduce(getitem, key.split("."), config)
        if not allowed.holds(value):
            shown = repr(value) if isinstance(value, str) else value
            raise UserError(f"{key} is {shown}: {allowed.remedy}.")


def listed_labels(settings: ml_collections.ConfigDict) -> tuple[int, ...]:
    """The numbers that `sample.labels` lists; () where it says in a word how they are drawn."""
    labels = settings.labels
    if labels in LABELS:
        return ()
    return (labels,) if isinstance(labels, int) else tuple(labels)


def _check_mesh(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for sizes of `config.mesh` that fit no number of devices."""
    for axis, size in config.mesh.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis} is {size}: give a number of devices, or -1 for what the other axes leave.")
    if config.mesh.data == config.mesh.fsdp == -1:  # of tensor it says that the batch decides
        raise UserError("mesh.data and mesh.fsdp are both -1: only one of them can take what the others leave.")


def _check_finetune(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a fine-tune that cannot be."""
    settings, depth = config.finetune, make_teacher(config).depth
    with settings_of("finetune.discriminator_optimizer"):
        make_optimizer(settings.discriminator_optimizer, settings.steps)
    _check_judge("finetune", settings.accumulate, "finetune.layers", tuple(settings.layers), depth)
    if not is_student_name(settings.name) or settings.name == (settings.start or config.student.name):
        raise UserError(
            f"finetune.name is {settings.name!r}, which must name a student's folder and its place in results.json: "
            f"use letters, digits, '-' and '_', another name than that of the student that it starts from, and none of "
            f"{', '.join(RESERVED)}."
        )


def _check_judge(stage: str, accumulate: int, key: str, layers: tuple[int, ...], depth: int) -> None:
    """Raises UserError for a stage whose discriminator could not see whole batches, or blocks that are not there."""
    if accumulate != 1:
        raise UserError(
            f"{stage}.accumulate is {accumulate}, but the discriminator's batch norm and the adaptive weight "
            f"are of the whole batch: set it to 1, and model.remat to full or mesh.fsdp higher to save memory."
        )
    if len(set(layers)) < len(layers) or any(layer not in range(depth) for layer in layers):
        raise UserError(
            f"{key} is {layers}, but the teacher has {depth} blocks: give different numbers from 0 to {depth - 1}, or "
            f"() for all."
        )


def _check_rivals(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for methods with other networks than the student that cannot be."""
    settings, matching = config.distill, config.distill.distribution_matching
    for method in ("distribution_matching", "trajectory_matching"):
        _check_interval(settings[method].interval, f"distill.{method}.interval")
        for name in (name for name in settings[method] if name.endswith("optimizer")):
            with settings_of(f"distill.{method}.{name}"):
                make_optimizer(settings[method][name], settings.steps)
        if settings.objective == method:  # the student moves at every so-manieth step alone
            with settings_of("distill.optimizer"):
                make_optimizer(settings.optimizer, -(-settings.steps // settings[method].ratio))
    if settings.objective == "distribution_matching" and matching.weight:
        layers, depth = tuple(matching.layers), make_teacher(config).depth
        _check_judge("distill", settings.accumulate, "distill.distribution_matching.layers", layers, depth)


def _check_compare(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for seeds or numbers of steps that cannot be compared; entries.py checks the methods."""
    seeds, steps = tuple(config.compare.seeds), tuple(config.compare.steps)
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise UserError(f"compare.seeds is {seeds}: give different whole numbers of at least 0, such as (0, 1, 2).")
    if not steps or not all(isinstance(number, int) and number > 0 for number in steps):
        raise UserError(f"compare.steps is {steps}: give numbers of steps, such as (1, 2, 4).")


def validate(config: ml_collections.ConfigDict, platform: str | None = None) -> None:
    """Checks what can be checked without data or devices, in milliseconds.

    Args:
        config: the config.
        platform: that it shall run on, if not this machine's.

    Raises:
        UserError: the first thing that is wrong, in one sentence.
    """
    diffusion, trajectories, student = config.diffusion, config.trajectories, config.student
    check_values(config)
    _check_mesh(config)
    _check_compare(config)
    check_metric(config.run.keep_best, "run.keep_best")
    for stage in ("teacher", "distill", "finetune"):
        with settings_of(f"{stage}.optimizer"):
            make_optimizer(config[stage].optimizer, config[stage].steps)
    _check_points(tuple(trajectories.points), diffusion.steps, "trajectories.points")
    _check_points(tuple(student.points), diffusion.steps, "student.points")
    teacher = make_teacher(config)
    make_rollout(config, make_student(config))
    find_method(config.distill.objective)
    make_solve(config)
    patch_size, size = teacher.patch_size, config.data.image_size
    if size % patch_size:
        raise UserError(
            f"data.image_size {size} is not a multiple of the patch size {patch_size}: choose a size that is."
        )
    tokens, head_dim = (size // patch_size) ** 2, teacher.hidden_size // teacher.num_heads
    with settings_of("model"):
        choose_backend(
            teacher.attention, platform or target_platform(), compute_dtype(config.model.dtype), tokens, head_dim
        )
    missing = sorted(set(student.points) - set(trajectories.points), reverse=True)
    if missing and not config.distill.online:
        raise UserError(
            f"student.points has {missing}, which the store does not keep (trajectories.points is "
            f"{tuple(trajectories.points)}): choose points out of the store's, or make a store that has them."
        )
    if student.target == "xt" and not trajectories.keep_noisy and not config.distill.online:
        raise UserError(
            "student.target is 'xt', but the store keeps no noisy points: set trajectories.keep_noisy=True."
        )
    _check_rivals(config)
    _check_finetune(config)
    if not is_student_name(student.name):
        raise UserError(
            f"student.name is {student.name!r}, which cannot name a student's folder and its place in results.json: "
            f"use letters, digits, '-' and '_', and none of {', '.join(RESERVED)}."
        )
    if not config.sample.models or not all(is_folder_name(name) for name in config.sample.models):
        raise UserError(f"sample.models is {tuple(config.sample.models)}: name the teacher, or students, or both.")
    classes = range(config.data.num_classes)
    outside = [label for label in listed_labels(config.sample) if label not in classes]
    if outside and classes:  # how many captions there are, their store says
        raise UserError(
            f"sample.labels has {outside[0]!r}, but there are {config.data.num_classes} classes: "
            f"give labels from 0 to {config.data.num_classes - 1}."
        )
