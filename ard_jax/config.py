"""Every setting of every stage, its default and its meaning, in one visible block.

A file in `configs/` starts from `default_config()` and changes what its experiment needs; the command line overrides
single keys (`--config.student.history_layers=2`).
"""

import functools
import json
import math
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from ard_jax.diffusion import FlowMatching, Guidance, LinearVP, Process, find_solver
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, DiT, size_fields
from ard_jax.models.attention import choose, target_platform
from ard_jax.objectives import find_method
from ard_jax.sampling import Rollout, student_rollout
from ard_jax.training.state import make_optimizer


def optimizer_defaults() -> dict[str, Any]:
    return {
        "name": "adamw",  # any optimiser of optax, by its name there
        "learning_rate": 1e-4,
        "schedule": "constant",  # or "cosine", falling to 0 at the last step
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "clip": 1.0,  # global gradient norm; 0 for none
        "ema": 0.9999,  # decay of the averaged parameters, ramped up as (1 + step) / (10 + step)
    }


def network_optimizer_defaults(**changes: Any) -> dict[str, Any]:
    """The same for a network that is not averaged."""
    return {name: value for name, value in optimizer_defaults().items() if name != "ema"} | changes


def default_config() -> ml_collections.ConfigDict:
    """The paper's ImageNet-256 settings wherever docs/METHOD.md section 5 gives a number."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "data": {
                "source": "tfds",  # "digits", "tfds" or "folder"
                "name": "",  # TFDS name
                "dir": "",  # TFDS data_dir, or the folder of images
                "split": "train",
                "image_size": 32,  # side of the network's input: pixels, or latents
                "channels": 4,
                "num_classes": 1000,
                "space": "latent",  # or "pixel"
                "horizontal_flip": False,
            },
            "vae": {
                "dir": "",  # folder of an autoencoder in diffusers' format; "" for the workdir's vae/
                "batch_size": 8,  # images a device decodes at a time
            },
            "encode": {  # makes latents of images, which `data` then describes
                "source": "folder",  # as in `data`, but of the images: "digits", "tfds" or "folder"
                "name": "",
                "dir": "",
                "split": "train",
                "image_size": 256,  # pixels
                "horizontal_flip": True,  # two records an image: itself, then its mirror image
                "sample": True,  # latents drawn from the encoder's distribution; or its mean
                "dtype": "float16",  # or "bfloat16", "float32"
                "batch_size": 64,  # records a device encodes at a time
                "shard_size": 4096,  # records a file
            },
            "model": {
                "name": "",  # a published size such as "DiT-XL/2", which sets the next four
                "patch_size": 2,
                "hidden_size": 1152,
                "depth": 28,
                "num_heads": 16,
                "mlp_ratio": 4.0,
                "learn_sigma": True,
                "label_init_std": 0.02,
                "time_init_std": 0.02,
                "frequency_shift": 0.0,  # of the time's sinusoids: 0 as published, 1 in diffusers' DiT
                "mlp_norm_eps": 1e-6,  # 1e-6 as published, 1e-5 in diffusers' DiT
                "dtype": "auto",  # compute type: bfloat16 on accelerators, float32 on CPU; or either by name
                "remat": "none",  # or "dots", "full"
                "attention": "auto",  # the device's fused kernel where it applies; or "xla", "cudnn", "splash"
            },
            "diffusion": {
                "process": "vp",  # the network predicts noise; or "flow": velocity
                "train_steps": 1000,
                "beta_start": 1e-4,
                "beta_end": 0.02,
                "spacing": "linspace",  # vp only: respaced timesteps; or "leading", "trailing", in diffusers' words
                "time_scale": 1000.0,  # flow only: length of the network's time
                "reversed": False,  # flow only: network time 0 is noise and the velocity is x_0 − ε, as in SiT
                "solver": "ddim",  # or "heun", "dpm++2m"
                "steps": 25,
                "guidance_scale": 1.5,
                "guided_channels": 3,  # 0 for all
                "guidance_interval": (0.0, 1.0),
            },
            "teacher": {
                "dir": "",  # a teacher trained elsewhere: the `teacher` folder of its workdir
                "steps": 400_000,
                "batch_size": 256,
                "accumulate": 1,  # microbatches a step: less memory for the same batch
                "label_dropout": 0.1,
                "checkpoint_every": 5000,
                "optimizer": optimizer_defaults(),
            },
            "trajectories": {
                "dir": "",  # a store made elsewhere: the `trajectories` folder of its workdir
                "count": 2_560_000,
                "points": (15, 10, 5, 0),  # respaced indices that are kept, counted down to the data
                "keep_noisy": False,  # keep the noisy points beside the x0-predictions
                "dtype": "float16",  # or "bfloat16", "float32"
                "batch_size": 64,  # trajectories a device solves at a time
                "shard_size": 4096,  # trajectories a file
                "max_abs": 0.0,  # trajectories that leave [-max_abs, max_abs] are dropped; 0 keeps all
            },
            "student": {
                "name": "ard",  # its folder under distill/
                "kind": "history",  # an ARDStudent; or a network that is told the time, sampled "deterministic"ally by
                # DDIM or "stochastic"ally with fresh noise after each step
                "points": (15, 10, 5, 0),  # S respaced indices out of the store's
                "target": "x0",  # predicted x0 at each point, or "xt": the noisy point itself
                "history_layers": 6,
                "mask": "causal",
                "heads": "separate",  # or "shared"
                "block_times": (),  # network time of each block; () for T·(S−b)/S
            },
            "distill": {
                "objective": "ard",  # or "progressive", "consistency", "distribution_matching", or your.own.module
                "start": "",  # name of a student to start from, and in progressive distillation to learn from
                "online": False,  # solve the teacher inside the training step; no store is read
                "steps": 300_000,
                "batch_size": 64,
                "accumulate": 1,
                "checkpoint_every": 5000,
                "optimizer": optimizer_defaults(),
                "consistency": {
                    "grid": 0,  # steps of the teacher's that a trajectory has; 0 for the teacher's own number, made a
                    # multiple of the student's
                    "decay": 0.95,  # of the target, the running average of the student
                    "huber": 0.00054,  # constant of the pseudo-Huber distance; 0 for the mean square
                },
                "distribution_matching": {
                    "ratio": 5,  # steps of the fake score to one of the student
                    "grid": 100,  # times at which scores are compared, spread over the teacher's
                    "interval": (0.02, 0.98),  # of these, those on this part of the way from data to noise
                    "optimizer": network_optimizer_defaults(),  # of the fake score
                },
            },
            "finetune": {  # a trained student goes on, with a discriminator beside it
                "name": "ard_adversarial",  # its folder under distill/
                "start": "",  # name of the student that it starts from; "" for student.name
                "steps": 40_000,
                "batch_size": 48,
                "accumulate": 1,  # no more: the discriminator's norm and the adaptive weight are of the whole batch
                "checkpoint_every": 5000,
                "warmup": 3000,  # first steps, in which the discriminator learns and the student only regresses
                "weight": 10.0,  # of the adversarial gradient over the regression's, at the last head
                "layers": (),  # blocks of the teacher that have a head, counted from 0; () for all
                "feature_time": 0.0,  # share of the way from data to noise at which the teacher sees images, noised so
                "spectral_rounds": 30,  # power iterations of the discriminator's kernels before the first step
                "optimizer": optimizer_defaults(),
                "discriminator_optimizer": network_optimizer_defaults(learning_rate=1e-3, clip=0.0),
            },
            "sample": {
                "models": ("teacher", "ard"),  # "teacher", or names of students
                "count": 50_000,
                "batch_size": 64,  # a device
                "seed": 1,
                "labels": (),  # classes to draw, in turn; () for labels drawn uniformly
                "grid": 64,  # pictures in the PNG
            },
            "evaluate": {
                "paired": 512,  # trajectories for the errors that are paired with the teacher
                "pictures": 16,
                "feature_steps": 600,  # training steps of the small classifier
                "neighbours": 3,
            },
            "report": {"title": "ard_jax"},
            "compare": {
                "methods": {},  # by name, each as `method_defaults` says; all of them get the training FLOPs that the
                # config's own student would take, but for a fine-tune, which has its own number of steps
                "steps": (1, 2, 4),  # S that are compared
                "points": ((0,), (10, 0), (15, 10, 5, 0)),  # student.points of every S
                "seeds": (0,),  # each with its own teacher, trajectories and students
                "quick": {},  # what --quick changes, nested as the config is
            },
            "mesh": {  # how many devices lie along each axis; one may be -1, for what the others leave
                "data": -1,  # share the batch
                "fsdp": 1,  # share the batch and keep a part of the parameters and the optimiser's state each
                "tensor": 1,  # share each layer's heads and MLP; within a host
            },
            "run": {  # how a run shows itself; may change between restarts
                "log_every": 100,
                "keep_checkpoints": 2,
                "tensorboard": True,
                "join_timeout": 300.0,  # seconds that a host waits for the others at the start
                "workers": 2,  # threads that read data
                "in_memory": 2**30,  # bytes of data that may be held decoded in memory
            },
        }
    )


def method_defaults() -> dict[str, Any]:
    """What an entry of `compare.methods` may say."""
    return {
        "title": "",  # its name on the page; "" for its key
        "stage": "distill",  # the stage that trains it; or "finetune"
        "steps": (),  # S that it has; () for those of compare.steps
        "chain": False,  # each S starts from the one before in `steps`, and all of them share one budget
        "start": "",  # method whose student of the same S it starts from
        "settings": {},  # what it changes in the sections student, distill and finetune, nested as they are
        "settings_at": {},  # more of that by S, such as {"1": {"distill": {"batch_size": 128}}}
    }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict → dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back: tuples have become lists."""
    return json.loads(json.dumps(config.to_dict()))


