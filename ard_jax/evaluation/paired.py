"""Errors against the teacher from the same noise: per step, in decibels, and under the student's own history."""

from typing import NamedTuple

import numpy as np

from ard_jax.errors import UserError


class ExposureBias(NamedTuple):
    """How much of a student's error comes from its own earlier errors; every field is (S,) float64, one value a step.

    Attributes:
        forced: mean squared error of each step with the teacher's history as input (teacher forcing).
        rollout: mean squared error of each step on the student's own predictions.
        difference: rollout - forced; 0 at the first step, whose history is the noise alone.
    """

    forced: np.ndarray
    rollout: np.ndarray
    difference: np.ndarray


def mean_squared_error_per_step(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean over batch, height, width and channel of the squared difference, for each step.

    Args:
        prediction: (batch, step, height, width, channel), any float type.
        target: the same shape.

    Returns:
        (S,) float64, in squared units of the input.

    Raises:
        UserError: shapes that differ or have not five axes, an empty axis, or non-finite values.
    """
    # Not yet float64: a step at a time is widened below, so that a large batch is never held twice.
    prediction, target = np.asarray(prediction), np.asarray(target)
    if prediction.ndim != 5 or prediction.shape != target.shape or prediction.size == 0:
        raise UserError(
            f"The prediction has shape {prediction.shape} and the target {target.shape}, but both must be the "
            "same (batch, step, height, width, channel), none empty: pair each step with the point that it "
            "predicts, without the noise."
        )
    errors = np.array([_mean_squared_error(prediction[:, s], target[:, s]) for s in range(prediction.shape[1])])
    if not np.isfinite(errors).all():
        raise UserError(
            f"Prediction or target is not finite at step {np.isfinite(errors).argmin()} (counted from 0), but every "
            "value must be: look for a diverged model or an unfiltered trajectory."
        )
    return errors


def _mean_squared_error(prediction, target):
    return np.mean(np.square(prediction.astype(np.float64) - target.astype(np.float64)))


def psnr(mse: float | np.ndarray, data_range: float = 2.0) -> float | np.ndarray:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range² / mse); infinite where the error is 0.

    Args:
        mse: mean squared error, a number or an array of any shape.
        data_range: distance from the least to the greatest value; 2 for images in [-1, 1].

    Returns:
        float64 of the shape of `mse`, a float for a number.

    Raises:
        UserError: a negative or NaN error, or a data range that is not positive.
    """
    mse = np.asarray(mse, np.float64)
    if not (mse >= 0).all():
        raise UserError(
            f"The mean squared error is {mse}, but it must be at least 0: pass errors, not their logarithm."
        )
    if not data_range > 0:
        raise UserError(f"data_range is {data_range}, but it must be positive: use 2 for images in [-1, 1].")
    with np.errstate(divide="ignore"):
        decibels = 10 * (2 * np.log10(data_range) - np.log10(mse))
    return decibels if decibels.ndim else float(decibels)


def exposure_bias(teacher_points: np.ndarray, forced: np.ndarray, rollout: np.ndarray) -> ExposureBias:
    """The student's error with the teacher's history against its error on its own predictions (arXiv 2504.11295).

    Args:
        teacher_points: (batch, step, height, width, channel), the points that the steps predict: without the noise.
        forced: the same shape, predictions from the teacher's earlier points.
        rollout: the same shape, predictions from the student's own earlier predictions, from the same noise.

    Raises:
        UserError: as `mean_squared_error_per_step`.
    """
    forced_error = mean_squared_error_per_step(forced, teacher_points)
    rollout_error = mean_squared_error_per_step(rollout, teacher_points)
    return ExposureBias(forced_error, rollout_error, rollout_error - forced_error)
