"""The yardstick that a config names."""

import pathlib

import ml_collections

from ard_jax.conditions import Conditions
from ard_jax.data import Source
from ard_jax.drawing import image_shape
from ard_jax.measuring.classifier import train_classifier
from ard_jax.measuring.inception import open_inception
from ard_jax.measuring.samples import Yardstick
from ard_jax.models import AutoencoderKL
from ard_jax.types import Params


def open_yardstick(
    config: ml_collections.ConfigDict,
    source: Source | None,
    vae: tuple[AutoencoderKL, Params] | None,
    conditions: Conditions,
    folder: pathlib.Path,
) -> Yardstick:
    """What samples of a run are held against.

    Args:
        config: the run's.
        source: of real images, see `drawing.open_real_images`; None if a reference file stands for them.
        vae: of models of latents, see `workdir.find_vae`.
        conditions: that samples are drawn of.
        folder: for what is found on the way, see `Yardstick.measure`.

    Raises:
        UserError: what `train_classifier` and `open_inception` raise.
    """
    if source is None:
        return open_inception(config, image_shape(config, vae), conditions, folder)
    return train_classifier(config, source, vae, conditions)
