"""Do the real data and the teacher's trajectories go together? Both are shown to a discriminator."""

import logging

import ml_collections
import numpy as np

from ard_jax.data.memory import Source
from ard_jax.data.sources import image_source
from ard_jax.errors import UserError

log = logging.getLogger("ard_jax")

LOOKED_AT = 64  # records of the real and the trajectory data that are compared before the training
FACTOR = 3.0  # by which their scales may differ


def open_real(trajectories: Source, config: ml_collections.ConfigDict) -> Source:
    """The images that `config.data` names, for whoever shows them to a discriminator beside a store's trajectories.

    Raises:
        UserError: what `image_source` and `check_real` raise.
    """
    real = image_source(config.data)
    check_real(real, trajectories, config)
    return real


def check_real(real: Source, trajectories: Source, config: ml_collections.ConfigDict) -> None:
    """Compares some real examples with the teacher's samples in the store.

    Raises:
        UserError: they differ in shape, the real ones are of a larger scale, or the trajectories have labels that the
            data have not.
    """
    images = np.stack([real[row]["image"] for row in _spread(len(real))])
    records = [trajectories[row] for row in _spread(len(trajectories))]
    samples = np.stack([np.asarray(record["x0"])[-1] for record in records]).astype(np.float32)
    labels = max(int(record["label"]) for record in records)
    remedy = "use the data that the teacher was trained on, and a store of its trajectories"
    if images.shape[1:] != samples.shape[1:]:
        raise UserError(
            f"the real data are {images.shape[1:]} and the store's trajectories {samples.shape[1:]} (height, width, "
            f"channel): {remedy}."
        )
    if labels >= (config.data.num_classes or np.inf):
        raise UserError(
            f"the store has the label {labels}, but data.num_classes is {config.data.num_classes}: {remedy}."
        )
    ours, theirs = (float(np.sqrt(np.mean(np.square(part)))) for part in (images, samples))
    said = f"the real data have a root mean square of {ours:.3g}, the teacher's samples in the store of {theirs:.3g}"
    if not ours < FACTOR * theirs:  # nor if it is NaN
        raise UserError(f"{said}, so they are not of one scale: {remedy}.")
    if theirs > FACTOR * ours:  # which a teacher that has hardly been trained does too
        log.warning("%s: if the teacher is good, they are not of one scale.", said)


def _spread(length: int) -> np.ndarray:
    """Rows spread evenly over a source."""
    return np.unique(np.linspace(0, length - 1, LOOKED_AT).astype(int))
