"""Random weights for FID's Inception, whose published ones are no test's to have."""

import pathlib

import numpy as np

from ard_jax.weights.tensors import write_tensors
from benchmarks.inception import random_state_dict


def write_weights(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    path = folder / f"inception-{seed}.safetensors"
    write_tensors(path, random_state_dict(seed))
    return path


def random_images(side: int, count: int = 2, seed: int = 0) -> np.ndarray:
    """(count, side, side, 3) uint8: coarse patches with noise, so that features are not all of one kind."""
    rng = np.random.RandomState(1000 * seed + side)
    patches = rng.randint(0, 256, (count, 4, 4, 3)).repeat(-(-side // 4), axis=1).repeat(-(-side // 4), axis=2)
    noisy = patches[:, :side, :side] + rng.normal(size=(count, side, side, 3)) * 20
    return np.clip(noisy, 0, 255).astype(np.uint8)
