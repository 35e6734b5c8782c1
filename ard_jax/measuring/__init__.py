"""Samples of a model held against real images: `open_yardstick`, then its `measure` for each set of samples."""

from ard_jax.measuring.drawn import draw_samples
from ard_jax.measuring.parts import forget_parts, make_parts, read_parts
from ard_jax.measuring.samples import Held, Samples, Yardstick, read_samples
from ard_jax.measuring.yardstick import open_yardstick

__all__ = [
    "Held",
    "Samples",
    "Yardstick",
    "draw_samples",
    "forget_parts",
    "make_parts",
    "open_yardstick",
    "read_parts",
    "read_samples",
]
