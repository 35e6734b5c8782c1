"""FID, sFID, Inception score, precision and recall as ADM defines them (Dhariwal & Nichol 2021, arXiv 2105.05233).

These are the definitions of the numbers that papers of diffusion on ImageNet report, kept to the letter where the
letter shows in the digits; frechet.py and precision_recall.py are the same ideas in float64, for features of our own.
"""

import warnings
from collections.abc import Mapping
from typing import NamedTuple, Self

import numpy as np
import scipy.linalg
import scipy.special

from ard_jax.errors import UserError
from ard_jax.evaluation._checks import require_features

SPLIT_SIZE = 5_000
NEIGHBOURS = 3
# Distances between so many and so many samples are computed at once; where one of them overflows, all are in float32.
BLOCK = 10_000
STRIP = 500  # rows of a block that are computed at once
DIAGONAL = 1e-6


class Gaussian(NamedTuple):
    """Features as a normal distribution.

    Attributes:
        mean: (F,).
        covariance: (F, F), with divisor N - 1.
    """

    mean: np.ndarray
    covariance: np.ndarray


def gaussian(features: np.ndarray) -> Gaussian:
    """The statistics of features (N, F): the mean in their own type, which is float32, the covariance in float64.

    Raises:
        UserError: features that are not (N, F), not finite, or of fewer than 2 samples.
    """
    _check_count(len(require_features(features)))
    return Gaussian(np.mean(features, axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


class RunningGaussian:
    """The statistics of features that come a batch at a time and are not kept.

    Sums of x and of x·xᵀ are float64 and about a fixed shift, the first batch's mean: features are positive, and
    about 0 the squares of their means would drown their variances.
    """

    def __init__(self):
        self.count = 0
        self._shift: np.ndarray = np.zeros(0)
        self._sum: np.ndarray = np.zeros(0)
        self._outer: np.ndarray = np.zeros((0, 0))

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by name, for a file."""
        return {"count": np.array(self.count), "shift": self._shift, "sum": self._sum, "outer": self._outer}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """What `arrays` made, again."""
        made = cls()
        made.count = int(arrays["count"])
        made._shift, made._sum, made._outer = (arrays[name] for name in ("shift", "sum", "outer"))
        return made

    @property
    def width(self) -> int:
        """F, once there are features."""
        return len(self._sum)

    def add(self, features: np.ndarray) -> None:
        """Takes (N, F) more."""
        features = np.asarray(features, np.float64)
        if not self.count:
            width = features.shape[1]
            self._shift, self._sum, self._outer = features.mean(axis=0), np.zeros(width), np.zeros((width, width))
        shifted = features - self._shift
        self.count += len(shifted)
        self._sum += shifted.sum(axis=0)
        self._outer += shifted.T @ shifted

    def merge(self, other: "RunningGaussian") -> None:
        """Takes in what another has seen."""
        if not other.count:
            return
        if not self.count:
            self.count, self._shift = other.count, other._shift
            self._sum, self._outer = other._sum.copy(), other._outer.copy()
            return
        moved = other._shift - self._shift  # of the other's sums, which become sums about this one's shift
        cross = np.outer(moved, other._sum)
        self._outer += other._outer + cross + cross.T + other.count * np.outer(moved, moved)
        self._sum += other._sum + other.count * moved
        self.count += other.count

    def gaussian(self) -> Gaussian:
        """The statistics of all so far, in float64.

        Raises:
            UserError: they are fewer than 2, or not finite.
        """
        _check_count(self.count)
        mean = self._sum / self.count
        covariance = (self._outer - self.count * np.outer(mean, mean)) / (self.count - 1)
        if not np.isfinite(covariance).all():
            raise UserError("The features are not finite, but every value must be: look at the weights they come from.")
        return Gaussian(mean + self._shift, covariance)


class Halves:
    """Running statistics of two halves of some features, and of all together."""

    def __init__(self) -> None:
        self._halves = RunningGaussian(), RunningGaussian()

    def add(self, features: np.ndarray, half: np.ndarray) -> None:
        """Takes (N, F) more, of which those of a mask (N,) belong to the first half."""
        for running, rows in zip(self._halves, (half, ~half), strict=True):
            if rows.any():
                running.add(features[rows])

    def merge(self, other: "Halves") -> None:
        """Takes in what another has seen."""
        for own, more in zip(self._halves, other._halves, strict=True):
            own.merge(more)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by name, for a file."""
        named = zip(("one", "other"), self._halves, strict=True)
        return {f"{half}_{name}": array for half, running in named for name, array in running.arrays().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """What `arrays` made, again."""
        made = cls()
        parts = [{name.removeprefix(f"{half}_"): arrays[name] for name in arrays} for half in ("one", "other")]
        made._halves = RunningGaussian.from_arrays(parts[0]), RunningGaussian.from_arrays(parts[1])
        return made

    def whole(self) -> Gaussian:
        """Of all together."""
        both = RunningGaussian()
        for running in self._halves:
            both.merge(running)
        return both.gaussian()

    def distance(self) -> float | None:
        """Fréchet distance of one half to the other; None where they are too few for it, fewer than features."""
        one, other = self._halves
        if min(one.count, other.count) <= one.width:
            return None
        return frechet_distance(one.gaussian(), other.gaussian())


def _check_count(count: int) -> None:
    if count < 2:
        raise UserError(f"A covariance was asked of {count} sample(s), but needs at least 2: give more.")


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|² + tr C_a + tr C_b - 2 tr (C_a C_b)^½: FID of pool features, sFID of spatial ones.

    Raises:
        UserError: statistics of different shapes, or so singular that the root is not real.
    """
    if a.mean.shape != b.mean.shape or a.covariance.shape != b.covariance.shape:
        raise UserError(
            f"The statistics have means of {a.mean.shape} and {b.mean.shape} and covariances of {a.covariance.shape} "
            f"and {b.covariance.shape}, but both must be of the same features: compute both with the same network."
        )
    root = _square_root(a.covariance @ b.covariance)
    if not np.isfinite(root).all():
        offset = np.eye(len(a.covariance)) * DIAGONAL
        root = _square_root((a.covariance + offset) @ (b.covariance + offset))
    if np.iscomplexobj(root):
        imaginary = np.abs(np.diagonal(root).imag).max()
        if not imaginary < 1e-3:
            raise UserError(
                f"The covariances of {len(root)} features are too singular for a Fréchet distance (their product's "
                f"root has an imaginary part of {imaginary:.2g}): give more samples, at least {len(root) + 1}."
            )
        root = root.real
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root))


def _square_root(product: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of singular products, which are looked at where this is called
        return scipy.linalg.sqrtm(product)


def inception_score(logits: np.ndarray, split_size: int = SPLIT_SIZE) -> float:
    """exp of the mean divergence of a sample's classes from those of its split, as a mean over splits.

    Args:
        logits: (N, class), without the bias, all 1008 classes, in the order of the file: nothing is shuffled.
        split_size: consecutive samples that make a split; the last split has what is left.

    Raises:
        UserError: logits that are not (N, class), not finite, or of fewer than a split.
    """
    require_features(logits, "logits")
    check_splits(len(logits), split_size)
    scores = []
    for start in range(0, len(logits), split_size):
        log_share = scipy.special.log_softmax(logits[start : start + split_size].astype(np.float64), axis=1)
        share = np.exp(log_share)
        mean = share.mean(axis=0)
        # x log x is 0 at 0: a class that no sample has takes no part
        entropy = scipy.special.xlogy(mean, mean).sum()
        scores.append(np.exp((share * log_share).sum(axis=1).mean() - entropy))
    return float(np.mean(scores))


def check_splits(count: int, split_size: int) -> None:
    """Raises UserError if so many samples are not a split."""
    if not 1 <= split_size <= count:
        raise UserError(
            f"The Inception score was asked of {count} samples in splits of {split_size}, but a split has at least 1 "
            f"and at most all of them: give at least {SPLIT_SIZE:,} samples (papers give 50,000), or smaller splits."
        )


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = NEIGHBOURS, *, half: bool = True
) -> tuple[float, float]:
    """Share of samples within the reference's balls, and of the reference within the samples'.

    A ball reaches from a sample to its k-th nearest other one of its set, surface included. ADM computes the squared
    distances in float16, by |u|² - 2 uv + |v|², which is too coarse for some neighbours: precision of its own samples
    is .8265 so and .8255 in float32.

    Args:
        reference: (N, F) float32 features of real images; ADM's are 10,000.
        samples: (M, F) float32 features of samples; ADM's are 50,000.
        k: neighbours.
        half: whether distances are float16 wherever all of a block of 10,000 by 10,000 are finite; else float32.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        UserError: features that are not (N, F), not finite, of different F, or k outside 1 … min(N, M) - 1.
    """
    require_features(reference, "reference features")
    require_features(samples, "sample features")
    if reference.shape[1] != samples.shape[1]:
        raise UserError(
            f"The reference has {reference.shape[1]} features and the samples {samples.shape[1]}, but both must come "
            f"from the same network: compute both with one InceptionFeatures."
        )
    check_neighbours(len(reference), len(samples), k)
    reference_radii, sample_radii = (_radii(features, k, half) for features in (reference, samples))
    precise, recalled = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows in _blocks(len(reference)):
        for columns in _blocks(len(samples)):
            distances = squared_distances(reference[rows], samples[columns], half)
            for strip in _strips(distances):
                here = slice(rows.start + strip.start, rows.start + strip.stop)
                precise[columns] |= (distances[strip] <= reference_radii[here, None]).any(axis=0)
                recalled[here] |= (distances[strip] <= sample_radii[columns]).any(axis=1)
            del distances  # or there would be two blocks at once
    return float(precise.mean()), float(recalled.mean())


def check_neighbours(num_reference: int, num_samples: int, k: int) -> None:
    """Raises UserError if a set has no k-th other sample."""
    if not 1 <= k < min(num_reference, num_samples):
        raise UserError(
            f"Precision and recall were asked with k = {k} of {num_reference} reference images and {num_samples} "
            f"samples, but k must be at least 1 and below both: give more images (ADM has 10,000 and 50,000), or "
            f"another k."
        )


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _strips(block: np.ndarray) -> list[slice]:
    """Rows of a block that are looked at together, so that what comes of them takes little memory."""
    return [slice(start, min(start + STRIP, len(block))) for start in range(0, len(block), STRIP)]


def _radii(features: np.ndarray, k: int, half: bool) -> np.ndarray:
    """Squared distance (N,) from each sample to its k-th nearest other one.

    The sample itself is the nearest of all, at 0, so that the others begin after it: as in ADM, where rounding may put
    another before it.
    """
    radii = np.empty(len(features), np.float32)
    for rows in _blocks(len(features)):
        nearest = np.empty((rows.stop - rows.start, 0), np.float32)
        for columns in _blocks(len(features)):
            distances = squared_distances(features[rows], features[columns], half)
            some = np.concatenate([_smallest(distances[strip], k + 1) for strip in _strips(distances)])
            nearest = np.concatenate([nearest, some], axis=1)
            del distances, some  # or there would be two blocks at once
        radii[rows] = _smallest(nearest, k + 1).max(axis=1)
    return radii


def _smallest(distances: np.ndarray, count: int) -> np.ndarray:
    """The `count` smallest of each row, in any order; all if there are fewer."""
    if distances.shape[1] <= count:
        return distances
    return np.partition(distances, count - 1, axis=1)[:, :count]


def squared_distances(u: np.ndarray, v: np.ndarray, half: bool) -> np.ndarray:
    """|u|² - 2 uv + |v|², at least 0, of every pair of (N, F) and (M, F).

    Args:
        u, v: float32 features.
        half: in float16, unless one of the distances is not finite in it: then all are computed in float32.

    Returns:
        (N, M) in the type that they were computed in.
    """
    if half:
        with np.errstate(over="ignore", invalid="ignore"):
            distances = _expanded(u, v, np.dtype(np.float16))
        if all(np.isfinite(distances[strip]).all() for strip in _strips(distances)):
            return distances
        del distances
    return _expanded(u, v, np.dtype(np.float32))


def _expanded(u: np.ndarray, v: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The squared distances in a type; sums are float32 until they are whole, as accelerators have it.

    They are computed a few rows at a time: beside them, memory holds little.
    """
    v = v.astype(dtype, copy=False)
    of_v = np.square(v).sum(axis=1, dtype=np.float32).astype(dtype)
    v, distances = v.astype(np.float32, copy=False), np.empty((len(u), len(v)), dtype)
    for place in _strips(distances):
        rows, strip = u[place].astype(dtype), distances[place]
        of_rows = np.square(rows).sum(axis=1, dtype=np.float32).astype(dtype)
        strip[:] = rows.astype(np.float32) @ v.T
        np.multiply(strip, dtype.type(-2), out=strip)
        np.add(of_rows[:, None], strip, out=strip)
        np.add(strip, of_v, out=strip)
        np.maximum(strip, dtype.type(0), out=strip)
    return distances
