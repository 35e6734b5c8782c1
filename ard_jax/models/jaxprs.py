"""Reading a traced computation: what it multiplies, counted as often as it runs, without running or compiling it."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class Product(NamedTuple):
    """A matrix product: shapes of both sides, multiply-accumulates of one run, and how often it runs."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    macs: int
    times: int


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every innermost equation of a jaxpr and how often it runs.

    The body of a scan counts once a turn, that of a Pallas kernel once a cell of its grid; of a conditional the branch
    that multiplies most; the body of a loop whose turns are not known before it runs counts once.
    """
    for equation in jaxpr.eqns:
        inner = [part for value in equation.params.values() for part in _parts(value)]
        if equation.primitive.name == "cond":
            inner = [max(inner, key=macs)]
        for part in inner:
            yield from equations(part, times * _turns(equation))
        if not inner:
            yield equation, times


def _turns(equation: Any) -> int:
    """How often the inner computations of an equation run."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    return 1


def _parts(value: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameter."""
    for item in value if isinstance(value, tuple | list) else (value,):
        item = getattr(item, "jaxpr", item)
        if hasattr(item, "eqns"):
            yield item


def products(jaxpr: Any) -> Iterator[Product]:
    """Every matrix product of a jaxpr."""
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            left, right = (tuple(variable.aval.shape) for variable in equation.invars)
            contracted = equation.params["dimension_numbers"][0][0]
            macs = math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            yield Product(left, right, macs, times)


def macs(jaxpr: Any) -> int:
    """Multiply-accumulates of all matrix products of a jaxpr; those of rematerialisation are among them."""
    return sum(product.macs * product.times for product in products(jaxpr))