def config_arguments(text: str | None, **defaults: Any) -> dict[str, Any]:
    """Parses what follows the colon of `--config FILE:key=value,key=value`, typed as the defaults are.

    Raises:
        UserError: a key that the file does not have, or a value of the wrong type.
    """
    values = dict(defaults)
    for part in filter(None, (text or "").split(",")):
        key, _, value = part.partition("=")
        if key not in defaults:
            raise UserError(f"config argument {key!r} does not exist: this config has {', '.join(defaults)}.")
        try:
            values[key] = type(defaults[key])(value)
        except ValueError:
            expected = type(defaults[key]).__name__
            raise UserError(f"config argument {key} is {value!r}, which is no {expected}: give one.") from None
    return values


def compute_dtype(name: str) -> jnp.dtype:
    """The networks' compute type: "auto" is bfloat16 on accelerators and float32 on CPU; UserError for another."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("bfloat16", "float32"):
        raise UserError(f"model.dtype is {name!r}: choose auto, bfloat16 or float32.")
    return jnp.dtype(name)


def model_fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    model = config.model
    fields = {key: model[key] for key in ("patch_size", "hidden_size", "depth", "num_heads")}
    return {
        **(size_fields(model.name) if model.name else fields),
        "channels": config.data.channels,
        "num_classes": config.data.num_classes,
        "mlp_ratio": model.mlp_ratio,
        "learn_sigma": model.learn_sigma,
        "label_init_std": model.label_init_std,
        "time_init_std": model.time_init_std,
        "frequency_shift": model.frequency_shift,
        "mlp_norm_eps": model.mlp_norm_eps,
        "image_size": config.data.image_size,
        "dtype": compute_dtype(model.dtype),
        "remat": model.remat,
        "attention": model.attention,
    }


def make_teacher(config: ml_collections.ConfigDict) -> DiT:
    """The teacher that `config.model` describes."""
    return DiT(**model_fields(config))


def make_student(config: ml_collections.ConfigDict) -> DiT:
    """The student that `config.student` describes, of the teacher's sizes; S is the number of its points.

    An `ARDStudent`, or for the other kinds a `DiT` like the teacher.
    """
    student, process = config.student, make_process(config)
    if student.kind != "history":
        return make_teacher(config)
    return ARDStudent(
        **model_fields(config),
        steps=len(student.points),
        history_layers=student.history_layers,
        mask=student.mask,
        heads=student.heads,
        block_times=tuple(student.block_times),
        noise_time=process.noise_time,
        data_time=process.data_time,
    )


def make_rollout(config: ml_collections.ConfigDict, student: DiT) -> Rollout:
    """How the student that `config.student` describes is sampled."""
    return student_rollout(config.student.kind, student, len(config.student.points), make_process(config))


def make_process(config: ml_collections.ConfigDict) -> Process:
    """The forward process of `config.diffusion`."""
    diffusion = config.diffusion
    if diffusion.process == "vp":
        return LinearVP(diffusion.train_steps, diffusion.beta_start, diffusion.beta_end, diffusion.spacing)
    if diffusion.process == "flow":
        return FlowMatching(diffusion.time_scale, diffusion.reversed)
    raise UserError(f"diffusion.process is {diffusion.process!r}, which does not exist: choose vp or flow.")


def solver_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The keyword arguments of `sample_teacher`."""
    diffusion = config.diffusion
    return {
        "steps": diffusion.steps,
        "guidance_scale": diffusion.guidance_scale,
        "guided_channels": diffusion.guided_channels,
        "guidance_interval": tuple(diffusion.guidance_interval),
        "solver": diffusion.solver,
        "process": make_process(config),
    }


