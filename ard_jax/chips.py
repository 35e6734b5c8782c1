"""What one chip can do at best: of the accelerators that we know, by their data sheets; of others, measured."""

import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GIB = 2**30


class Chip(NamedTuple):
    """Peaks of one chip.

    Attributes:
        flops: dense bf16 FLOP/s.
        hbm_bytes: memory that a program may use; of TPUs what libtpu's compiler hands out, a little less than is there.
        hbm_bandwidth: bytes/s between that memory and the cores.
        ici_bandwidth: bytes/s that it can send to other chips, over all its links together.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float


# TPU: Google Cloud's system-architecture pages of v4, v5e, v5p and v6e (docs.cloud.google.com/tpu/docs/v5e and so on);
# links: "all-reduce bandwidth per Pod" over the Pod's chips, of v5p its 4800 Gbps a chip. hbm_bytes: the limit that
# libtpu 0.0.42 names when a program is too large. NVIDIA: the data sheets of A100, H100 and H200, without sparsity;
# SXM where the name says nothing; links: half of NVLink's two-way rate, which PCIe and NVL have by bridges.
CHIPS = {
    "v4": Chip(flops=275e12, hbm_bytes=30.75 * GIB, hbm_bandwidth=1200e9, ici_bandwidth=269e9),
    "v5e": Chip(flops=197e12, hbm_bytes=15.75 * GIB, hbm_bandwidth=819e9, ici_bandwidth=200e9),
    "v5p": Chip(flops=459e12, hbm_bytes=95.74 * GIB, hbm_bandwidth=2765e9, ici_bandwidth=600e9),
    "v6e": Chip(flops=918e12, hbm_bytes=31.25 * GIB, hbm_bandwidth=1638e9, ici_bandwidth=400e9),
    "A100": Chip(flops=312e12, hbm_bytes=80e9, hbm_bandwidth=2039e9, ici_bandwidth=300e9),
    "A100 40GB": Chip(flops=312e12, hbm_bytes=40e9, hbm_bandwidth=1555e9, ici_bandwidth=300e9),
    "H100": Chip(flops=989e12, hbm_bytes=80e9, hbm_bandwidth=3350e9, ici_bandwidth=450e9),
    "H100 PCIe": Chip(flops=756e12, hbm_bytes=80e9, hbm_bandwidth=2000e9, ici_bandwidth=300e9),
    "H100 NVL": Chip(flops=835e12, hbm_bytes=94e9, hbm_bandwidth=3900e9, ici_bandwidth=300e9),
    "H200": Chip(flops=989e12, hbm_bytes=141e9, hbm_bandwidth=4800e9, ici_bandwidth=450e9),
    "H200 NVL": Chip(flops=835e12, hbm_bytes=141e9, hbm_bandwidth=4800e9, ici_bandwidth=450e9),
}

# By the whole of `jax.Device.device_kind`: what is called a little otherwise, such as a part of a GPU (MIG), has other
# peaks, which are measured.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200 NVL",
}


# Multiplications and additions a chip does while it fetches a byte, above which XL/2's step is faster if the backward
# pass computes everything again, rather than keep matrix products and fetch them: planned with both, they cross at 300.
FETCHES_SLOWLY = 300


def fetches_slowly(chip: Chip | None) -> bool:
    """Whether activations had better be computed again than fetched; of chips that are not known, no."""
    return chip is not None and chip.flops / chip.hbm_bandwidth > FETCHES_SLOWLY


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, None for one that is not in the table."""
    return CHIPS.get(KINDS.get(device_kind, ""))


def measured_matmul_rate(
    dtype: jax.typing.DTypeLike = jnp.float32, size: int | None = None, seconds: float = 0.3
) -> float:
    """FLOP/s of a large square matrix product on the default device: the ceiling where no data sheet gives one.

    Args:
        dtype: of its factors; float32 ones are multiplied as the networks' are, in JAX's default precision.
        size: of its side; 2048 on a CPU, and 8192 elsewhere, where a smaller one would not fill the device.
        seconds: how long to try; the best product counts.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    multiply = jax.jit(jnp.dot)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)  # of ones, it would be an eighth faster on GPUs
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
    if device.platform == "cpu":  # its devices share its cores
        # So short a product that some are not interrupted by a training's other threads, which read meanwhile: on a
        # single core, half as fast was found with one of 2048.
        return measured_matmul_rate(size=512) * jax.process_count()
    return measured_matmul_rate(jnp.bfloat16) * jax.device_count()  # as the table's are


def processors() -> list[int]:
    """Those that this process may run on, by number."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
