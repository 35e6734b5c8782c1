"""ADM's metrics of anybody's samples: an npz of images against an npz of references, and nothing of ours."""

import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ard_jax.errors import UserError
from ard_jax.evaluation import adm
from ard_jax.evaluation.frechet import half_mask
from ard_jax.evaluation.inception import (
    NUM_CLASSES,
    NUM_FEATURES,
    NUM_SPATIAL,
    PUBLISHED_NAME,
    Features,
    InceptionFeatures,
    batch_size_for,
    check_image_layout,
)
from ard_jax.evaluation.npz import NpzArray, array_names, read_array
from ard_jax.files import local_path
from ard_jax.progress import progress_bar

log = logging.getLogger("ard_jax")

IMAGES = "arr_0"
POOL, SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")
ABOUT = "about"  # of a reference that was made here, JSON
USUAL_COUNT = 50_000
AT_ONCE = 1024  # images whose features are added to statistics together


class Reference(NamedTuple):
    """What a reference file holds; None is what it lacks.

    Attributes:
        path: of the file.
        images: (N, height, width, 3) uint8, of precision and recall.
        pool, spatial: statistics of the whole training set's features.
        about: what a reference of ours says of itself, see `measuring.reference`.
    """

    path: pathlib.Path
    images: NpzArray | None
    pool: adm.Gaussian | None
    spatial: adm.Gaussian | None
    about: dict[str, Any] | None

    @property
    def has_statistics(self) -> bool:
        return self.pool is not None or self.spatial is not None


class Seen(NamedTuple):
    """What the network said of images.

    Attributes:
        pool: features that are kept, (N, 2048) float32.
        inception_score: of the images, None where it was not asked for.
        of_pool, of_spatial: statistics of both layers.
        halves_of_pool, halves_of_spatial: the same of two halves of the images, which are parted at random.
    """

    pool: np.ndarray
    inception_score: float | None
    of_pool: adm.Gaussian
    of_spatial: adm.Gaussian
    halves_of_pool: adm.Halves
    halves_of_spatial: adm.Halves


class Known(NamedTuple):
    """What is kept of a reference's images: no more than is needed, since it stays while samples are looked at.

    Attributes:
        pool: features (N, 2048).
        statistics: of both layers, where the file has none.
    """

    pool: np.ndarray
    statistics: tuple[adm.Gaussian, adm.Gaussian] | None


def know(seen: Seen, reference: Reference) -> Known:
    """What is kept of a reference's images."""
    if reference.has_statistics:
        return Known(seen.pool, None)
    log.warning("%s has no statistics: FID and sFID are to its %d images.", reference.path, len(seen.pool))
    return Known(seen.pool, (seen.of_pool, seen.of_spatial))


def statistics_of(reference: Reference, known: Known | None) -> tuple[adm.Gaussian | None, adm.Gaussian | None]:
    """Of both layers: those of the file; those of its images where it has none at all."""
    return known.statistics if known and known.statistics else (reference.pool, reference.spatial)


