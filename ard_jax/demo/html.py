"""What the page shows, as HTML that needs nothing from elsewhere: pictures are in it, and words are escaped."""

import base64
import html
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

from ard_jax.demo.drawing import Drawing, Row, step_at
from ard_jax.demo.models import Models

LARGEST = 320  # pixels a side that a picture is shown with, and 72 in a strip: larger ones are sent shrunk
IN_STRIP = 72


def results(drawing: Drawing | None, position: int | None = None) -> str:
    """The pictures of every model, at one moment of their trajectories, with the strips of their steps.

    Args:
        drawing: what is there, None for nothing yet.
        position: the moment, as a step of the longest trajectory; None for the end.
    """
    if drawing is None or not (drawing.rows or drawing.source is not None):
        return ""
    source = _figure(drawing.source, "the picture that is edited", "given") if drawing.source is not None else ""
    before = f'<div class="ard-pictures">{source}</div>' if source else ""
    moment = drawing.longest if position is None else position
    return before + "".join(_row(row, drawing, moment) for row in drawing.rows)


def _row(row: Row, drawing: Drawing, moment: int) -> str:
    images, steps = row.drawn.images, row.drawn.trajectory
    step = step_at(moment, drawing.longest, steps.shape[1])
    shown = images if moment >= drawing.longest else steps[:, step - 1]
    where = f"step {step} of {steps.shape[1]}"
    names = [f"{drawing.caption}, picture {number} of {len(images)}" for number in range(1, len(images) + 1)]
    pictures = "".join(
        _figure(picture, f"{row.title}, {where}: {name}") for picture, name in zip(shown, names, strict=True)
    )
    strips = "".join(_strip(trajectory, step, row.given, name) for trajectory, name in zip(steps, names, strict=True))
    return (
        f'<section class="ard-model"><h3>{html.escape(row.title)} <small>{html.escape(row.cost)}</small></h3>'
        f'<p class="ard-where">{where}</p><div class="ard-pictures">{pictures}</div>{strips}</section>'
    )


def _strip(trajectory: np.ndarray, step: int, given: int, name: str) -> str:
    """The predictions of one trajectory (step, height, width, channel) side by side."""
    pictures = "".join(
        f'<img class="{_classes(number == step, number == given)}" src="{_source(picture, IN_STRIP)}" '
        f'alt="step {number}" title="step {number}{": the picture that was put in" if number == given else ""}">'
        for number, picture in enumerate(trajectory, 1)
    )
    label = html.escape(f"all steps of {name}", quote=True)
    return f'<div class="ard-strip" role="group" aria-label="{label}">{pictures}</div>'


def _classes(is_now: bool, is_given: bool) -> str:
    return " ".join(name for name, holds in (("now", is_now), ("given", is_given)) if holds)


def _figure(picture: np.ndarray, alt: str, caption: str = "") -> str:
    words = f"<figcaption>{caption}</figcaption>" if caption else ""
    image = f'<img src="{_source(picture, LARGEST)}" alt="{html.escape(alt, quote=True)}">'
    return f"<figure>{image}{words}</figure>"


def _source(picture: np.ndarray, largest: int) -> str:
    """A picture, uint8 (height, width, channel), as the address of itself."""
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def progress(doing: str, part: float) -> str:
    """What is being done, with a bar."""
    return (
        f'<div class="ard-doing" role="status"><progress max="1" value="{part:.3f}"></progress> '
        f"<span>{html.escape(doing)}</span></div>"
    )


def status(drawing: Drawing) -> str:
    """How far the models are."""
    if drawing.doing:
        return progress(drawing.doing, drawing.part)
    return message(" ".join(filter(None, ("Done.", drawing.note))))


def message(sentence: str, is_error: bool = False) -> str:
    """A sentence in the place of the bar."""
    role, kind = ("alert", "ard-error") if is_error else ("status", "ard-done")
    return f'<p class="{kind}" role="{role}">{html.escape(sentence)}</p>'


def greyed(models: Models) -> str:
    """The models that cannot draw, and why."""
    items: Iterable[str] = (
        f'<li aria-disabled="true"><b>{html.escape(model.title)}</b>: {html.escape(model.why_not)}</li>'
        for model in models.every
        if model.why_not
    )
    found = "".join(items)
    return f'<ul class="ard-greyed">{found}</ul>' if found else ""
