"""What the pages show beside text: pictures, rows of them, and charts, as records that the templates lay out."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ard_jax.picture_grid import check_images
from ard_jax.report import figures, words
from ard_jax.report.figures import SHOWN_SIDE, Series
from ard_jax.results import Measured

DIFFERENCE_GAIN = 3  # an error of 10 in 255 is plain in numbers and invisible on a screen


class Picture(NamedTuple):
    """An image that holds its own data, and what it says where it cannot be seen."""

    src: str
    alt: str


class Chart(NamedTuple):
    """An SVG, and the lines that its legend names, if it has one."""

    caption: str
    svg: str
    legend: Sequence[Series] = ()


class Row(NamedTuple):
    """Images of one model; if the title is None, what parts those of the row above from the teacher's."""

    title: str | None
    fd: float | None
    pictures: Sequence[Picture]


class FinalImages(NamedTuple):
    """Rows of final images, a column a noise. Labels may be fewer than columns, or None."""

    columns: int
    labels: Sequence[str] | None
    rows: Sequence[Row]
    differences: bool
    gain: int = DIFFERENCE_GAIN


class PictureGrid(NamedTuple):
    """Pictures under headings, whose first stands over the rows' titles; a title or a picture may be None."""

    heads: Sequence[str]
    rows: Sequence[tuple[str | None, Sequence[Picture | None]]]


def picture(image: np.ndarray, alt: str, side: int = SHOWN_SIDE) -> Picture:
    """Of a uint8 image (H, W, C), which is reduced to `side` pixels where it is larger."""
    return Picture(f"data:image/png;base64,{base64.b64encode(figures.cell_png(image, side)).decode('ascii')}", alt)


def charts(drawn: Mapping[str, tuple[str, Sequence[Series]]], xlabel: str, ylabel: str, **options: bool) -> list[Chart]:
    """Those that have a finite point, of charts by their id, each a caption and its lines."""
    svgs = {name: figures.line_chart(name, series, xlabel, ylabel, **options) for name, (_, series) in drawn.items()}
    return [Chart(drawn[name][0], svg, drawn[name][1]) for name, svg in svgs.items() if svg is not None]


def final_images(
    models: Mapping[str, Measured],
    pictures: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    differences: bool = True,
) -> FinalImages:
    """The last images of the teacher and of these students, and if asked what parts each student from the teacher.

    Args:
      models, pictures: as `page.build_report` takes them.

    Raises:
      UserError: if a picture is not uint8 or not of the stated shape.
    """
    titles = words.titles(models)
    finals = {name: check_images(np.asarray(pictures[name])[:, -1]) for name in ("teacher", *names) if name in pictures}
    columns = min(figures.shown(images) for images in finals.values())
    rows = []
    for name, images in finals.items():
        title, images = titles[name], images[:columns]
        shown = [picture(image, f"{title}, sample {i + 1}") for i, image in enumerate(images)]
        rows.append(Row(title, models[name].fd, shown))
        if differences and name != "teacher" and "teacher" in finals:
            apart = np.abs(images.astype(int) - finals["teacher"][:columns]) * DIFFERENCE_GAIN
            apart = np.minimum(apart, 255).astype(np.uint8)
            shown = [picture(image, f"{title}, difference, sample {i + 1}") for i, image in enumerate(apart)]
            rows.append(Row(None, None, shown))
    given = pictures.get("label")
    labels = None if given is None else [str(label) for label in np.asarray(given)[:columns]]
    return FinalImages(columns, labels, rows, differences)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown, numbers to the right of its first column; no newline at its end."""
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
