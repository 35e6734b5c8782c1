"""The checks that every statistic of features begins with."""

import numpy as np

from ard_jax.errors import UserError

AT_ONCE = 4096  # rows that are looked at together: a copy of all would be as large as the features


def check_features(features: np.ndarray, name: str = "features") -> np.ndarray:
    """The features as (N, F) float64.

    Raises:
        UserError: not two axes, no feature axis, or a non-finite value; the sentence calls them `name`.
    """
    return require_features(features, name).astype(np.float64)


def require_features(features: np.ndarray, name: str = "features") -> np.ndarray:
    """The features (N, F) as they are, which `check_features` would take."""
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise UserError(
            f"The {name} have shape {features.shape}, but (sample, feature) was expected: pass what a "
            "FeatureExtractor returns."
        )
    finite = np.ones(len(features), bool)
    for start in range(0, len(features), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        finite[rows] = np.isfinite(features[rows].astype(np.float64, copy=False)).all(axis=1)
    if not finite.all():
        raise UserError(
            f"The {name} of {np.count_nonzero(~finite)} of {len(features)} samples, first of sample "
            f"{finite.argmin()}, are not finite, but every value must be: look for NaN in the images they come from."
        )
    return features
