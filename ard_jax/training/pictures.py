"""Pictures of what a network has learned so far, drawn while it trains: progress/STEP.png in the training's folder."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from ard_jax.files import atomic_write
from ard_jax.types import Params


class Pictures(NamedTuple):
    """What a training draws of its average, and how often.

    Attributes:
        draw: averaged parameters → uint8 (height, width, 3). Every process calls it.
        every: steps from one picture to the next; the first is of step 0, and the last step has one too.
    """

    draw: Callable[[Params], np.ndarray]
    every: int

    def due(self, step: int, last: bool) -> bool:
        return last or step % self.every == 0


def pictures_in(directory: pathlib.Path) -> dict[int, pathlib.Path]:
    """The pictures of a training's folder by their step, in its order."""
    paths = (path for path in (directory / "progress").glob("*.png") if path.stem.isdecimal())
    return dict(sorted((int(path.stem), path) for path in paths))


def write_picture(directory: pathlib.Path, step: int, picture: np.ndarray) -> None:
    """Writes one of `Pictures.draw`, in place of one that is there."""
    image = Image.fromarray(picture)
    atomic_write(directory / "progress" / f"{step}.png", lambda temporary: image.save(temporary, "PNG"))
