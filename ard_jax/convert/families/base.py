"""What all families share: what the user says of a source, what a source is, and the config that describes a model."""

import dataclasses
import pathlib
from typing import Any

from ml_collections import ConfigDict

from ard_jax.config import default_config
from ard_jax.errors import UserError
from ard_jax.models import Network
from ard_jax.weights.lazy import Stored, Tensors

POINTS = {4: (15, 10, 5, 0), 2: (10, 0), 1: (0,)}  # the paper's, of 25 steps
STUDENT_HINTS = ("points", "history_layers", "mask")  # that have a meaning for students alone


@dataclasses.dataclass(frozen=True)
class Hints:
    """What the user says about a source because its files may not; None where the source shall tell.

    Attributes:
        num_heads: attention heads.
        history_layers: N of a student.
        points: of a student; makes one of a state dict with a single final layer.
        mask: of a student.
        name: of a student, its folder; "ard" where nothing says another.
        weights: "ema" or "model" of a training checkpoint.
        objective: "noise" (DiT) or "velocity" (SiT).
        license: of the weights.
        frequency_shift: of the time's sinusoids.
    """

    num_heads: int | None = None
    history_layers: int | None = None
    points: tuple[int, ...] | None = None
    mask: str | None = None
    name: str | None = None
    weights: str | None = None
    objective: str | None = None
    license: str | None = None
    frequency_shift: float | None = None

    def check_agreement(self, path: pathlib.Path, **known: object) -> None:
        """Raises UserError if a hint contradicts what the source says itself."""
        for name, value in known.items():
            hint = getattr(self, name)
            if hint is not None and hint != value:
                flag = _flag(name)
                raise UserError(f"{flag} is {hint}, but {path} says {value}: leave {flag} out.")

    def check_absent(self, reason: str, *names: str) -> None:
        """Raises UserError if a hint is given that has no meaning for the source."""
        for name in names:
            if getattr(self, name) is not None:
                raise UserError(f"{_flag(name)} has no meaning here, since {reason}: leave it out.")

    def check_no_training_checkpoint(self, path: pathlib.Path) -> None:
        """Raises UserError if one of a training checkpoint's networks is asked of a source that has just one."""
        self.check_absent(f"{path} is no training checkpoint with ema and model in it", "weights")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that are known but not read.

    Attributes:
        what: it is, in words.
        files: that it is made of.
        config: a whole config that describes the model; None for an autoencoder alone.
        model: a teacher or student, None for an autoencoder alone.
        tensors: its arrays by their published names, float32.
        vae: folder of its autoencoder in diffusers' format, if it has one.
        labels: names of the classes by index, () if unknown.
        license: of the weights, if known.
        null_caption: vectors of the empty caption (token, channel) that came with them.
    """

    what: str
    files: tuple[pathlib.Path, ...]
    config: ConfigDict | None = None
    model: Network | None = None
    tensors: Tensors | None = None
    vae: pathlib.Path | None = None
    labels: tuple[str, ...] = ()
    license: str | None = None
    null_caption: Stored | None = None


def first_known(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def config_of_model(model: Network, hints: Hints) -> ConfigDict:
    """A config for the later stages that makes this very model.

    Raises:
        UserError: the points of a student of this many steps are unknown.
    """
    config, network = default_config(), model.backbone
    config.data.update(
        image_size=network.image_size,
        channels=network.channels,
        num_classes=network.num_classes,
        space="pixel" if network.channels in (1, 3) else "latent",
    )
    fields: tuple[str, ...] = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "learn_sigma")
    fields += ("frequency_shift", "mlp_norm_eps", "caption_width", "interpolation", "size_conditioning", "null_mask")
    config.model.update({name: getattr(network, name) for name in fields if hasattr(network, name)})
    if not network.num_classes:  # without a name it is a DiT
        config.model.name = type(network).__name__
    config.sample.models = ("teacher",)
    if model.is_student:
        points = hints.points or POINTS.get(model.steps)
        if points is None:
            raise UserError(
                f"nothing tells at which of the teacher's steps this student of {model.steps} steps stops: "
                f"give --points, {model.steps} falling numbers that end in 0."
            )
        config.student.update(
            name=hints.name or "ard",
            points=points,
            history_layers=model.history_layers,
            mask=model.mask,
            heads=model.heads,
        )
        config.sample.models = (config.student.name,)
    return fit_defaults(config)


def fit_defaults(config: ConfigDict) -> ConfigDict:
    """The later stages' defaults are for XL/2 and 25 steps: fewer layers and other steps want others."""
    steps, usual = config.diffusion.steps, POINTS[4]
    scaled = sorted({round(point * steps / 25) for point in usual}, reverse=True)
    if config.sample.models == ("teacher",):
        config.student.history_layers = min(config.student.history_layers, config.model.depth)
        config.student.points = tuple(scaled)
    config.trajectories.keep_noisy = config.student.target == "xt"
    config.trajectories.points = tuple(sorted({*scaled, *config.student.points}, reverse=True))
    return config
