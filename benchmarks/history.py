"""What history has to tell, of a trajectory store alone: python -m benchmarks.history FOLDER [--rows 1000] [--width 9]

On x0 points a step of the student sees the point before, and ARD's history layers bring back the noise. For each step
but the first, a linear map guesses what it has to add to that point, from a window of `width`² pixels around each, of
the point alone, and of the noise too. Prints the share of the variance that each explains of the last fifth of the
trajectories, to which it was not fitted. A gap between the two is history's for the taking; none does not prove that
there is nothing, since a network is no linear map and knows the condition. FOLDER is a workdir's trajectories/.
"""

import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from ard_jax.command_line import parse_flags
from ard_jax.errors import UserError
from ard_jax.files import local_path
from ard_jax.trajectories.store import Store, read_manifest
from benchmarks.measure import table

BATCH = 50  # trajectories whose windows are held at a time
RIDGE = 1e-9  # of the windows' mean square: pixels outside of a picture repeat those at its edge


def windows(images: np.ndarray, width: int) -> np.ndarray:
    """Each pixel's neighbours and 1, (batch · height · width, features); edges go on as they end."""
    before, after = width // 2, (width - 1) // 2
    padded = np.pad(images, ((0, 0), (before, after), (before, after), (0, 0)), mode="edge")
    views = np.lib.stride_tricks.sliding_window_view(padded, (width, width), axis=(1, 2))
    flat = views.reshape(np.prod(images.shape[:3]), -1)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def explained(inputs: Sequence[np.ndarray], target: np.ndarray, width: int) -> float:
    """Share of the variance of `target`, of its last fifth, that the best linear map of windows of `inputs` explains.

    Args:
        inputs: arrays (row, height, width, channel), whose windows are put side by side.
        target: (row, height, width, channel).
        width: of a window, in pixels.
    """

    def batches(rows: range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in rows[::BATCH]:
            part = slice(start, min(start + BATCH, rows.stop))
            shown = np.concatenate([windows(array[part].astype(np.float64), width) for array in inputs], axis=1)
            yield shown, target[part].astype(np.float64).reshape(len(shown), -1)

    fitted, rest = range(len(target) * 4 // 5), range(len(target) * 4 // 5, len(target))
    products = [(shown.T @ shown, shown.T @ wanted) for shown, wanted in batches(fitted)]
    gram, moments = (sum(parts) for parts in zip(*products, strict=True))
    solution = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), moments)
    left = sum(np.sum((wanted - shown @ solution) ** 2) for shown, wanted in batches(rest))
    held = target[rest.start :].astype(np.float64).reshape(-1, target.shape[-1])
    return float(1 - left / np.sum((held - held.mean(axis=0)) ** 2))


def describe(folder: pathlib.Path, rows: int, width: int) -> list[list[str]]:
    """A row of the table for each step but the first.

    Raises:
        UserError: there is no whole store in the folder, or a record cannot be read.
    """
    store = Store(folder, read_manifest(folder))
    records = [store[index] for index in range(min(rows, len(store)))]
    noise, x0 = (np.stack([record[name] for record in records]).astype(np.float32) for name in ("noise", "x0"))
    found = []
    for step in range(1, x0.shape[1]):
        before, added = x0[:, step - 1], x0[:, step] - x0[:, step - 1]
        alone, with_noise = explained([before], added, width), explained([before, noise], added, width)
        found.append([str(folder), str(step + 1), f"{np.mean(added**2):.4f}", f"{alone:.3f}", f"{with_noise:.3f}"])
    return found


FLAGS = {
    "folders": dict(nargs="+", metavar="FOLDER", help="whole trajectory stores"),
    "--rows": dict(type=int, default=1000, help="trajectories of each that are read, at least 5 (default: 1000)"),
    "--width": dict(type=int, default=9, help="pixels of a window's side, at least 1 (default: 9)"),
}


def main(arguments: list[str]) -> int:
    try:
        args = parse_flags(FLAGS, arguments, prog="python -m benchmarks.history", description=__doc__)
        if args.rows < 5 or args.width < 1:
            raise UserError(f"--rows is {args.rows} and --width {args.width}: give at least 5 and 1.")
        rows = [row for folder in args.folders for row in describe(local_path(folder), args.rows, args.width)]
    except UserError as error:
        print(f"benchmarks.history: {error}", file=sys.stderr)
        return 2
    print(table(("store", "step", "mean square of what it adds", "explained by the point", "by the noise too"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
