"""Types that many rooms hand on."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

PyTree: TypeAlias = Any  # arrays, or what stands for them, in containers nested in any way
Params: TypeAlias = Mapping[str, PyTree]  # parameters of a network, by the names of its modules
Batch: TypeAlias = dict[str, PyTree]  # by name, leaves (batch, …)


class Batches(Protocol):
    """An endless stream of batches that can be resumed, as Grain's iterators can."""

    def __next__(self) -> Batch:
        """The next batch, or of several sources a dict of such."""

    def get_state(self) -> PyTree:
        """Its place, which JSON can hold."""

    def set_state(self, state: PyTree) -> None:
        """Goes on from there."""
