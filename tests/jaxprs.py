"""Reading a traced computation: what it multiplies and what it holds, without running or compiling it."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every innermost equation and how often it runs; loop bodies count once a turn."""
    for equation in jaxpr.eqns:
        inner = [part for value in equation.params.values() for part in parts(value)]
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        assert equation.primitive.name not in ("cond", "while"), "how often it runs is not known"
        for part in inner:
            yield from equations(part, times * turns)
        if not inner:
            yield equation, times


def parts(value: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameter."""
    for item in value if isinstance(value, tuple | list) else (value,):
        item = getattr(item, "jaxpr", item)
        if hasattr(item, "eqns"):
            yield item


def products(function: Any, *args: Any) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int, int]]:
    """Every matrix product: shapes of both sides, multiply-accumulates of one run, number of runs."""
    for equation, times in equations(jax.make_jaxpr(function)(*args).jaxpr):
        if equation.primitive.name == "dot_general":
            left, right = (tuple(variable.aval.shape) for variable in equation.invars)
            contracted = equation.params["dimension_numbers"][0][0]
            size = int(np.prod(equation.outvars[0].aval.shape)) * int(np.prod([left[axis] for axis in contracted]))
            yield left, right, size, times


def macs(function: Any, *args: Any) -> int:
    """Multiply-accumulates of all matrix products."""
    return sum(size * times for _, _, size, times in products(function, *args))


def shapes(function: Any, *args: Any) -> set[tuple[int, ...]]:
    """Shapes of every intermediate and result."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return {tuple(variable.aval.shape) for equation, _ in equations(jaxpr) for variable in equation.outvars}
