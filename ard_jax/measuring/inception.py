"""Samples held against a reference in the features of FID's Inception, by ADM's definitions."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from ard_jax.conditions import Conditions
from ard_jax.errors import UserError
from ard_jax.evaluation import InceptionFeatures, distance_interval, influence
from ard_jax.evaluation.adm_files import (
    Known,
    Reference,
    Seen,
    check_counts,
    check_weights,
    know,
    metrics_of,
    open_reference,
    see,
    statistics_of,
    warn_of_other_numbers,
)
from ard_jax.evaluation.inception import BATCH_SIZE, CHANNELS, Features
from ard_jax.files import file_sha256, local_path
from ard_jax.measuring.parts import make_parts, read_parts
from ard_jax.measuring.samples import Held, ImageRows, Samples, compared_rows, count_compared

log = logging.getLogger("ard_jax")

NETWORK = "FID's Inception of 2015-12-05"


@dataclasses.dataclass(frozen=True, eq=False)
class Inception:
    """A `Yardstick`: the network and a reference file.

    Attributes:
        network: on all devices of this process.
        reference: what samples are held against.
        reference_sha256: of its file.
        conditions: what the numbers of samples stand for.
        half, split_size, neighbours: of `adm_metrics`.
        folder: for what is found of the reference's images on the way.
    """

    network: InceptionFeatures
    reference: Reference
    reference_sha256: str
    conditions: Conditions
    half: bool
    split_size: int
    neighbours: int
    folder: pathlib.Path

    judged = None  # it knows no captions

    @property
    def examples(self) -> Mapping[str, np.ndarray]:
        return {}

    @property
    def about(self) -> str:
        weights = "the published ones" if self.network.is_published else "other than the published ones"
        dtype = self.network.dtype
        how = "by ADM's definitions" + ("" if dtype == "float32" else f" but in {dtype}, not comparable with any other")
        return (
            f"features of {NETWORK} (weights {self.network.sha256[:8]}, {weights}), {how}, against "
            f"{self.reference.path.name} ({self.reference_sha256[:8]})"
        )

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "features": "inception-2015-12-05",
            "sha256": self.network.sha256,
            "published_weights": self.network.is_published,
            "dtype": self.network.dtype,
            "reference": self.reference.path.name,
            "reference_sha256": self.reference_sha256,
            "distances": "float16" if self.half else "float32",
            "split": self.split_size,
            "neighbours": self.neighbours,
        } | ({"reference_about": self.reference.about} if self.reference.about else {})

    @property
    def real_images(self) -> int | None:
        if self.reference.about:
            return self.reference.about["images"]
        return None if self.reference.images is None or self._has_others else len(self.reference.images)

    @property
    def _has_others(self) -> bool:
        """Whether distances are to statistics of other images than the file's own, of how many nobody knows.

        So it is in ADM's file, whose images are some of those, and serve precision and recall alone.
        """
        return self.reference.has_statistics and not self.reference.about

    @functools.cached_property
    def _known(self) -> tuple[Known | None, dict[str, float]]:
        """What is kept of the reference's images, if it has some, and the distances of two halves of real images.

        These are as a reference of ours says; of another's, they can be had where distances are to its own images.
        """
        images, about = self.reference.images, self.reference.about
        halves = about["halves"] if about else {}
        if images is None:
            return None, halves
        seen = self._see(images, np.full(len(images), True), self.reference_sha256, self.folder)
        return know(seen, self.reference), halves if about or self._has_others else halves_of(seen)

    @property
    def halves(self) -> dict[str, float]:
        return self._known[1]

    def measure(self, samples: Samples, folder: pathlib.Path) -> Held:
        """FID (`fd` and `fid`), sFID, Inception score, precision and recall, of those that are compared
        (`compared_rows`). See `Yardstick`."""
        known, _ = self._known
        compared = compared_rows(samples.labels, self.conditions)
        seen = self._see(samples.images, compared, samples.sha256, folder, self.split_size)
        found: dict[str, Any] = {**metrics_of(seen, known, self.reference, half=self.half, k=self.neighbours)}
        halves = {f"{name}_halves": distance for name, distance in halves_of(seen).items()}
        pool, _ = statistics_of(self.reference, known)
        if pool is None:
            return Held(found | halves, len(seen.pool))
        parts = influence(pool, seen.of_pool, seen.pool)
        interval = distance_interval(found["fid"], parts)
        return Held(found | halves | {"fd": found["fid"], "fd_interval": interval}, len(seen.pool), parts)

    def _see(
        self, images: ImageRows, wanted: np.ndarray, sha256: str, folder: pathlib.Path, split_size: int | None = None
    ) -> Seen:
        """Images of that hash, in parts; of all of them those that are wanted, bool (count,)."""
        of = {"sha256": self.network.sha256, "dtype": self.network.dtype, "images": sha256}
        batch = batch_size()
        parts = make_parts(functools.partial(look, self.network), images, folder, of, batch)
        found = _wanted((Features(**part) for part in read_parts(parts)), wanted)
        return see(found, int(wanted.sum()), split_size)


def _wanted(found: Iterable[Features], wanted: np.ndarray) -> Iterator[Features]:
    """Of features of some images at a time, those of a mask (count,) over all of them."""
    first = 0
    for some in found:
        rows = wanted[first : first + len(some.pool)]
        first += len(some.pool)
        yield Features(*(array[rows] for array in some))


def halves_of(seen: Seen) -> dict[str, float]:
    """Fréchet distances of two halves of images, FID's and sFID's, as far as half of them are enough."""
    found = {"fd": seen.halves_of_pool.distance(), "sfid": seen.halves_of_spatial.distance()}
    return {name: distance for name, distance in found.items() if distance is not None}


def batch_size() -> int:
    """Images of a batch, which all devices of this process share."""
    return BATCH_SIZE * jax.local_device_count()


def look(network: InceptionFeatures, batches: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    """Features of batches of images by name; grey ones are looked at as colours."""
    found = [*network.stream(map(in_colour, batches), batch_size())]
    return {name: np.concatenate([getattr(part, name) for part in found]) for name in Features._fields}


def in_colour(images: np.ndarray) -> np.ndarray:
    """(N, height, width, 1 or 3) → (N, height, width, 3)."""
    return np.broadcast_to(images, (*images.shape[:3], CHANNELS))


def load_network(config: ml_collections.ConfigDict, dtype: str = "float32") -> InceptionFeatures:
    """The network whose weights `evaluate.weights` names, on all devices of this process, computing in `dtype`.

    Raises:
        UserError: what `InceptionFeatures.from_file` raises, or there is no name.
    """
    return InceptionFeatures.from_file(_named(config, "weights")).over(jax.local_devices(), dtype)


def open_inception(
    config: ml_collections.ConfigDict, shape: tuple[int, ...], conditions: Conditions, folder: pathlib.Path
) -> Inception:
    """What `evaluate.weights` and `evaluate.reference` name, checked before anything is computed.

    Args:
        config: the run's.
        shape: of its images (height, width, channel).
        conditions: that samples are drawn of.
        folder: see `Inception`.

    Raises:
        UserError: one of them is missing, damaged or of another kind; the reference is of another size or was made with
            other weights; or there are too few samples for a split or for neighbours.
    """
    settings = config.evaluate
    path, _ = local_path(_named(config, "reference")), _named(config, "weights")
    reference = open_reference(path, shape, "The images of this run")
    count = count_compared(config.sample, conditions)
    check_counts(count, reference, settings.split, settings.neighbours)
    network = load_network(config, settings.dtype)
    check_weights(network, reference, "evaluate.reference", "evaluate.weights")
    warn_of_other_numbers(network, count)
    return Inception(
        network=network,
        reference=reference,
        reference_sha256=file_sha256(path),
        conditions=conditions,
        half=settings.distances == "float16",
        split_size=settings.split,
        neighbours=settings.neighbours,
        folder=folder,
    )


def _named(config: ml_collections.ConfigDict, name: str) -> str:
    """A file that a setting names; UserError if it names none."""
    files = {
        "weights": "weights-inception-2015-12-05-6726825d.pth of torch-fidelity",
        "reference": "ADM's, such as VIRTUAL_imagenet256_labeled.npz, or one that evaluate --make-reference made",
    }
    if not config.evaluate[name]:
        raise UserError(f"evaluate.{name} names no file, which Inception's features need: give {files[name]}.")
    return config.evaluate[name]
