"""Numbers from images: features, Fréchet distance, precision and recall, paired error. Arrays in, numbers out."""

from ard_jax.evaluation.adm_files import adm_metrics
from ard_jax.evaluation.features import FeatureExtractor, FeatureNet, train_feature_net
from ard_jax.evaluation.frechet import FeatureStatistics, feature_statistics, frechet_distance
from ard_jax.evaluation.inception import InceptionFeatures
from ard_jax.evaluation.judge import Judge, disturb, train_judge
from ard_jax.evaluation.paired import ExposureBias, exposure_bias, mean_squared_error_per_step, psnr
from ard_jax.evaluation.precision_recall import precision_recall

__all__ = [
    "ExposureBias",
    "FeatureExtractor",
    "FeatureNet",
    "FeatureStatistics",
    "InceptionFeatures",
    "Judge",
    "adm_metrics",
    "disturb",
    "exposure_bias",
    "feature_statistics",
    "frechet_distance",
    "mean_squared_error_per_step",
    "precision_recall",
    "psnr",
    "train_feature_net",
    "train_judge",
]
