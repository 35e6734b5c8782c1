"""ADM's metrics of anybody's samples: an npz of images against an npz of references, and nothing of ours."""

import logging
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ard_jax.errors import UserError
from ard_jax.evaluation import adm
from ard_jax.evaluation.inception import (
    NUM_FEATURES,
    NUM_SPATIAL,
    PUBLISHED_NAME,
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
USUAL_COUNT = 50_000


class Reference(NamedTuple):
    """What a reference file holds; None is what it lacks.

    Attributes:
        images: (N, height, width, 3) uint8, of precision and recall.
        pool, spatial: statistics of the whole training set's features.
    """

    images: NpzArray | None
    pool: adm.Gaussian | None
    spatial: adm.Gaussian | None


class Seen(NamedTuple):
    """What the network said of a file's images: features kept (N, 2048) and (N, 1008), statistics of both layers."""

    pool: np.ndarray
    logits: np.ndarray
    of_pool: adm.RunningGaussian
    of_spatial: adm.RunningGaussian


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
    logits of all samples, 12 kB each, and never the images.

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
        UserError: a file is missing, damaged or of another layout, the reference is of another size, or there are too
            few images for the splits or the neighbours.
    """
    samples = _open_images(local_path(samples_npz), "The samples")
    reference = _open_reference(local_path(reference_npz), samples)
    adm.check_splits(len(samples), split_size)
    if reference.images is not None:
        adm.check_neighbours(len(reference.images), len(samples), k)
    network = InceptionFeatures.from_file(weights) if isinstance(weights, str | os.PathLike) else weights
    if not network.is_published:
        log.warning(
            "Inception's weights are not those of %s, so these numbers compare with no published ones.", PUBLISHED_NAME
        )
    if len(samples) != USUAL_COUNT:
        log.warning(
            "FID depends on how many samples there are: published ones are of 50,000, this of %d.", len(samples)
        )
    seen = _look_at(network, samples)
    known = None if reference.images is None else _look_at(network, reference.images)
    pool, spatial = reference.pool, reference.spatial
    if pool is None and spatial is None and known is not None:
        log.warning("%s has no statistics: FID and sFID are to its %d images.", reference_npz, len(known.pool))
        pool, spatial = known.of_pool.gaussian(), known.of_spatial.gaussian()
    recall = precision = None
    if known is not None:
        precision, recall = adm.precision_recall(known.pool, seen.pool, k, half=half)
    found = {
        "fid": None if pool is None else adm.frechet_distance(seen.of_pool.gaussian(), pool),
        "sfid": None if spatial is None else adm.frechet_distance(seen.of_spatial.gaussian(), spatial),
        "inception_score": adm.inception_score(seen.logits, split_size),
        "precision": precision,
        "recall": recall,
    }
    if missing := [name for name, value in found.items() if value is None]:
        log.warning("%s has nothing for %s: left out.", reference_npz, ", ".join(missing))
    return found


def _open_images(path: pathlib.Path, what: str) -> NpzArray:
    images = NpzArray(path, IMAGES)
    check_image_layout(images.shape, images.dtype, f"{what} in {path} ({IMAGES})")
    return images


def _open_reference(path: pathlib.Path, samples: NpzArray) -> Reference:
    """What a file holds, if it fits the samples.

    Raises:
        UserError: it does not fit, is damaged, or holds neither images nor statistics.
    """
    names = array_names(path)
    images = _open_images(path, "The reference images") if IMAGES in names else None
    if images is not None and images.shape[1:] != samples.shape[1:]:
        sizes = [f"{height}x{width}" for height, width in (samples.shape[1:3], images.shape[1:3])]
        raise UserError(
            f"The samples in {samples.path} are {sizes[0]} and the reference images in {path} {sizes[1]}, but both "
            f"must be of one size: give the reference of {sizes[0]}, or samples of {sizes[1]}."
        )
    pool = _read_statistics(path, names, POOL, NUM_FEATURES)
    spatial = _read_statistics(path, names, SPATIAL, NUM_SPATIAL)
    if images is None and pool is None:
        raise UserError(
            f"{path} has neither images ({IMAGES}) nor statistics (mu, sigma) to compare with: give ADM's reference, "
            f"such as VIRTUAL_imagenet256_labeled.npz."
        )
    return Reference(images, pool, spatial)


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


def _look_at(network: InceptionFeatures, images: NpzArray) -> Seen:
    """Features of a file's images, which are read as they are needed."""
    of_pool, of_spatial = adm.RunningGaussian(), adm.RunningGaussian()
    pool: list[np.ndarray] = []
    logits: list[np.ndarray] = []
    size = batch_size_for(len(images))
    with progress_bar(len(images), "image") as bar:
        for features in network.stream(images.batches(size), size):
            pool.append(features.pool)
            logits.append(features.logits)
            of_pool.add(features.pool)
            of_spatial.add(features.spatial)
            bar.update(len(features.pool))
    return Seen(np.concatenate(pool), np.concatenate(logits), of_pool, of_spatial)
