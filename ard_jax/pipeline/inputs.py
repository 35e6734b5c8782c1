"""What people hand to a pipeline, checked: classes by number or name, prompts, sides, solvers, and images to edit."""

import dataclasses
import difflib
import math
import operator
import os
import pathlib
from collections.abc import Mapping
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import numpy.typing as npt
from PIL import Image

from ard_jax.build import make_process, make_solve
from ard_jax.data import MODES, as_shown
from ard_jax.errors import UserError
from ard_jax.sampling import Solve

# Of pictures to edit, all of which Pillow decodes itself: of a PostScript it would run Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def resolve_labels(labels: Any, id2label: Mapping[int, str], num_classes: int) -> np.ndarray:
    """Class labels as numbers.

    Args:
        labels: a class number or name, or several of them.
        id2label: names by class number; one entry may hold several names, as ImageNet's do: "crane, wading bird".
        num_classes: numbers lie in [0, num_classes).

    Returns:
        (label,), int32.

    Raises:
        UserError: there are none, a number is out of range, or a name is unknown (the closest ones are offered) or
            stands for several classes.
    """
    one = isinstance(labels, str) or not np.iterable(labels)
    given = [labels] if one else list(labels)
    if not given:
        raise UserError("class_labels is empty: give at least one class, by number or name.")
    return np.asarray([_resolve_label(label, id2label, num_classes) for label in given], np.int32)


def resolve_prompts(prompts: Any) -> list[str]:
    """Prompts as a list.

    Raises:
        UserError: there are none, or they are no strings.
    """
    given = [prompts] if isinstance(prompts, str) else list(prompts) if np.iterable(prompts) else [prompts]
    if not given or not all(isinstance(prompt, str) for prompt in given):
        raise UserError(f"the prompt is {prompts!r}: give a string, or several.")
    return given