def example_shape(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """(height, width, channel) of what the networks see."""
    return config.data.image_size, config.data.image_size, config.data.channels


def check_points(points: tuple[int, ...], steps: int, key: str) -> None:
    """Points are respaced indices, strictly falling and ending at 0 (docs/METHOD.md section 3)."""
    whole = all(isinstance(point, int) for point in points)
    if not points or not whole or list(points) != sorted(set(points), reverse=True) or points[-1] or points[0] >= steps:
        raise UserError(
            f"{key} is {tuple(points)}: give strictly falling indices below the teacher's {steps} steps, "
            f"the last one 0, such as (15, 10, 5, 0) for 4 of 25 steps."
        )


def check_interval(interval: tuple[float, ...], key: str) -> None:
    """Raises UserError for anything but two rising numbers from 0 (data) to 1 (noise)."""
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"{key} is {tuple(interval)}: give two rising numbers from 0 (data) to 1 (noise).")


# Keys that results.json, pictures.npz and edits.npz have beside the models' names.
RESERVED = (
    "teacher", "config", "degradation_ratio", "degradation_ratios", "features", "paired", "real_images", "samples",
    "seconds", "label", "noise", "source", "teacher_xt",
)  # fmt: skip


def names_folder(name: Any) -> bool:
    """Whether a model's name can be that of its folder."""
    return isinstance(name, str) and name.replace("_", "").replace("-", "").isalnum()


