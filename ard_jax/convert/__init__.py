"""PyTorch weights in and out."""

from ard_jax.convert.published import from_torch

__all__ = ["from_torch"]
