"""Types that many rooms hand on."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

PyTree: TypeAlias = Any  # arrays, or what stands for them, in containers nested in any way
Params: TypeAlias = Mapping[str, PyTree]  # parameters of a network, by the names of its modules
Batch: TypeAlias = dict[str, PyTree]  # by name, leaves (batch, …)


class Caption(NamedTuple):
    """The condition of a network that is told words: of each example (batch), arrays or their shapes.

    Attributes:
        tokens: vectors of a text encoder, (batch, token, channel).
        mask: which of them are the caption's own, (batch, token), bool or 0 and 1; one at least.
        null: of the empty caption, (batch, vector, channel), which guidance and caption dropout need: its own vectors,
            and last the one that pads it. None where neither is asked for.
        size: (height, width) that a network which is told its images' size shall be told, in pixels, (batch, 2); None
            for those of the images.
    """

    tokens: PyTree
    mask: PyTree
    null: PyTree = None
    size: PyTree = None


class Batches(Protocol):
    """An endless stream of batches that can be resumed, as Grain's iterators can."""

    def __next__(self) -> Batch:
        """The next batch, or of several sources a dict of such."""

    def get_state(self) -> PyTree:
        """Its place, which JSON can hold."""

    def set_state(self, state: PyTree) -> None:
        """Goes on from there."""
