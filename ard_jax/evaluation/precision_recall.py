"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

import numpy as np
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

from ard_jax.errors import UserError
from ard_jax.evaluation._checks import check_features

CHUNK_MEBIBYTES = 128


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of generated samples on the real manifold, and of real samples on the generated manifold.

    The manifold of a set is the union of the balls around its samples that reach to their k-th nearest other
    sample of the set, surface included (equations 1 and 2). Both depend on the numbers of samples: compare models at
    equal counts. Distances are computed in chunks, so memory grows with N, never with N².

    Args:
        real: (N, F) features of real images.
        generated: (M, F) features of generated images.
        k: neighbours that make a ball; the paper uses 3.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        UserError: features that are not (N, F), not finite, of different F, or k outside 1 … min(N, M) - 1.
    """
    real = check_features(real, "real features")
    generated = check_features(generated, "generated features")
    if real.shape[1] != generated.shape[1]:
        raise UserError(
            f"The real samples have {real.shape[1]} features and the generated {generated.shape[1]}, but they must "
            "come from the same feature network: compute both with one FeatureExtractor."
        )
    fewest = min(len(real), len(generated))
    if not 1 <= k < fewest:
        raise UserError(
            f"Precision and recall were asked with k = {k}, but k must be at least 1 and below the number of samples, "
            f"here {len(real)} real and {len(generated)} generated: hand over more samples or choose another k."
        )
    return _coverage(real, generated, k), _coverage(generated, real, k)


def _coverage(manifold, samples, k):
    """Share of `samples` (M, F) that lie in a ball around a point of `manifold` (N, F)."""
    # Without an argument `kneighbors` leaves each point out of its own neighbours, by index, so duplicates count.
    radii = NearestNeighbors(n_neighbors=k).fit(manifold).kneighbors()[0][:, -1]
    inside = pairwise_distances_chunked(
        samples,
        manifold,
        reduce_func=lambda distances, start: (distances <= radii).any(axis=1),
        working_memory=CHUNK_MEBIBYTES,
    )
    return float(np.concatenate(list(inside)).mean())