def is_student(name: Any) -> bool:
    """Whether a student may have that name."""
    return names_folder(name) and name not in RESERVED


POSITIVE = {
    "data": ("image_size", "channels", "num_classes"),
    "model": ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio"),
    "diffusion": ("train_steps", "steps", "time_scale"),
    "vae": ("batch_size",),
    "encode": ("image_size", "batch_size", "shard_size"),
    "teacher": ("steps", "batch_size", "accumulate", "checkpoint_every"),
    "trajectories": ("count", "batch_size", "shard_size"),
    "distill": ("steps", "batch_size", "accumulate", "checkpoint_every"),
    "finetune": ("steps", "batch_size", "accumulate", "checkpoint_every", "spectral_rounds"),
    "sample": ("count", "batch_size", "grid"),
    "evaluate": ("paired", "pictures", "feature_steps", "neighbours"),
    "run": ("log_every", "keep_checkpoints", "join_timeout", "workers"),
}

OPTIMIZERS = (
    "teacher.optimizer", "distill.optimizer", "distill.distribution_matching.optimizer", "finetune.optimizer",
    "finetune.discriminator_optimizer",
)  # fmt: skip

# key: the least and the greatest value that it may have
RANGES = {
    "seed": (0, 2**31 - 1),
    "sample.seed": (0, 2**31 - 1),
    "model.label_init_std": (0, math.inf),
    "model.time_init_std": (0, math.inf),
    "model.frequency_shift": (0, 127),
    "model.mlp_norm_eps": (0, 1),
    "diffusion.beta_start": (0, 1),
    "diffusion.beta_end": (0, 1),
    "diffusion.guidance_scale": (0, 1000),
    "teacher.label_dropout": (0, 1),
    "trajectories.max_abs": (0, math.inf),
    "finetune.warmup": (0, math.inf),
    "finetune.weight": (0, math.inf),
    "finetune.feature_time": (0, 1),
    **{f"{optimizer}.learning_rate": (0, 1000) for optimizer in OPTIMIZERS},
    **{f"{optimizer}.weight_decay": (0, 1000) for optimizer in OPTIMIZERS},
    **{f"{stage}.optimizer.ema": (0, 1) for stage in ("teacher", "distill", "finetune")},
    "distill.consistency.grid": (0, math.inf),
    "distill.consistency.decay": (0, 1),
    "distill.consistency.huber": (0, math.inf),
    "distill.distribution_matching.ratio": (1, math.inf),
    "distill.distribution_matching.grid": (1, math.inf),
    "run.in_memory": (0, math.inf),
}


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first number that is out of range, NaN included."""
    for section, names in POSITIVE.items():
        for name in names:
            value = config[section][name]
            if not 0 < value < math.inf:
                asked = "of at least 1" if isinstance(value, int) else "above 0"
                raise UserError(f"{section}.{name} is {value}: give a number {asked}.")
    for key, (low, high) in RANGES.items():
        value = functools.reduce(getitem, key.split("."), config)
        if not low <= value <= high:
            asked = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"{key} is {value}: give a number {asked}.")


def check_mesh(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for sizes of `config.mesh` that fit no number of devices."""
    for axis, size in config.mesh.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis} is {size}: give a number of devices, or -1 for what the other axes leave.")
    if list(config.mesh.values()).count(-1) > 1:
        raise UserError("mesh has -1 more than once: only one axis can take what the others leave.")


