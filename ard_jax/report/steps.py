"""The steps that lead to the first few samples, of the teacher and of its students."""

from collections.abc import Mapping, Sequence

import numpy as np

from ard_jax.report import pieces, words
from ard_jax.report.pieces import Picture, PictureGrid
from ard_jax.results import Measured


def progressions(
    models: Mapping[str, Measured], pictures: Mapping[str, np.ndarray], names: Sequence[str], target: str
) -> list[PictureGrid]:
    """For the first few samples: the noise and every step, a row a model, under the sample's caption if it has one."""
    titles = words.titles(models)
    shown = {titles[name]: np.asarray(pictures[name]) for name in names}
    teacher = _teacher_points(pictures, target)
    rows = ({titles["teacher"]: teacher} if teacher is not None else {}) | shown
    steps = max(points.shape[1] for points in rows.values())
    count = min(4 if target == "x0" else 2, *(len(points) for points in rows.values()))
    labels = np.asarray(pictures.get("label", ()))
    captions = labels if labels.dtype.kind == "U" else [""] * count
    return [_progression(str(captions[place]), rows, pictures.get("noise"), steps, place) for place in range(count)]


def _teacher_points(pictures: Mapping[str, np.ndarray], target: str) -> np.ndarray | None:
    """The teacher's points (n, S, H, W, C) of this kind; of both kinds the last one is the image."""
    if target == "xt" and "teacher_xt" in pictures:
        return np.asarray(pictures["teacher_xt"])
    points = pictures.get("teacher")
    if points is None:
        return None
    return np.asarray(points) if target == "x0" else np.asarray(points)[:, -1:]


def _progression(
    caption: str, rows: Mapping[str, np.ndarray], noise: np.ndarray | None, steps: int, sample: int
) -> PictureGrid:
    start = [] if noise is None else [pieces.picture(np.asarray(noise)[sample], f"noise {sample + 1}")]
    heads = [caption, *(["noise"] if start else []), *(f"step {step}" for step in range(1, steps + 1))]
    placed = []
    for title, points in rows.items():
        own = points.shape[1]
        cells: list[Picture | None] = [None] * steps
        for step in range(own):
            # Fewer steps spread over the same trajectory: step s of S stands where the trajectory has got to.
            place = round((step + 1) * steps / own)
            alt = f"{title}, sample {sample + 1}, step {step + 1} of {own}"
            cells[place - 1] = pieces.picture(points[sample, step], alt)
        placed.append((words.short_title(title), [*start, *cells]))
    return PictureGrid(heads, placed)
