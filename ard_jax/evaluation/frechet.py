"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500)."""

import dataclasses

import numpy as np
import scipy.linalg

from ard_jax.errors import UserError
from ard_jax.evaluation._checks import check_features


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