def adm_metrics(
    samples_npz: str | os.PathLike,
    reference_npz: str | os.PathLike,
    weights: str | os.PathLike | InceptionFeatures,
    *,
    half: bool = True,
    split_size: int = adm.SPLIT_SIZE,
    k: int = adm.NEIGHBOURS,
) -> dict[str, float | None]:
    """FID, sFID, Inception score, precision and recall as ADM's evaluator computes them.

    FID and sFID are to the statistics in the reference file, never to those of its images, which are few; a file
    with images and no statistics at all is measured by its images, as ADM does. Memory holds the pool features and
    for a while the logits of all samples, 12 kB each, and never the images.

    Args:
        samples_npz: `arr_0`, (N, height, width, 3) uint8; published numbers are of 50,000.
        reference_npz: `arr_0` (10,000 images of the same size), `mu`, `sigma`, `mu_s`, `sigma_s`, such as
            VIRTUAL_imagenet256_labeled.npz.
        weights: weights-inception-2015-12-05-6726825d.pth, or what `InceptionFeatures.from_file` made of it.
        half: of `adm.precision_recall`: distances in float16, as ADM's.
        split_size: of `adm.inception_score`.
        k: of `adm.precision_recall`.

    Returns:
        `fid`, `sfid`, `inception_score`, `precision`, `recall`. What the reference file has nothing for is None, and
        the log says so: sfid without mu_s and sigma_s, fid without mu and sigma, precision and recall without arr_0.

    Raises:
        UserError: a file is missing, damaged or of another layout, the reference is of another size or was made with
            other weights, or there are too few images for the splits or the neighbours.
    """
    samples = _open_images(local_path(samples_npz), "The samples")
    reference = open_reference(local_path(reference_npz), samples.shape[1:], f"The samples in {samples.path}")
    check_counts(len(samples), reference, split_size, k)
    network = InceptionFeatures.from_file(weights) if isinstance(weights, str | os.PathLike) else weights
    check_weights(network, reference, "The reference", "the weights that were given")
    warn_of_other_numbers(network, len(samples))
    seen = _look_at(network, samples, split_size)
    known = None if reference.images is None else know(_look_at(network, reference.images), reference)
    return metrics_of(seen, known, reference, half=half, k=k)


def check_counts(count: int, reference: Reference, split_size: int, k: int) -> None:
    """Raises UserError if so many samples are too few for a split, or they or the reference's images for neighbours."""
    adm.check_splits(count, split_size)
    if reference.images is not None:
        adm.check_neighbours(len(reference.images), count, k)


def check_weights(network: InceptionFeatures, reference: Reference, what: str, weights: str) -> None:
    """Raises UserError if a reference of ours was made with other weights; the sentence calls both as it is told."""
    if reference.about and reference.about["weights_sha256"] != network.sha256:
        raise UserError(
            f"{what} {reference.path} was made with weights {reference.about['weights_sha256'][:8]}, but {weights} are "
            f"{network.sha256[:8]}: give those, or make it again with evaluate --make-reference."
        )


def warn_of_other_numbers(network: InceptionFeatures, count: int) -> None:
    """Says what keeps numbers of so many samples from being compared with published ones."""
    if not network.is_published:
        log.warning(
            "Inception's weights are not those of %s, so these numbers compare with no published ones.", PUBLISHED_NAME
        )
    if network.dtype != "float32":
        log.warning(
            "Inception computes in %s: these numbers compare with no published ones, which are of float32.",
            network.dtype,
        )
    if count != USUAL_COUNT:
        log.warning("FID depends on how many samples there are: published ones are of 50,000, this of %d.", count)


def metrics_of(seen: Seen, known: Known | None, reference: Reference, *, half: bool, k: int) -> dict[str, float | None]:
    """What `adm_metrics` returns, of samples and of the reference's images, where it has some, as they are seen."""
    pool, spatial = statistics_of(reference, known)
    recall = precision = None
    if known is not None:
        precision, recall = adm.precision_recall(known.pool, seen.pool, k, half=half)
    found = {
        "fid": None if pool is None else adm.frechet_distance(seen.of_pool, pool),
        "sfid": None if spatial is None else adm.frechet_distance(seen.of_spatial, spatial),
        "inception_score": seen.inception_score,
        "precision": precision,
        "recall": recall,
    }
    if missing := [name for name, value in found.items() if value is None]:
        log.warning("%s has nothing for %s: left out.", reference.path, ", ".join(missing))
    return found


def _open_images(path: pathlib.Path, what: str) -> NpzArray:
    images = NpzArray(path, IMAGES)
    check_image_layout(images.shape, images.dtype, f"{what} in {path} ({IMAGES})")
    return images


