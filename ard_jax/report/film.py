"""What a model drew while it learned: a few of the pictures of its training, one after the other."""

from collections.abc import Iterable, Mapping

import numpy as np

from ard_jax.report import pieces, words
from ard_jax.report.pieces import PictureGrid
from ard_jax.results import Measured

FRAMES = 8  # that fit side by side on the page
SIDE = 264  # of a frame, which holds many images: four of 64 pixels side by side are not reduced


def chosen(steps: Iterable[int]) -> list[int]:
    """Steps of a film strip: of those at hand at most `FRAMES`, in equal strides from the first to the last."""
    found = sorted(steps)
    places = np.linspace(0, len(found) - 1, min(FRAMES, len(found))).round().astype(int)
    return [found[place] for place in places]


def strips(models: Mapping[str, Measured], progress: Mapping[str, Mapping[int, np.ndarray]]) -> dict[str, PictureGrid]:
    """By the model's title a row of frames under their steps.

    Args:
      models: of the run.
      progress: by a model's name its pictures, uint8 (H, W, C), by their step.

    Raises:
      UserError: if a picture is not uint8 or not of the stated shape.
    """
    titles = words.titles(models)
    return {titles.get(name, name): _strip(titles.get(name, name), own) for name, own in progress.items() if own}


def _strip(title: str, frames: Mapping[int, np.ndarray]) -> PictureGrid:
    steps = chosen(frames)
    shown = [pieces.picture(frames[step], f"{title} after step {step}", SIDE) for step in steps]
    return PictureGrid([f"{step:,}" for step in steps], [(title, shown)])
