"""Arrays of files that are read one at a time, when they are asked for: shapes and types are known before."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

# safetensors' names of the types that weights have; others (8-bit ones need scales that we do not know) are refused.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array that has not been read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Tensors(Mapping[str, np.ndarray]):
    """Arrays by name, read from disk each time one is asked for.

    Attributes:
        stored: what is known of each without reading it.
        metadata: words that the file has beside its arrays.
    """

    def __init__(self, stored: Mapping[str, Stored], metadata: Mapping[str, str] | None = None):
        self.stored = dict(stored)
        self.metadata = dict(metadata or {})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.stored.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        return {name: array.dtype for name, array in self.stored.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.stored[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read it
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def shapes_of(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shapes by name; nothing is read."""
    if isinstance(tensors, Tensors):
        return tensors.shapes
    return {name: np.shape(array) for name, array in tensors.items()}


def dtypes_of(tensors: Mapping[str, np.ndarray]) -> dict[str, np.dtype]:
    """Types by name; nothing is read."""
    if isinstance(tensors, Tensors):
        return tensors.dtypes
    return {name: np.asarray(array).dtype for name, array in tensors.items()}


def joined(tensors: Mapping[str, np.ndarray], names: Sequence[str]) -> Stored:
    """One array whose rows are those of some, one after the other; nothing is read until it is asked for."""
    parts = [_stored(tensors, name) for name in names]
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = np.result_type(*(part.dtype for part in parts))
    return Stored(shape, dtype, lambda: np.concatenate([part.read() for part in parts]))


def _stored(tensors: Mapping[str, np.ndarray], name: str) -> Stored:
    if isinstance(tensors, Tensors):
        return tensors.stored[name]
    array = np.asarray(tensors[name])
    return Stored(array.shape, array.dtype, lambda: array)
