"""What is measured: the images of a model, had as they are needed."""

import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import ml_collections
import numpy as np

from ard_jax.conditions import Conditions
from ard_jax.drawing import choose_numbers
from ard_jax.errors import UserError
from ard_jax.evaluation.npz import NpzArray, array_names, read_array
from ard_jax.sampled import SAMPLED, drawn_otherwise

IMAGES, LABELS = "arr_0", "labels"
# Settings that samples of one evaluation share, else its pairs are none.
DRAWN = tuple(key for key in SAMPLED if not key.startswith("data."))
# What the stage `sample` says of a model that is a field of `results.Measured`.
KEPT = ("ema_sha256", "steps", "network_calls", "parameters", "gmac_per_image", "seconds_per_image")


class ImageRows(Protocol):
    """Images of a model, uint8 (count, height, width, channel), of which memory holds a batch at a time.

    `NpzArray` reads them from a file, `measuring.drawn.Drawn` draws them.
    """

    def __len__(self) -> int: ...

    def batches(self, size: int, wanted: Callable[[int], bool], /) -> Iterator[np.ndarray]:
        """Batches of so many images, those whose first one's number is wanted."""

    def rows(self, numbers: Iterable[int], /) -> np.ndarray:
        """Some images, in the order of their numbers."""


class Samples(NamedTuple):
    """Of a model.

    Attributes:
        images: one by one in their order.
        labels: number of each one's condition (count,).
        sha256: by which they are known again.
        facts: of the model: fields of `results.Measured`.
    """

    images: ImageRows
    labels: np.ndarray
    sha256: str
    facts: Mapping[str, Any] = types.MappingProxyType({})


class Held(NamedTuple):
    """What a set of samples is, held against real images.

    Attributes:
        numbers: fields of `results.Measured`.
        compared: how many samples the distances are of, see `compared_rows`.
        influence: of each sample on `fd`, to first order, in their order; those that have no part in it are left out.
            None where there is no `fd`.
    """

    numbers: dict[str, Any]
    compared: int
    influence: np.ndarray | None = None


def compared_rows(labels: np.ndarray, conditions: Conditions) -> np.ndarray:
    """Which samples are held against real images, bool (count,): those of captions held out of training only where
    there are no others, as there may be more of them than in the data."""
    is_trained = labels < conditions.for_training
    return is_trained if is_trained.any() else np.full_like(is_trained, True)


def count_compared(settings: ml_collections.ConfigDict, conditions: Conditions) -> int:
    """How many of each model's samples that will be, by what `sample` says of them."""
    labels = choose_numbers(settings, np.arange(settings.count), conditions)
    return int(compared_rows(labels, conditions).sum())


class Yardstick(Protocol):
    """Real images, and what they and samples are looked at with.

    Attributes:
        about: the features in words, with their version.
        facts: the same for programs: what numbers in these features depend on.
        real_images: how many there are; None where only their statistics are known.
        halves: Fréchet distances of two halves of the real images, by the field of `Measured` that they stand beside.
        judged: how well it knows the captions of real images, as `Results.judge` has it; None if it knows none.
        examples: a real image of each caption, where there are such.
    """

    @property
    def about(self) -> str: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def real_images(self) -> int | None: ...
    @property
    def halves(self) -> Mapping[str, float]: ...
    @property
    def judged(self) -> Mapping[str, Any] | None: ...
    @property
    def examples(self) -> Mapping[str, np.ndarray]: ...

    def measure(self, samples: Samples, folder: pathlib.Path) -> Held:
        """Measures one set of samples of one model.

        Args:
            samples: of it.
            folder: of its own, for what is found on the way: a measurement that was killed goes on from there. All
                processes see the same folder, and all have to ask.
        """


def read_samples(
    directory: pathlib.Path,
    facts: dict[str, Any],
    sha256: str,
    config: ml_collections.ConfigDict,
    inputs: Mapping[str, str],
) -> Samples:
    """A model's samples.

    Args:
        directory: where they lie.
        facts: what `done.json` says of them.
        sha256: of the model's weights as they are now.
        config: the run's; they may be held against other data than the models are of.
        inputs: `sampled.drawn_with` what they would be made now.

    Raises:
        UserError: they were drawn from other weights, by other settings or of other captions than the config says.
    """
    if facts["ema_sha256"] != sha256:
        raise UserError(f"the samples in {directory} are of older weights: run 'sample' again.")
    path, remedy = directory / "samples.npz", "move its folder away and run the stage 'sample' again"
    if IMAGES not in array_names(path, remedy):
        raise UserError(f"{directory} holds latents, drawn without a VAE: run 'sample' again, now with one.")
    images = NpzArray(path, IMAGES, remedy)
    if len(images) != config.sample.count:  # a Fréchet distance depends on how many images it is taken from
        raise UserError(
            f"{directory} holds {len(images)} images, but sample.count is {config.sample.count}: "
            f"run 'sample' again with this config."
        )
    if other := drawn_otherwise(directory, config, inputs, DRAWN):
        raise UserError(
            f"{directory} holds samples of other settings ({'; '.join(other[:3])}): give 'evaluate' those settings, or "
            f"move that folder away and run 'sample' again with these."
        )
    kept = {name: facts[name] for name in KEPT}
    return Samples(images, read_array(path, LABELS, remedy), facts["sha256"]["samples.npz"], kept)
