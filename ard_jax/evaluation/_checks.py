"""The check that every statistic of features begins with."""

import numpy as np

from ard_jax.errors import UserError


def check_features(features: np.ndarray, name: str = "features") -> np.ndarray:
    """The features as (N, F) float64.

    Raises:
        UserError: not two axes, no feature axis, or a non-finite value; the sentence calls them `name`.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise UserError(
            f"The {name} have shape {features.shape}, but (sample, feature) was expected: pass what a "
            "FeatureExtractor returns."
        )
    features = features.astype(np.float64)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise UserError(
            f"The {name} of {np.count_nonzero(~finite)} of {len(features)} samples, first of sample "
            f"{finite.argmin()}, are not finite, but every value must be: look for NaN in the images they come from."
        )
    return features
