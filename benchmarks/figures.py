"""python -m benchmarks.figures WORKDIR: the figures of docs/CONCEPTS.md, out of what a run of the quickstart measured.

They are written to docs/figures/, as PNG. Reads `evaluate/` alone.
"""

import pathlib
import sys
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from ard_jax.files import atomic_write, read_npz
from ard_jax.models.masks import MASKS, visible_blocks
from ard_jax.report.figures import PALETTE, block_map, dress
from ard_jax.results import Measured, Results, pair, read_results

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "docs" / "figures"
SAMPLE = 1  # whose pictures are shown
WIDTH, DPI = 8.2, 120  # inches, and pixels in one of them
INK, SOFT, PAPER, BLUE, ORANGE = (
    PALETTE[name][0] for name in ("ink", "soft", "paper", "ard", "step")
)  # fmt: skip


def main(workdir: str) -> None:
    results = read_results(pathlib.Path(workdir))
    pictures = read_npz(pathlib.Path(workdir) / "evaluate" / "pictures.npz")
    for name, figure in draw(results, pictures).items():
        atomic_write(FOLDER / f"{name}.png", lambda path, figure=figure: save(figure, path))


def draw(results: Results, pictures: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Every figure by its name; `pictures` as `report.build_report` takes them."""
    return {
        "trajectory": trajectory(results, pictures),
        "exposure": exposure(results),
        "masks": masks(len(points_of(results))),
        "attention": attention(students(results)["ARD"]),
        "student": student(results, pictures),
    }


def save(figure: Figure, path: pathlib.Path) -> None:
    for axes in figure.axes:
        axes.set_facecolor("none")
    figure.savefig(path, format="png", dpi=DPI, facecolor=PAPER, metadata={"Software": None})


def students(results: Results) -> dict[str, Measured]:
    """Step distillation and ARD with x0 points, by what they are called."""
    step, ard = pair(results.models, "x0")
    if step is None or ard is None:
        sys.exit(f"the figures need step distillation and ARD with x0 points, but there are {sorted(results.models)}.")
    return {"step distillation": results.models[step], "ARD": results.models[ard]}


def points_of(results: Results) -> tuple[int, ...]:
    """Respaced indices of a student's points."""
    return tuple((results.config or {})["student"]["points"])


def trajectory(results: Results, pictures: Mapping[str, np.ndarray]) -> Figure:
    """One trajectory of the teacher at a student's points: its noisy points above, its x0-predictions below."""
    steps = (results.config or {})["diffusion"]["steps"]
    shown = {
        "noisy points": [pictures["noise"][SAMPLE], *pictures["teacher_xt"][SAMPLE]],
        "x0-predictions": [None, *pictures["teacher"][SAMPLE]],
    }
    heads = [f"noise\n{steps} steps left", *(f"{point} steps left" for point in points_of(results))]
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    axes = figure.subplots(2, len(heads))
    for row, (title, images) in zip(axes, shown.items(), strict=True):
        for own, image in zip(row, images, strict=True):
            _picture(own, image)
        row[1 if images[0] is None else 0].set_ylabel(title, color=INK, size=11)
    for own, head in zip(axes[0], heads, strict=True):
        own.set_title(head, color=SOFT, size=10)
    return figure


def exposure(results: Results) -> Figure:
    """Left: error of each step, on the teacher's points and on the student's own. Right: what given points mend."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (title, model), colour in zip(students(results).items(), (ORANGE, BLUE), strict=True):
        for values, style, said in ((model.rollout_mse, "-", "its own points"), (model.forced_mse, "--", "teacher’s")):
            steps = range(1, len(values or ()) + 1)
            left.plot(steps, values or (), style, color=colour, marker="o", label=f"{title}, {said}")
        given = model.given_psnr or ()
        right.plot(range(len(given)), given, color=colour, marker="o", label=title)
    dress(left, "step", "mean squared error", log=True, whole=True)
    dress(right, "first points that are the teacher’s", "PSNR of the image, dB", log=False, whole=True)
    for own in (left, right):
        own.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def masks(blocks: int) -> Figure:
    """Which blocks each block sees, a square a mask."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    for own, mask in zip(figure.subplots(1, len(MASKS)), MASKS, strict=True):
        seen = np.zeros((blocks, blocks))
        for query in range(blocks):
            seen[query, list(visible_blocks(mask, query))] = 1
        block_map(own, seen, mask, written=False)
    figure.supxlabel("block that is looked at", size=10, color=SOFT)
    figure.supylabel("block that looks", size=10, color=SOFT)
    return figure


def attention(model: Measured) -> Figure:
    """Where the blocks of a student look, in percent, a square a history layer."""
    mass = np.asarray(model.attention_mass, float)
    figure = Figure(figsize=(WIDTH * 0.7, 3.2), layout="constrained")
    for layer, own in enumerate(figure.subplots(1, len(mass), squeeze=False)[0]):
        block_map(own, mass[layer], f"history layer {layer + 1}")
    figure.supxlabel("block that is looked at", size=10, color=SOFT)
    figure.supylabel("block that looks", size=10, color=SOFT)
    return figure


def student(results: Results, pictures: Mapping[str, np.ndarray]) -> Figure:
    """A student as it draws: a column a step, from the block that goes in to the prediction, which is the next one."""
    _, name = pair(results.models, "x0")
    own = [pictures["noise"][SAMPLE], *pictures[name or ""][SAMPLE]]
    depth, history = (results.config or {})["model"]["depth"], students(results)["ARD"].history_layers
    steps = len(own) - 1
    figure = Figure(figsize=(WIDTH, 4.9))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, steps + 0.62), ylim=(0, 5))
    axes.set_axis_off()
    for step in range(steps):
        x = step + 0.95
        seen = ["noise", *(f"{block}" for block in range(1, step + 1))]
        _inset(axes, x, 0.6, own[step], "noise" if step == 0 else f"block {step}")
        cached = ", ".join(seen[:-1]) or "nothing"
        _box(axes, x, 1.75, f"layers 1–{history}\ncache: {cached}", BLUE)
        _box(axes, x, 2.65, f"layers {history + 1}–{depth}", SOFT)
        _box(axes, x, 3.4, f"head {step + 1}", SOFT)
        _inset(axes, x, 4.3, own[step + 1], f"prediction {step + 1}", above=True)
        for low, high in ((1.0, 1.4), (2.1, 2.46), (2.84, 3.21), (3.59, 3.91)):
            _arrow(axes, (x, low), (x, high), SOFT)
        if step + 1 < steps:
            _arrow(axes, (x + 0.41, 1.75), (x + 0.59, 1.75), BLUE)
            axes.plot([x + 0.27, x + 0.5, x + 0.5, x + 0.6], [4.3, 4.3, 0.6, 0.6], color=ORANGE, linewidth=1.5)
            _arrow(axes, (x + 0.55, 0.6), (x + 0.74, 0.6), ORANGE)
    for y, said in ((0.6, "in"), (1.75, "history\nlayers"), (2.65, "its own\nblock"), (3.4, "out")):
        axes.text(0.06, y, said, size=10, color=SOFT, va="center")
    return figure


def _picture(axes: Axes, image: np.ndarray | None) -> None:
    """A uint8 picture (H, W, C) without a frame; nothing for None."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal")
    if image is not None:
        axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")


def _inset(axes: Axes, x: float, y: float, image: np.ndarray, said: str, above: bool = False) -> None:
    own = axes.inset_axes((x - 0.24, y - 0.36, 0.48, 0.72), transform=axes.transData)
    _picture(own, image)
    place, side = (y + 0.41, "bottom") if above else (y - 0.41, "top")
    axes.text(x, place, said, size=9, color=SOFT, ha="center", va=side)


def _box(axes: Axes, x: float, y: float, said: str, colour: str) -> None:
    height = 0.32 * (said.count("\n") + 1)
    axes.add_patch(
        FancyBboxPatch(
            (x - 0.4, y - height / 2),
            0.8,
            height,
            boxstyle="round,pad=0,rounding_size=0.05",
            facecolor=PAPER,
            edgecolor=colour,
        )  # fmt: skip
    )
    axes.text(x, y, said, size=9, color=INK, ha="center", va="center")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


if __name__ == "__main__":
    main(*sys.argv[1:])
