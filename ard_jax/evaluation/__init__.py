"""Numbers from images: features, Fréchet distance, precision and recall, paired error. Arrays in, numbers out."""

from ard_jax.evaluation.features import NUM_FEATURES, FeatureExtractor, FeatureNet, train_feature_net
from ard_jax.evaluation.frechet import FeatureStatistics, feature_statistics, frechet_distance
from ard_jax.evaluation.paired import ExposureBias, exposure_bias, mean_squared_error_per_step, psnr
from ard_jax.evaluation.precision_recall import precision_recall

__all__ = [
    "NUM_FEATURES",
    "ExposureBias",
    "FeatureExtractor",
    "FeatureNet",
    "FeatureStatistics",
    "exposure_bias",
    "feature_statistics",
    "frechet_distance",
    "mean_squared_error_per_step",
    "precision_recall",
    "psnr",
    "train_feature_net",
]
