"""Random weights for FID's Inception, whose published ones are no test's to have."""

import pathlib

import numpy as np

from ard_jax.evaluation.inception import published_shapes
from ard_jax.weights.tensors import write_tensors


def random_state_dict(seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict with the published names, of a scale that neither dies out nor grows from layer to layer."""
    rng = np.random.RandomState(seed)  # its numbers never change, and tests/golden has what comes of them

    def draw(name, shape):
        if name.endswith("conv.weight"):
            return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        if name.startswith("fc."):
            return rng.normal(size=shape) * (0.05 if name == "fc.weight" else 1)
        if name.endswith(("bn.weight", "running_var")):
            return rng.uniform(0.7, 1.3, shape)
        return rng.normal(size=shape) * 0.2  # biases and running means

    return {name: draw(name, shape).astype(np.float32) for name, shape in sorted(published_shapes().items())}


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
