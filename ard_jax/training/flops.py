"""Model FLOPs by formula, and the rates that devices could reach.

A multiply-accumulate counts as two FLOPs and only matrix products count, as usual for utilisation figures. The formulas
are checked against XLA's cost analysis of the unrolled models in the tests.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.chips import chip_of
from ard_jax.models import ARDStudent, DiT, visible_blocks


def row_macs(model: DiT, tokens: int) -> int:
    """Multiply-accumulates of one row (image or block) without attention between tokens."""
    width, hidden = model.hidden_size, round(model.hidden_size * model.mlp_ratio)
    patch = model.patch_size**2 * model.channels
    out = patch * (2 if model.learn_sigma else 1)
    per_token = patch * width + model.depth * (4 * width**2 + 2 * width * hidden) + width * out
    modulation = model.depth * 6 * width**2 + 2 * width**2
    return tokens * per_token + modulation


def attention_macs(model: DiT, queries: int, keys: int) -> int:
    """Multiply-accumulates of one layer's attention."""
    return 2 * queries * keys * model.hidden_size


def time_macs(model: DiT) -> int:
    return 256 * model.hidden_size + model.hidden_size**2


def image_tokens(model: DiT, shape: tuple[int, int, int]) -> int:
    return (shape[0] // model.patch_size) * (shape[1] // model.patch_size)


def teacher_macs(model: DiT, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass of one image of (height, width, channel)."""
    tokens = image_tokens(model, shape)
    return row_macs(model, tokens) + time_macs(model) + model.depth * attention_macs(model, tokens, tokens)


def student_macs(model: ARDStudent, shape: tuple[int, int, int]) -> int:
    """The same of all S steps of one trajectory, in training or cached sampling: they cost the same."""
    tokens, history = image_tokens(model, shape), model.layers_with_history
    seen = sum(len(visible_blocks(model.mask, block)) for block in range(model.steps))
    attention = history * seen + (model.depth - history) * model.steps
    rows = model.steps * (row_macs(model, tokens) + time_macs(model))
    return rows + attention * attention_macs(model, tokens, tokens)


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