def resolve_solve(
    config: ml_collections.ConfigDict, student_steps: int | None, steps: int | None, given: Mapping[str, Any]
) -> Solve | None:
    """How a teacher is sampled; None for a student.

    Args:
        config: with the settings that hold where nothing is given.
        student_steps: S of a student, None for a teacher.
        steps: that are asked for, None for the config's.
        given: "guidance_scale", "solver" and "guided_channels", each None for the config's.

    Raises:
        UserError: a student is given a teacher's settings, or one of them cannot be used.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if student_steps is not None:
        if asked:
            raise UserError(
                f"{next(iter(asked))} is a teacher's setting, and this is a student, which has learned its "
                f"teacher's: leave it out."
            )
        if steps not in (None, student_steps):
            raise UserError(
                f"num_inference_steps is {steps!r}, but this student was trained for {student_steps} steps and "
                f"can make no other number: leave it out, or distil a student of that many points."
            )
        return None
    if steps is not None:
        asked["steps"] = require_int(steps, "num_inference_steps", 1)
    if "guided_channels" in asked:
        require_int(asked["guided_channels"], "guided_channels", 0)
    scale = asked.get("guidance_scale", 1)
    if not 0 <= scale < math.inf:
        raise UserError(f"guidance_scale is {scale}: give a number of at least 0; 1 is no guidance.")
    how = make_solve(config)
    names = {"guidance_scale": "scale", "guided_channels": "channels"}
    guidance = {ours: asked[name] for name, ours in names.items() if name in asked}
    rest = {name: asked[name] for name in ("steps", "solver") if name in asked}
    return dataclasses.replace(how, **rest, guidance=dataclasses.replace(how.guidance, **guidance))


def resolve_sides(
    shape: tuple[int, int, int], height: int | None, width: int | None, downscale: int, patch_size: int, is_free: bool
) -> tuple[int, int, int]:
    """(height, width, channel) of what a network sees of images of these sides, in pixels.

    Args:
        shape: what it was made for.
        height, width: that are asked for; None for those.
        downscale: pixels a side of a latent.
        patch_size: latents a side of a patch.
        is_free: whether the network takes other sides than its own.

    Raises:
        UserError: they are no multiples of what a patch covers, or the network takes no others.
    """
    if height is None and width is None:
        return shape
    if not is_free:
        raise UserError("height and width are for models that are told captions: this one makes one size.")
    unit, found = downscale * patch_size, []
    for name, given, own in (("height", height, shape[0]), ("width", width, shape[1])):
        side = own * downscale if given is None else require_int(given, name, 1)
        if side % unit:
            raise UserError(f"{name} is {side}, which is no multiple of {unit}: choose one that is.")
        found.append(side // downscale)
    return found[0], found[1], shape[2]


def resolve_latents(latents: jax.typing.ArrayLike, expected: tuple[int, ...]) -> np.ndarray:
    """Noise of the caller's own, (batch, height, width, channel), of at least float32.

    Raises:
        UserError: it is of another shape than expected, or no floats.
    """
    array = np.asarray(latents)
    if array.shape != expected or not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(
            f"latents is an array of {array.dtype} {array.shape}, but these labels need floats {expected}: give "
            f"noise as (batch, height, width, channel), channels last, one an image."
        )
    return array.astype(jax.dtypes.canonicalize_dtype(jnp.promote_types(array.dtype, jnp.float32)))


def _resolve_label(label: SupportsIndex | str, id2label: Mapping[int, str], num_classes: int) -> int:
    if isinstance(label, str):
        return _find_name(label, id2label, num_classes)
    try:
        number = operator.index(label)
    except TypeError:
        raise UserError(f"the class label {label!r} is neither a whole number nor a name: give one of them.") from None
    if not 0 <= number < num_classes:
        raise UserError(f"the class label {number} is out of range: choose one from 0 to {num_classes - 1}.")
    return number


def _find_name(name: str, id2label: Mapping[int, str], num_classes: int) -> int:
    """A class by its whole entry, or else by one of the names in it; upper and lower case are the same."""
    if not id2label:
        raise UserError(
            f"the class {name!r} cannot be looked up, since this pipeline has no names of its classes: "
            f"give a number from 0 to {num_classes - 1}."
        )
    wanted = _normal(name)
    entries = {number: _normal(entry) for number, entry in id2label.items()}
    found = [number for number, entry in entries.items() if entry == wanted]
    found = found or [number for number, entry in entries.items() if wanted in entry.split(", ")]
    if len(found) > 1:
        choices = " or ".join(f"{number} ({id2label[number]})" for number in found)
        raise UserError(f"the class name {name!r} stands for several classes: choose {choices} by number.")
    if not found:
        known = {_normal(part): part.strip() for entry in id2label.values() for part in entry.split(",")}
        close = [known[match] for match in difflib.get_close_matches(wanted, known, n=3)]
        hint = f"did you mean {' or '.join(map(repr, close))}" if close else "the pipeline's id2label lists the names"
        raise UserError(f"there is no class named {name!r}: {hint}.")
    return found[0]


def _normal(name: str) -> str:
    """A name as names are compared: "Golden  Retriever" → "golden retriever"."""
    return ", ".join(" ".join(part.split()) for part in name.casefold().split(","))


def read_image(image: Image.Image | str | os.PathLike | npt.ArrayLike, size: int, channels: int) -> np.ndarray:
    """An image to edit.

    Args:
        image: a Pillow image, the path of one, or an array (height, width, channel), or (height, width) for grey ones:
            uint8, or floats in [0, 1].
        size: height and width that it must have.
        channels: 1 (grey) or 3 (RGB); what is no float array is converted.

    Returns:
        (size, size, channels), float32 in [-1, 1].

    Raises:
        UserError: it is of another size, or no such image.
    """
    if isinstance(image, (str, os.PathLike)):
        image = _open_image(image)
    if isinstance(image, Image.Image):
        image = as_shown(image)
        _check_size(image.height, image.width, size)
        levels = np.asarray(image.convert(MODES[channels]), np.float32)
        return levels.reshape(size, size, channels) / 127.5 - 1
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    floats = jnp.issubdtype(array.dtype, np.floating)
    if array.ndim != 3 or not (floats or array.dtype == np.uint8):
        raise UserError(
            f"the image to edit is an array of {array.dtype} {array.shape}: give (height, width, channel) of uint8, or "
            f"of floats from 0 to 1."
        )
    height, width, found = array.shape
    _check_size(height, width, size)
    if found != channels:
        raise UserError(f"the image to edit has {found} channels, but this model makes {channels}: convert it.")
    if floats and not ((array >= 0) & (array <= 1)).all():
        raise UserError(
            f"the image to edit has values from {array.min():.3g} to {array.max():.3g}: floats must lie in [0, 1]."
        )
    return array.astype(np.float32) * 2 - 1 if floats else array.astype(np.float32) / 127.5 - 1


def source_coefficients(config: ml_collections.ConfigDict, source_step: int) -> tuple[float, float]:
    """α and σ of the point that an image to edit becomes: of data, or for noisy points those of the teacher."""
    student, steps = config.student, config.diffusion.steps
    if student.target == "x0":
        return 1.0, 0.0
    grid = make_process(config).grid(steps)
    node = steps - student.points[source_step - 1]  # respaced indices count down from the noise
    return float(grid.alpha[node]), float(grid.sigma[node])


def _open_image(path: str | os.PathLike) -> Image.Image:
    try:
        image = Image.open(pathlib.Path(path).expanduser(), formats=FORMATS)
        image.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(
            f"the image {os.fspath(path)} cannot be read ({type(error).__name__}): give the path of a picture."
        ) from None
    return image


def _check_size(height: int, width: int, size: int) -> None:
    if (height, width) != (size, size):
        raise UserError(
            f"the image to edit is {width}×{height} pixels, but this model works on {size}×{size}: crop it with "
            f"ard_jax.data.center_crop(image, {size})."
        )


def require_int(value: SupportsIndex, name: str, low: int, high: int | None = None) -> int:
    """A whole number from `low` to `high`; UserError for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        asked = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"{name} is {value!r}: give a whole number {asked}.")
    return number
