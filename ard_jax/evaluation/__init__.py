"""Numbers from images: features, Fréchet distance, precision and recall, paired error, CLIP's scores.

Arrays in, numbers out.
"""

from ard_jax.evaluation.adm_files import adm_metrics
from ard_jax.evaluation.clip_images import images_for_clip
from ard_jax.evaluation.clip_scores import (
    CLIP_SCORE_PREFIX,
    clip_score,
    clip_similarity,
    compbench_non_spatial,
    hps_v2,
    pick_score,
)
from ard_jax.evaluation.features import FeatureExtractor, FeatureNet, train_feature_net
from ard_jax.evaluation.frechet import (
    FeatureStatistics,
    difference_interval,
    distance_interval,
    distance_of_halves,
    feature_statistics,
    frechet_distance,
    influence,
)
from ard_jax.evaluation.inception import InceptionFeatures
from ard_jax.evaluation.judge import Judge, disturb, train_judge
from ard_jax.evaluation.paired import ExposureBias, exposure_bias, mean_squared_error_per_step, psnr
from ard_jax.evaluation.precision_recall import precision_recall

__all__ = [
    "CLIP_SCORE_PREFIX",
    "ExposureBias",
    "FeatureExtractor",
    "FeatureNet",
    "FeatureStatistics",
    "InceptionFeatures",
    "Judge",
    "adm_metrics",
    "clip_score",
    "clip_similarity",
    "compbench_non_spatial",
    "difference_interval",
    "distance_interval",
    "distance_of_halves",
    "disturb",
    "exposure_bias",
    "feature_statistics",
    "frechet_distance",
    "hps_v2",
    "images_for_clip",
    "influence",
    "mean_squared_error_per_step",
    "pick_score",
    "precision_recall",
    "psnr",
    "train_feature_net",
    "train_judge",
]