def open_reference(path: pathlib.Path, shape: tuple[int, ...], what: str) -> Reference:
    """What a file holds, if it fits samples of a shape (height, width, channel), which sentences call `what`.

    Raises:
        UserError: it does not fit, is damaged, or holds neither images nor statistics.
    """
    names = array_names(path)
    images = _open_images(path, "The reference images") if IMAGES in names else None
    about = json.loads(str(read_array(path, ABOUT))) if ABOUT in names else None
    sizes = [of["image_shape"] for of in (about,) if of] + [images.shape[1:] for images in (images,) if images]
    for size in sizes:
        if tuple(size[:2]) != tuple(shape[:2]):
            own, theirs = (f"{height}x{width}" for height, width in (shape[:2], size[:2]))
            raise UserError(
                f"{what} are {own} and the reference images in {path} {theirs}, but both must be of one size: give the "
                f"reference of {own}, or samples of {theirs}."
            )
    pool = _read_statistics(path, names, POOL, NUM_FEATURES)
    spatial = _read_statistics(path, names, SPATIAL, NUM_SPATIAL)
    if images is None and pool is None:
        raise UserError(
            f"{path} has neither images ({IMAGES}) nor statistics (mu, sigma) to compare with: give ADM's reference, "
            f"such as VIRTUAL_imagenet256_labeled.npz."
        )
    return Reference(path, images, pool, spatial, about)


def _read_statistics(
    path: pathlib.Path, names: Sequence[str], pair: tuple[str, str], width: int
) -> adm.Gaussian | None:
    """Mean and covariance by their names in a file; None if it has neither.

    Raises:
        UserError: one is there without the other, or they are of other features, or not finite.
    """
    there = [name for name in pair if name in names]
    if not there:
        return None
    remedy = "give ADM's reference, such as VIRTUAL_imagenet256_labeled.npz"
    if len(there) == 1:
        raise UserError(f"{path} has {there[0]} but not both of {' and '.join(pair)}: {remedy}.")
    mean, covariance = (read_array(path, name) for name in pair)
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise UserError(
            f"{pair[0]} and {pair[1]} of {path} have shapes {mean.shape} and {covariance.shape}, but ({width},) and "
            f"({width}, {width}) were expected, as of FID's Inception: {remedy}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{pair[0]} or {pair[1]} of {path} is not finite, but every value must be: {remedy}.")
    return adm.Gaussian(mean, covariance)


def _look_at(network: InceptionFeatures, images: NpzArray, split_size: int | None = None) -> Seen:
    """Features of a file's images, which are read as they are needed."""
    size = batch_size_for(len(images))
    with progress_bar(len(images), "image") as bar:
        return see(network.stream(images.batches(size), size), len(images), split_size, bar.update)


def see(
    features: Iterable[Features],
    count: int,
    split_size: int | None = None,
    tell: Callable[[int], object] = lambda number: None,
) -> Seen:
    """Gathers the features of images, of which memory holds the pool's and, for a score, the logits.

    Args:
        features: of some images at a time.
        count: how many images there are.
        split_size: of the Inception score, None for none.
        tell: hears of how many images there were.
    """
    scored = 0 if split_size is None else count
    pool, logits = np.empty((count, NUM_FEATURES), np.float32), np.empty((scored, NUM_CLASSES), np.float32)
    halves_of_pool, halves_of_spatial = adm.Halves(), adm.Halves()
    half, first = half_mask(count), 0
    waiting: list[np.ndarray] = []

    def take() -> None:  # of many at once: each time costs a pass over a matrix of 33 MB
        rows = slice(first - sum(len(some) for some in waiting), first)
        halves_of_pool.add(pool[rows], half[rows])
        halves_of_spatial.add(np.concatenate(waiting), half[rows])
        waiting.clear()

    for some in features:
        rows = slice(first, first := first + len(some.pool))
        pool[rows] = some.pool
        if scored:
            logits[rows] = some.logits
        waiting.append(some.spatial)
        if sum(len(some) for some in waiting) >= AT_ONCE:
            take()
        tell(len(some.pool))
    if waiting:
        take()
    score = None if split_size is None else adm.inception_score(logits, split_size)
    whole = halves_of_pool.whole(), halves_of_spatial.whole()
    return Seen(pool, score, *whole, halves_of_pool, halves_of_spatial)
