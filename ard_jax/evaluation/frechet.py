"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500)."""

import dataclasses
from typing import Protocol

import numpy as np
import scipy.linalg

from ard_jax.errors import UserError
from ard_jax.evaluation._checks import check_features

DRAWS = 1000
SHARE = 0.95
AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """A set of features as a Gaussian.

    Attributes:
        mean: (F,) float64.
        covariance: (F, F) float64, with divisor count - 1.
        count: number of samples.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int


def feature_statistics(features: np.ndarray) -> FeatureStatistics:
    """Mean and unbiased covariance of features (N, F), N > F, in float64.

    Raises:
        UserError: features that are not (N, F), not finite, or too few.
    """
    features = check_features(features)
    count, width = features.shape
    if count <= width:
        raise UserError(
            f"The statistics of {width} features were asked from {count} samples, whose covariance would be singular "
            f"and the Fréchet distance meaningless: hand over at least {width + 1} samples, better some thousands."
        )
    covariance = np.cov(features, rowvar=False).reshape(width, width)
    return FeatureStatistics(features.mean(axis=0), covariance, count)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians: |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), as FID reports it.

    It is biased upwards by O(1 / count): compare only distances from equal counts. Singular covariances (features
    that never fire) are allowed: no inverse and no square root of an unsymmetric matrix is taken.

    Raises:
        UserError: statistics of different or inconsistent shapes, or not finite.
    """
    for name, statistics in (("first", a), ("second", b)):
        _check_statistics(name, statistics)
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"The first statistics have {len(a.mean)} features and the second {len(b.mean)}, but they must come from "
            "the same feature network: compute both with one FeatureExtractor."
        )
    # tr (C_a C_b)^½ = tr (R_a C_b R_a)^½ with R = C^½, and R_a C_b R_a = (R_a R_b)(R_a R_b)ᵀ: so the trace is the
    # sum of the singular values of R_a R_b, which spares the square root of rounding noise in singular directions.
    cross = scipy.linalg.svdvals(_square_root(a.covariance) @ _square_root(b.covariance)).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)  # of equal statistics rounding may leave -1e-14


def distance_of_halves(features: np.ndarray) -> float | None:
    """Fréchet distance of two halves of features (N, F), which are parted at random; None if they are too few for it.

    Its sets are half as large as those of a distance that it stands beside, so its own bias is about twice as large.
    """
    if len(features) // 2 <= features.shape[1]:
        return None
    half = half_mask(len(features))
    return frechet_distance(feature_statistics(features[half]), feature_statistics(features[~half]))


def half_mask(count: int) -> np.ndarray:
    """Half of `count` samples at random, the same each time: bool (count,)."""
    return np.random.default_rng(0).permutation(count) < count // 2


class _Statistics(Protocol):
    """A Gaussian of features: `FeatureStatistics` and `adm.Gaussian` are some."""

    @property
    def mean(self) -> np.ndarray: ...
    @property
    def covariance(self) -> np.ndarray: ...


def distance_interval(
    distance: float, parts: np.ndarray, draws: int = DRAWS, share: float = SHARE
) -> tuple[float, float]:
    """Where the distance of as many other samples of the same model would lie: a bootstrap interval.

    Samples are drawn again with replacement, and the distance is followed to first order in what each of them
    contributes. Computing it anew from each draw would count its bias twice, since a draw has fewer different samples:
    such intervals lie above the distance that they are of. The real images are held fixed.

    Args:
        distance: of the samples to the real images.
        parts: `influence` of each of them on it (N,).
        draws: how often samples are drawn.
        share: of the draws that lie within.
    """
    low, high = difference_interval(distance, parts, draws, share)
    return max(low, 0.0), high


def difference_interval(
    difference: float, parts: np.ndarray, draws: int = DRAWS, share: float = SHARE
) -> tuple[float, float]:
    """`distance_interval` of a distance less another one, of samples that are pairs, which are drawn together.

    What both samples of a pair have in common, such as their noise and condition, then moves both distances alike and
    their difference hardly: it is known far better than either of them.

    Args:
        difference: one distance less the other.
        parts: `influence` of each pair on it (N,): that of its sample on the one less that on the other.
        draws, share: as there.
    """
    rng = np.random.default_rng(0)
    means = [parts[rng.integers(0, len(parts), len(parts))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return difference + float(low), difference + float(high)


def influence(real: _Statistics, own: _Statistics, features: np.ndarray) -> np.ndarray:
    """First-order effect of each sample on the Fréchet distance (N,): its derivative towards that sample.

    d tr (C_a C)^½ = ½ tr(T dC) with T = R_a (R_a C R_a)^-½ R_a and R_a = C_a^½, so a sample x gives
    2 y·(m - m_a) + yᵀ (1 - T) y less its mean, where y = x - m. In directions that no sample has a part in, T is 0.
    """
    mean = np.asarray(own.mean, np.float64)
    root = _square_root(np.asarray(real.covariance, np.float64))
    values, vectors = scipy.linalg.eigh(root @ own.covariance @ root)
    there = values > len(values) * np.finfo(np.float64).eps * max(values.max(), 0)
    scaled = root @ vectors[:, there] / np.sqrt(np.sqrt(values[there]))
    shape = np.eye(len(mean)) - scaled @ scaled.T
    found = np.empty(len(features))
    for start in range(0, len(features), AT_ONCE):
        y = features[start : start + AT_ONCE] - mean
        found[start : start + len(y)] = 2 * y @ (mean - real.mean) + (y @ shape * y).sum(axis=1)
    return found - found.mean()


def _square_root(covariance):
    """Symmetric square root of a positive semi-definite matrix; eigenvalues that rounding made negative count as 0."""
    values, vectors = scipy.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _check_statistics(name, statistics):
    width = statistics.mean.size
    if statistics.mean.shape != (width,) or statistics.covariance.shape != (width, width):
        raise UserError(
            f"The {name} statistics have mean {statistics.mean.shape} and covariance {statistics.covariance.shape}, "
            "but (F,) and (F, F) were expected: make them with feature_statistics."
        )
    if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.covariance).all()):
        raise UserError(
            f"The {name} statistics hold non-finite values, but a Fréchet distance needs finite ones: make them anew "
            "with feature_statistics from finite features."
        )