def check_finetune(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a fine-tune that cannot be."""
    settings, depth = config.finetune, model_fields(config)["depth"]
    make_optimizer(settings.discriminator_optimizer, settings.steps)
    if settings.accumulate != 1:
        raise UserError(
            f"finetune.accumulate is {settings.accumulate}, but the discriminator's batch norm and the adaptive weight "
            f"are of the whole batch: set it to 1, and model.remat to full or mesh.fsdp higher to save memory."
        )
    layers = tuple(settings.layers)
    if len(set(layers)) < len(layers) or any(layer not in range(depth) for layer in layers):
        raise UserError(
            f"finetune.layers is {layers}, but the teacher has {depth} blocks: give different numbers from 0 to "
            f"{depth - 1}, or () for all."
        )
    if not is_student(settings.name) or settings.name == (settings.start or config.student.name):
        raise UserError(
            f"finetune.name is {settings.name!r}, which must name a student's folder and its place in results.json: "
            f"use letters, digits, '-' and '_', another name than that of the student that it starts from, and none of "
            f"{', '.join(RESERVED)}."
        )


def check_compare(config: ml_collections.ConfigDict) -> None:
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
    check_numbers(config)
    check_mesh(config)
    check_compare(config)
    for section in (config.teacher, config.distill, config.finetune):
        make_optimizer(section.optimizer, section.steps)
    make_optimizer(config.distill.distribution_matching.optimizer, config.distill.steps)
    check_interval(config.distill.distribution_matching.interval, "distill.distribution_matching.interval")
    check_points(tuple(trajectories.points), diffusion.steps, "trajectories.points")
    check_points(tuple(student.points), diffusion.steps, "student.points")
    make_teacher(config)
    make_rollout(config, make_student(config))
    find_method(config.distill.objective)
    make_process(config).grid(diffusion.steps)
    find_solver(diffusion.solver)
    if len(diffusion.guidance_interval) != 2:
        raise UserError(f"diffusion.guidance_interval is {tuple(diffusion.guidance_interval)}: give two numbers.")
    Guidance(diffusion.guidance_scale, diffusion.guided_channels, tuple(diffusion.guidance_interval))
    patch_size, size = model_fields(config)["patch_size"], config.data.image_size
    if size % patch_size:
        raise UserError(
            f"data.image_size {size} is not a multiple of the patch size {patch_size}: choose a size that is."
        )
    fields = model_fields(config)
    head_dim = fields["hidden_size"] // fields["num_heads"]
    choose(fields["attention"], platform or target_platform(), fields["dtype"], (size // patch_size) ** 2, head_dim)
    missing = sorted(set(student.points) - set(trajectories.points), reverse=True)
    if missing and not config.distill.online:
        raise UserError(
            f"student.points has {missing}, which the store does not keep (trajectories.points is "
            f"{tuple(trajectories.points)}): choose points out of the store's, or make a store that has them."
        )
    if student.target not in ("x0", "xt"):
        raise UserError(f"student.target is {student.target!r}: choose x0 (predicted x0) or xt (noisy points).")
    if student.target == "xt" and not trajectories.keep_noisy and not config.distill.online:
        raise UserError(
            "student.target is 'xt', but the store keeps no noisy points: set trajectories.keep_noisy=True."
        )
    check_finetune(config)
    if not is_student(student.name):
        raise UserError(
            f"student.name is {student.name!r}, which cannot name a student's folder and its place in results.json: "
            f"use letters, digits, '-' and '_', and none of {', '.join(RESERVED)}."
        )
    if not config.sample.models or not all(names_folder(name) for name in config.sample.models):
        raise UserError(f"sample.models is {tuple(config.sample.models)}: name the teacher, or students, or both.")
    for name in ("trajectories", "encode"):
        if config[name].dtype not in ("float16", "bfloat16", "float32"):
            raise UserError(f"{name}.dtype is {config[name].dtype!r}: choose float16, bfloat16 or float32.")
    classes = range(config.data.num_classes)
    outside = [label for label in config.sample.labels if label not in classes]
    if outside:
        raise UserError(
            f"sample.labels has {outside[0]!r}, but there are {config.data.num_classes} classes: "
            f"give labels from 0 to {config.data.num_classes - 1}."
        )
