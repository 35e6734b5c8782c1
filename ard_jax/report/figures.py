"""Pictures of a page (Pillow) and charts (matplotlib, as SVG that follows the page's colours)."""

import io
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from ard_jax.errors import UserError
from ard_jax.picture_grid import GUTTER, check_images, enlarge, image_grid, to_pillow
from ard_jax.report import words
from ard_jax.results import Measured, Results, main_target, objective_of, pair

CURVE_POINTS = 300  # more cannot be told apart at the width of a chart
SHOWN_SIDE = 160  # pictures on the page are never drawn larger, and the page has to stay mailable

# CSS variable → (light, dark). Charts are drawn in the light colours, then told to follow the variable.
PALETTE = {
    "paper": ("#fcfcfb", "#14161a"),
    "ink": ("#1c1f24", "#e4e6ea"),
    "soft": ("#5f6671", "#9ba3af"),
    "rule": ("#e2e4e8", "#2c3138"),
    "teacher": ("#6b7280", "#a3abb8"),
    "ard": ("#2458a8", "#7caaf2"),
    "step": ("#c4601a", "#f0a263"),
    "other1": ("#1b7d76", "#62c4ba"),
    "other2": ("#8b4ea6", "#c996e0"),
    "other3": ("#a63a55", "#ee8fa6"),
    "other4": ("#7d6b0f", "#d3c15a"),
    "other5": ("#6b4a34", "#c7a188"),
}


