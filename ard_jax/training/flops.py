"""The rates that devices could reach, for utilisation figures."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.chips import chip_of


def measured_matmul_rate(dtype: Any = jnp.float32, size: int | None = None, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product on the default device: the ceiling where no data sheet gives one.

    Args:
        dtype: of its factors; float32 ones are multiplied as the networks' are, in JAX's default precision.
        size: of its side; 2048 on a CPU, and 8192 elsewhere, where a smaller one would not fill the device.
        seconds: how long to try; the best product counts.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    multiply = jax.jit(jnp.dot)
    a = jnp.ones((size, size), dtype)
    multiply(a, a).block_until_ready()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def measured_copy_rate(size: int = 2**27, times: int = 3) -> float:
    """Bytes/s that copying a large array on this machine reads and writes."""
    source = np.ones(size, np.uint8)
    target = np.zeros_like(source)
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def peak_flops() -> float:
    """Peak FLOP/s of all devices together: by device kind, measured on a CPU or a kind that is not in the table."""
    device = jax.devices()[0]
    if chip := chip_of(device.device_kind):
        return chip.flops * jax.device_count()
    # a CPU's devices share its cores
    return measured_matmul_rate() * (jax.process_count() if device.platform == "cpu" else jax.device_count())
