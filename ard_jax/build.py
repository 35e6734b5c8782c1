"""Networks, processes, samplers and the mesh from a config."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from ard_jax.chips import Chip, chip_of, fetches_slowly
from ard_jax.diffusion import FlowMatching, Guidance, LinearVP, Process
from ard_jax.errors import UserError, settings_of
from ard_jax.models import (
    ARDStudent,
    Backbone,
    DiT,
    Network,
    PixArt,
    count_parameters,
    network_shapes,
    pixart,
    size_fields,
)
from ard_jax.parallel import make_mesh, state_share, tensor_share
from ard_jax.sampling import Rollout, Solve, student_rollout

STATE_BYTES = 16  # of a parameter in training: itself, its average and Adam's two, in float32


def compute_dtype(name: str) -> jnp.dtype:
    """The networks' compute type: "auto" is bfloat16 on accelerators and float32 on CPU; UserError for another."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("bfloat16", "float32"):
        raise UserError(f"model.dtype is {name!r}: choose auto, bfloat16 or float32.")
    return jnp.dtype(name)


def remat_policy(name: str, chip: Chip | None) -> str:
    """What the backward pass keeps: "auto" is "full" on chips that compute faster than they fetch, else "dots"."""
    if name == "auto":
        return "full" if fetches_slowly(chip) else "dots"
    return name


def _fields(model: ml_collections.ConfigDict, keys: Sequence[str]) -> dict[str, Any]:
    """Fields of a network that the config has under the same names, and what it keeps for the backward pass here."""
    return {key: model[key] for key in keys} | {
        "remat": remat_policy(model.remat, chip_of(jax.devices()[0].device_kind))
    }


def _make_dit(config: ml_collections.ConfigDict) -> DiT:
    model, data = config.model, config.data
    given = {key: model[key] for key in ("patch_size", "hidden_size", "depth", "num_heads")}
    sizes = size_fields(model.name) if model.name else given
    same: tuple[str, ...] = ("mlp_ratio", "learn_sigma", "label_init_std", "time_init_std", "frequency_shift")
    same += ("mlp_norm_eps", "attention")
    return DiT(
        **sizes,
        **_fields(model, same),
        channels=data.channels,
        num_classes=data.num_classes,
        image_size=data.image_size,
        dtype=compute_dtype(model.dtype),
    )


def _make_pixart(config: ml_collections.ConfigDict) -> PixArt:
    model, data = config.model, config.data
    keys: tuple[str, ...] = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "caption_width")
    keys += ("interpolation", "size_conditioning")
    given = {key: model[key] for key in keys} | {"image_size": data.image_size}
    sizes = pixart.size_fields(model.name) if model.name != "PixArt" else given
    same = ("learn_sigma", "null_mask", "attention")
    return PixArt(
        **{**sizes, "caption_length": config.captions.length},
        **_fields(model, same),
        channels=data.channels,
        pixels=pixart.LATENT_SIDE if data.space == "latent" else 1,
        dtype=compute_dtype(model.dtype),
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of backbone.

    Attributes:
        make: the network that a config describes.
        is_told_captions: whether its condition is a `Caption`; else it is a class.
    """

    make: Callable[[ml_collections.ConfigDict], Backbone]
    is_told_captions: bool = False


# By how `model.name` begins.
BACKBONES = {"DiT": Family(_make_dit), "PixArt": Family(_make_pixart, is_told_captions=True)}


def make_teacher(config: ml_collections.ConfigDict) -> Backbone:
    """The teacher that `config.model` describes: without a name a DiT, by the name "PixArt" one, of the sizes given.

    Raises:
        UserError: no backbone is called so, it is told captions where there are classes or the other way round, or
            what the network raises of its fields.
    """
    name, classes = config.model.name.partition("-")[0] or "DiT", config.data.num_classes
    if name not in BACKBONES:
        raise UserError(
            f"model.name is {config.model.name!r}, which is no network's: begin it with one of {', '.join(BACKBONES)}."
        )
    family = BACKBONES[name]
    if family.is_told_captions != (classes == 0):
        told, remedy = ("captions", "0") if family.is_told_captions else ("a class", "their number")
        raise UserError(f"data.num_classes is {classes}, but a {name} is told {told}: set it to {remedy}.")
    with settings_of("model"):
        return family.make(config)


def make_run_mesh(
    config: ml_collections.ConfigDict, stage: str = "", devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of a run: `config.mesh` for its network, and for the batch of a stage.

    Where `mesh.tensor` is -1, it is what `parallel.tensor_share` says of the batch, and where that is more than 1, an
    `mesh.fsdp` of -1 is what `parallel.state_share` says: what is gathered then matters more than what is held.

    Args:
        config: of the run.
        stage: that trains, whose batch_size counts; "" for one without a batch of its own.
        devices: to lay out, by default all of every process.
    """
    devices = list(jax.devices() if devices is None else devices)
    network, settings = make_teacher(config), config.mesh.to_dict()
    if settings["tensor"] == -1 in (settings["data"], settings["fsdp"]):  # else it is what these two leave
        settings["tensor"] = 1
        if stage:
            batch, blocks = config[stage].batch_size, 1 if stage == "teacher" else len(config.student.points)
            tokens = blocks * (config.data.image_size // network.patch_size) ** 2
            settings["tensor"] = tensor_share(devices, getattr(network, "num_heads", 1), batch, tokens)
        if settings["tensor"] > 1 and settings["fsdp"] == -1:
            state = STATE_BYTES * count_parameters(network_shapes(network)) // settings["tensor"]
            settings |= {
                "data": -1,
                "fsdp": state_share(len(devices) // settings["tensor"], network.hidden_size, state),
            }
    return make_mesh(settings, devices, network.hidden_size)


def make_student(config: ml_collections.ConfigDict) -> Network:
    """The student that `config.student` describes, of the teacher's sizes; S is the number of its points.

    An `ARDStudent`, or for the other kinds a backbone like the teacher's.
    """
    student, process = config.student, make_process(config)
    if student.kind != "history":
        return make_teacher(config)
    teacher = make_teacher(config)
    with settings_of("student"):
        return ARDStudent(
            teacher,
            steps=len(student.points),
            history_layers=student.history_layers,
            mask=student.mask,
            heads=student.heads,
            block_times=tuple(student.block_times),
            noise_time=process.noise_time,
            data_time=process.data_time,
        )


def make_rollout(config: ml_collections.ConfigDict, student: Network) -> Rollout:
    """How the student that `config.student` describes is sampled."""
    return student_rollout(config.student.kind, student, len(config.student.points), make_process(config))


def make_process(config: ml_collections.ConfigDict) -> Process:
    """The forward process of `config.diffusion`."""
    diffusion = config.diffusion
    if diffusion.process == "vp":
        with settings_of("diffusion"):
            return LinearVP(diffusion.train_steps, diffusion.beta_start, diffusion.beta_end, diffusion.spacing)
    if diffusion.process == "flow":
        return FlowMatching(diffusion.time_scale, diffusion.reversed)
    raise UserError(f"diffusion.process is {diffusion.process!r}, which does not exist: choose vp or flow.")


def make_solve(config: ml_collections.ConfigDict) -> Solve:
    """How the teacher is sampled, of `config.diffusion`."""
    diffusion = config.diffusion
    with settings_of("diffusion"):
        guidance = Guidance(diffusion.guidance_scale, diffusion.guided_channels, tuple(diffusion.guidance_interval))
        return Solve(make_process(config), diffusion.solver, diffusion.steps, guidance)


def example_shape(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """(height, width, channel) of what the networks see."""
    return config.data.image_size, config.data.image_size, config.data.channels