class Series(NamedTuple):
    """One line of a chart: its words, its colour (a name of `PALETTE`), its points."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def _png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _shrink(image: np.ndarray, side: int = SHOWN_SIDE) -> np.ndarray:
    """(H, W, C) with its longer side brought down to `side`; smaller pictures stay as they are."""
    if max(image.shape[:2]) <= side:
        return image
    picture = to_pillow(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(picture.height, picture.width, image.shape[-1])


def cell_png(image: np.ndarray, side: int = SHOWN_SIDE) -> bytes:
    """PNG of one picture (H, W, C) for the page: tiny ones enlarged by whole pixels, large ones reduced."""
    return _png_bytes(to_pillow(enlarge(_shrink(check_images(image[None])[0], side)[None], 64)[0]))


def shown(images: np.ndarray) -> int:
    """How many pictures of (N, H, W, C) fit side by side on the page and still say something."""
    return min(len(images), 16 if max(images.shape[1:3]) <= 64 else 8)


def teaser(
    pictures: Mapping[str, np.ndarray], results: Results, gallery: Mapping[str, np.ndarray] | None = None
) -> bytes:
    """One picture for a README: teacher, step distillation and ARD (x0 points), a column a sample from the same noise.

    Where there is neither of the two, the first student of another objective stands in for them. With captions, which
    stand under the columns, every model is shown.

    Args:
      pictures, results, gallery: as `page.build_report` takes them.

    Returns:
      PNG bytes.

    Raises:
      UserError: if the pictures of the teacher or of all such students are missing.
    """
    models = results.models
    if gallery:
        shown_rows = np.flatnonzero(~gallery["held_out"])[:7], np.flatnonzero(gallery["held_out"])[:3]
        columns = np.concatenate(shown_rows)
        titles = words.titles(models)
        rows = {
            title: (_row_note(models[name]), np.asarray(gallery[name])[columns])
            for name, title in titles.items()
            if name in gallery
        }
        return captioned_rows(rows, [str(label) for label in gallery["label"][columns]])
    names = [name for name in ("teacher", *pair(models, main_target(models))) if name and name in pictures]
    if names == ["teacher"]:
        rivals = (name for name, model in models.items() if objective_of(model) != "ard" and name in pictures)
        names += [*rivals][:1]
    if "teacher" not in names or len(names) < 2:
        raise UserError(
            "The README picture needs those of the teacher and of a student with x0 points, and got "
            f"{sorted(pictures)}: evaluate them first."
        )
    finals = [check_images(np.asarray(pictures[name])[:, -1]) for name in names]
    count = min(12, *(shown(images) for images in finals))
    strips = []
    for images in finals:
        small = np.stack([_shrink(image, 128) for image in images[:count]])
        strips.append(np.asarray(image_grid(small, count, side=96).convert("RGB")))
    known = words.titles({"teacher": Measured(kind="teacher"), **models})
    return _titled_rows([(known[name], _row_note(models.get(name, Measured()))) for name in names], strips)


def _row_note(model: Measured) -> str:
    calls, fd = model.network_calls, model.fd
    parts = [f"{words.number(calls, ',.0f')} calls" if calls is not None else "", f"FD {words.distance(fd)}"]
    return " · ".join(part for part in parts if part)


def captioned_rows(rows: Mapping[str, tuple[str, np.ndarray]], captions: Sequence[str]) -> bytes:
    """One picture: a row a model, a column a caption, which stands under it.

    Args:
      rows: title of the model → a note of a few words, and uint8 images (caption, H, W, C).
      captions: of the columns.

    Returns:
      PNG bytes.

    Raises:
      UserError: if a row is not uint8 or not of the stated shape.
    """
    strips = []
    for _, images in rows.values():
        small = np.stack([_shrink(image, 128) for image in check_images(images)])
        strips.append(np.asarray(image_grid(small, len(captions), side=128).convert("RGB")))
    titles = [(title, note) for title, (note, _) in rows.items()]
    feet = [textwrap.fill(caption, 15) for caption in captions]
    return _titled_rows(titles, strips, feet)


def _titled_rows(titles: Sequence[tuple[str, str]], strips: Sequence[np.ndarray], feet: Sequence[str] = ()) -> bytes:
    """PNG of strips (h, w, 3) under each other, pixel for pixel, each with a title and a note on its left.

    `feet` are words under the pictures of the last strip, which then has as many.
    """
    dpi, margin, gap, left = 144, 24, 14, 330
    height, width = strips[0].shape[:2]
    foot = 10 + 17 * max((words.count("\n") + 1 for words in feet), default=0) if feet else 0
    full_width, full_height = left + width + margin, 2 * margin + len(strips) * (height + gap) - gap + foot
    figure = Figure(figsize=(full_width / dpi, full_height / dpi), dpi=dpi, facecolor="white")
    for row, ((title, note), strip) in enumerate(zip(titles, strips, strict=True)):
        bottom = full_height - margin - height - row * (height + gap)
        figure.figimage(strip, left, bottom)
        middle = (bottom + height / 2) / full_height
        ink, soft = PALETTE["ink"][0], PALETTE["soft"][0]
        left_edge = margin / full_width
        figure.text(left_edge, middle + 4 / full_height, title, size=11.5, weight="bold", color=ink, parse_math=False)
        figure.text(left_edge, middle - 6 / full_height, note, size=9.5, va="top", color=soft, parse_math=False)
    for column, said in enumerate(feet):
        middle = (left + (column + 0.5) * (width + GUTTER) / len(feet)) / full_width
        top = (margin + foot - 6) / full_height
        soft = PALETTE["soft"][0]
        figure.text(middle, top, said, size=8, ha="center", va="top", color=soft, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def block_maps(name: str, mass: np.ndarray) -> str:
    """Inline SVG of `attention_mass` (layer, query block, key block): a square a layer, a row a query block.

    The shares are written into their cells in percent; a block that is not seen has no cell.
    """
    layers, steps, _ = mass.shape
    across = 2  # always, so that a cell has one size on a page
    down = -(-layers // across)
    side = max(1.5, 0.5 * steps)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11}):
        figure = Figure(
            figsize=(across * (side + 0.65), down * (side + 0.65)), layout=ConstrainedLayoutEngine(h_pad=0.12)
        )
        axes = figure.subplots(down, across, squeeze=False).reshape(-1)
        for layer, own in enumerate(axes):
            if layer < layers:
                block_map(own, mass[layer], f"layer {layer + 1}")
            else:
                own.set_axis_off()
        return _inline_svg(figure, name, f"attention of {steps} blocks to each other in {layers} layers, in percent")


def block_map(axes: Axes, mass: np.ndarray, title: str, written: bool = True) -> None:
    """Draws (query block, key block) as cells, with their shares in percent if they are to be written."""
    ink, soft, paper, fill = (PALETTE[name][0] for name in ("ink", "soft", "paper", "ard"))
    for query, key in zip(*np.nonzero(mass > 0), strict=True):
        share = float(mass[query, key])
        axes.add_patch(
            Rectangle((key, query), 0.96, 0.96, facecolor=fill, alpha=min(0.08 + 0.92 * share, 1.0), linewidth=0)
        )
        colour, said = paper if share > 0.5 else ink, f"{100 * share:.0f}" if written else ""
        axes.text(key + 0.48, query + 0.48, said, ha="center", va="center", size=10, color=colour)
    steps = len(mass)
    names = ["noise", *(str(step) for step in range(1, steps))]
    axes.set(xlim=(0, steps), ylim=(steps, 0), aspect="equal")
    axes.set_title(title, size=11, color=ink)
    axes.set_xticks(np.arange(steps) + 0.48, names)
    axes.set_yticks(np.arange(steps) + 0.48, names)
    axes.tick_params(colors=soft, labelcolor=soft, length=0, pad=3, labelsize=9)
    axes.spines[:].set_visible(False)


def thin(rows: Sequence[Mapping]) -> tuple[list[float], list[float]]:
    """Steps and losses of the rows that have both finite, as means over equal runs of them where there are many."""
    points = [
        (row["step"], row["loss"]) for row in rows if words.finite(row.get("step")) and words.finite(row.get("loss"))
    ]
    runs = np.array_split(np.asarray(points, float).reshape(-1, 2), min(len(points), CURVE_POINTS) or 1)
    means = [run.mean(axis=0) for run in runs if len(run)]
    return [float(step) for step, _ in means], [float(loss) for _, loss in means]


def line_chart(
    name: str, series: Sequence[Series], xlabel: str, ylabel: str, *, log: bool = False, markers: bool = False
) -> str | None:
    """Inline SVG of the finite points of `series`; None if there are none.

    Args:
      name: told apart from the other charts of the page by this; its ids begin with it.
      log: logarithmic vertical axis (values that are not positive are left out, having no place on it).
      markers: for few points at whole numbers, such as the steps of a student.
    """
    kept = [_drawable(line, log) for line in series]
    if not any(len(line.x) for line in kept):
        return None
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11}):
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        if log:
            axes.set_yscale("log")
        for line in kept:
            style: dict[str, Any] = {"linestyle": (0, (4, 2.4)) if line.dashed else "-"}
            style["marker"] = "o" if markers else None
            axes.plot(line.x, line.y, color=PALETTE[line.colour][0], linewidth=1.7, markersize=4.5, **style)
        dress(axes, xlabel, ylabel, log, markers)
        return _inline_svg(figure, name, f"{ylabel} by {xlabel}: {', '.join(line.label for line in kept)}")


def _drawable(line: Series, log: bool) -> Series:
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    keep = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log))
    return line._replace(x=x[keep], y=y[keep])


def dress(axes: Axes, xlabel: str, ylabel: str, log: bool, whole: bool) -> None:
    """Axes that stay behind the data: no frame, thin rules, plain numbers."""
    ink, soft, rule = (PALETTE[name][0] for name in ("ink", "soft", "rule"))
    axes.set_xlabel(xlabel, color=soft)
    axes.set_ylabel(ylabel, color=soft)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(soft)
    axes.grid(axis="y", color=rule, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=soft, labelcolor=ink, length=0, pad=5)
    axes.margins(x=0.03)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if log:
        low, high = axes.get_ylim()
        subs = (1, 1.5, 2, 3, 5, 7) if high / low < 6 else (1, 2, 5) if high / low < 200 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=10) if high / low > 2 else MaxNLocator(4))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def _inline_svg(figure: Figure, name: str, label: str) -> str:
    """matplotlib's SVG file as an element of an HTML page: no namespaces, ids of its own, the page's colours."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue().replace("xlink:href", "href"))
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith("}style"):  # its rule for `*` would reach the whole page
                parent.remove(child)
        parent.tag = parent.tag.rpartition("}")[2]
        for key, value in list(parent.attrib.items()):
            if key == "id":
                parent.set(key, f"{name}-{value}")
            elif key == "href":
                parent.set(key, f"#{name}-{value[1:]}")
            else:
                parent.set(key, value.replace("url(#", f"url(#{name}-"))
    for key in ("width", "height"):
        root.attrib.pop(key)
    root.set("role", "img")
    root.set("aria-label", label)
    inline = ElementTree.tostring(root, encoding="unicode")
    for variable, (light, _) in PALETTE.items():
        inline = inline.replace(light, f"var(--{variable})")
    return inline
