"""Features of many images, made in parts by all hosts: a part that is there is not made again."""

import logging
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from ard_jax.evaluation.npz import array_names
from ard_jax.files import read_json, read_npz, write_json, write_npz
from ard_jax.hosts import check_same_inputs, wait_for_all
from ard_jax.parallel import is_first
from ard_jax.progress import progress_bar

log = logging.getLogger("ard_jax")

PART = 2048  # images, which are lost if the stage is killed


class Rows(Protocol):
    """Images that are read a batch at a time, such as `NpzArray`."""

    def __len__(self) -> int: ...

    def batches(self, size: int, wanted: Callable[[int], bool], /) -> Iterable[Any]:
        """Batches of so many rows, those whose first row is wanted."""


def make_parts(
    look: Callable[[Iterator[Any]], Mapping[str, np.ndarray]],
    images: Rows,
    folder: pathlib.Path,
    of: Mapping[str, Any],
    batch_size: int,
    size: int = PART,
) -> list[pathlib.Path]:
    """Looks at images, `size` of them a part; process p of P makes every P-th part.

    Args:
        look: the batches of a part → arrays by name, of which a part's file is made.
        images: to look at.
        folder: of the parts, which all processes see.
        of: what the parts depend on, as JSON has it: those of anything else are made anew.
        batch_size: images of a batch; the last one of a part may have fewer.
        size: images of a part; it is rounded up to whole batches.

    Returns:
        The parts' files, npz, in the order of the images. They are the same however many processes made them.

    Raises:
        UserError: what they depend on is something else in another process.
    """
    of = {**of, "count": len(images), "size": (size := -(-size // batch_size) * batch_size)}
    path = folder / "of.json"
    check_same_inputs(of, folder)
    if is_first() and not (path.exists() and read_json(path) == of):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(path, of)
    wait_for_all(f"{folder} can be filled")
    parts = [folder / f"{start:09d}.npz" for start in range(0, len(images), size)]
    mine = range(jax.process_index(), len(parts), jax.process_count())
    missing = [number for number in mine if not parts[number].exists()]
    wanted = set(missing)
    if there := len(mine) - len(missing):
        log.info("%s: %d of %d parts are there already.", folder, there, len(mine))
    per_part = size // batch_size
    batches = iter(images.batches(batch_size, lambda start: start // size in wanted))
    with progress_bar(len(missing), "part") as bar:
        for number in missing:
            left = -(-min(size, len(images) - number * size) // batch_size)
            write_npz(parts[number], **look(next(batches) for _ in range(min(per_part, left))))
            bar.update()
    wait_for_all(f"{folder} is filled")
    return parts


def read_parts(parts: Iterable[pathlib.Path], without: str = "") -> Iterator[dict[str, np.ndarray]]:
    """The arrays of one part after the other, but for one of a name."""
    for part in parts:
        yield read_npz(part, [name for name in array_names(part) if name != without])


def forget_parts(folder: pathlib.Path) -> None:
    """Removes a folder of parts once all processes have read them."""
    wait_for_all(f"{folder} has been read")
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)
