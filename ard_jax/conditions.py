"""Conditions on the host: a number is drawn, stored, counted and shown; its arrays are what a network is told.

A class's arrays are its number; those of a caption are rows of a table. Stores and trajectories keep the number alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from ard_jax.keys import wrap_key
from ard_jax.types import Batch, PyTree


class Conditions(Protocol):
    """All conditions that there are, numbered from 0."""

    def __len__(self) -> int:
        """How many there are."""

    @property
    def for_training(self) -> int:
        """How many of them, the first ones, may be trained on: the others are held out."""

    @property
    def in_memory(self) -> bool:
        """Whether `rows` reads nothing, so that no thread need call it ahead."""

    def rows(self, numbers: np.ndarray) -> PyTree:
        """What a network is told: numbers (batch,) → a pytree of NumPy arrays (batch, …), see `models.backbone`."""

    def words(self, number: int) -> str:
        """A condition for people."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """Classes: what a network is told of one is its number.

    Attributes:
        count: of classes.
        names: of all of them, or () where they are not known.
    """

    count: int
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count

    @property
    def for_training(self) -> int:
        """All."""
        return self.count

    @property
    def in_memory(self) -> bool:
        """Always."""
        return True

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """int32 (batch,)."""
        return np.asarray(numbers, np.int32)

    def words(self, number: int) -> str:
        return self.names[number] if self.names else str(number)


def draw_numbers(key: jax.Array, indices: np.ndarray, count: int) -> np.ndarray:
    """Condition number i, uniform over `count` of them: a function of (key, i) alone, as `sampling.draw_noise` is.

    It is computed on the host's CPU, so that it never waits for the program that a device is running.

    Args:
        key: `sampling.trajectory_key` or `sampling_key`.
        indices: (batch,), unsigned integers.
        count: how many conditions there are.

    Returns:
        int32 (batch,).
    """
    with jax.default_device(_host_device()):
        data = np.asarray(jax.random.key_data(key))
        return np.asarray(_draw(data, np.asarray(indices).astype(np.uint32), count))


@functools.partial(jax.jit, static_argnums=2)
def _draw(key_data: jax.Array, indices: jax.Array, count: int) -> jax.Array:
    key = wrap_key(key_data)

    def draw(index):
        _, number_key = jax.random.split(jax.random.fold_in(key, index))  # the other half is the noise's
        return jax.random.randint(number_key, (), 0, count)

    return jax.vmap(draw)(indices)


@functools.cache
def _host_device() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None


def with_conditions(
    batch: Batch, conditions: Conditions, numbers: Callable[[np.ndarray], np.ndarray] | None = None
) -> Batch:
    """A batch with the arrays of its conditions, "condition", beside their numbers, "label".

    Args:
        batch: with "position" (batch,), and "label" (batch,) if there are no `numbers`.
        conditions: what the numbers stand for.
        numbers: positions in the stream (batch,) → numbers, where the records have none.
    """
    label = numbers(batch["position"]) if numbers else batch["label"]
    return {**batch, "label": label, "condition": conditions.rows(label)}
