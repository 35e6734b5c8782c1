"""Timing that stands comparison.

What is compared runs in turn, A B C A B C …, so that a machine whose speed drifts does so for all alike, and ratios are
taken within a turn.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ard_jax.chips import measured_matmul_rate

LEAST_TURNS = 2


class Turns:
    """Seconds of several runs, turn by turn.

    Attributes:
        seconds: name → (turn,); the mean where a run comes several times a turn.
        rates: FLOP/s of a large matrix product in each turn, (turn,).
    """

    def __init__(self, seconds: Mapping[str, Sequence[float]], rates: Sequence[float]):
        self.seconds = {name: np.asarray(values) for name, values in seconds.items()}
        self.rates = np.asarray(rates)

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def rate(self) -> float:
        return float(np.median(self.rates))

    def utilisation(self, name: str, flops: float) -> float:
        """Of the matrix-product rate, for a run of so many FLOPs."""
        return flops / self.median(name) / self.rate()

    def ratio(self, slow: str, fast: str) -> np.ndarray:
        """(turn,)"""
        return self.seconds[slow] / self.seconds[fast]


def in_turns(
    runs: Mapping[str, Callable[[], Any]], dtype: Any, seconds: float, turn: Sequence[str] | None = None
) -> Turns:
    """Times runs, and a matrix product, in turn.

    Args:
        runs: name → a function that returns device arrays, compiled before.
        dtype: compute type of the matrix product.
        seconds: turns are started until so many have passed, but at least `LEAST_TURNS`.
        turn: the names in the order of a turn, short runs more than once if need be; each once by default.
    """
    for run in runs.values():  # the first call finds its memory, which later ones have
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    rates, end = [], time.perf_counter() + seconds
    while len(rates) < LEAST_TURNS or time.perf_counter() < end:
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for name in turn or runs:
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            taken[name].append(time.perf_counter() - start)
        for name, values in taken.items():
            times[name].append(sum(values) / len(values))
        rates.append(measured_matmul_rate(dtype))
    return Turns(times, rates)


def spread(values: Any, digits: int = 2) -> str:
    """Median and, in brackets, least and greatest."""
    return f"{np.median(values):.{digits}f} ({np.min(values):.{digits}f}–{np.max(values):.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
