"""Reading a traced function: what it multiplies and what it holds, without running or compiling it."""

from collections.abc import Iterator
from typing import Any

import jax

from ard_jax.models import jaxprs


def traced(function: Any, *args: Any) -> Any:
    return jax.make_jaxpr(function)(*args).jaxpr


def products(function: Any, *args: Any) -> Iterator[jaxprs.Product]:
    """Every matrix product: shapes of both sides, multiply-accumulates of one run, number of runs."""
    yield from jaxprs.products(traced(function, *args))


def macs(function: Any, *args: Any) -> int:
    """Multiply-accumulates of all matrix products."""
    return jaxprs.macs(traced(function, *args))


def shapes(function: Any, *args: Any) -> set[tuple[int, ...]]:
    """Shapes of every intermediate and result."""
    found = jaxprs.equations(traced(function, *args))
    return {tuple(variable.aval.shape) for equation, _ in found for variable in equation.outvars}
