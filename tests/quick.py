"""Running small things once: compiling takes far longer than the work."""

from collections.abc import Callable
from typing import Any

import jax

OPTIONS = {"xla_backend_optimization_level": 0}


def quick_jit(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`jax.jit` that compiles in half the time, to slower code for the same numbers."""
    return jax.jit(function, compiler_options=OPTIONS, **settings)


# Why a test that compares with another implementation is skipped.
ORACLES = "needs the oracles: pip install torch==2.13.0, then pip install '.[oracles]'"
