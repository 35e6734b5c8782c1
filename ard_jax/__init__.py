"""Autoregressive distillation of diffusion transformers in JAX."""

from typing import Any

from ard_jax.version import __version__

__all__ = ["ARDPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """`ARDPipeline`, imported when it is first asked for: the command line answers mistakes before jax is there."""
    if name == "ARDPipeline":
        from ard_jax.pipeline import ARDPipeline

        return ARDPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
