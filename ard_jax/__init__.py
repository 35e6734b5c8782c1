"""Autoregressive distillation of diffusion transformers in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["ARDPipeline"]


def __getattr__(name: str) -> Any:
    """`ARDPipeline`, imported when it is first asked for: the command line answers mistakes before jax is there."""
    if name == "ARDPipeline":
        from ard_jax.pipeline import ARDPipeline

        return ARDPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
