"""What a pipeline hands back, in the type that was asked for."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from ard_jax.data import to_uint8

OUTPUT_TYPES = ("pil", "np", "latent")

# Of a batch of images, or of a list of them for each.
Pictures: TypeAlias = np.ndarray | list[Image.Image] | list[list[Image.Image]]


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline made.

    Attributes:
        images: a list of Pillow images ("pil"), float32 (batch, height, width, channel) in [0, 1] ("np"), or what the
            network made, of the same axes ("latent").
        labels: the class of each, int32 (batch,), or its prompt.
        trajectory: the steps to each image in the same output type, (batch, step, …), a list of lists for "pil": what
            the student predicted, or the teacher's x0-predictions; None if it was not asked for.
    """

    images: Pictures
    labels: np.ndarray
    trajectory: Pictures | None = None


def convert_output(array: np.ndarray, output_type: str) -> Pictures:
    """A batch of images, or of trajectories of them, in the type that was asked for, before the next batch is made."""
    if output_type != "pil":
        return array
    return to_pil(array) if array.ndim == 4 else [to_pil(steps) for steps in array]


def concatenate(batches: Sequence[Any]) -> Pictures:
    """Batches after another: arrays as an array, lists as a list."""
    return list(itertools.chain(*batches)) if isinstance(batches[0], list) else np.concatenate(batches)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Images in [0, 1], (batch, height, width, channel), channel 1 or 3 → Pillow images."""
    levels = to_uint8(2 * images - 1)
    return [Image.fromarray(level[..., 0] if level.shape[-1] == 1 else level) for level in levels]
