"""What the page asks for, checked, and drawn model after model: everything between the page and the networks."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from ard_jax.data import MODES, as_shown, center_crop, to_uint8
from ard_jax.demo.models import Models
from ard_jax.demo.runner import Drawn
from ard_jax.errors import UserError
from ard_jax.pipeline import ARDPipeline
from ard_jax.pipeline.inputs import require_int

MOST_IMAGES = 8
MOST_CHARACTERS = 1000  # longer than any caption that an encoder reads whole
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # what Pillow itself decodes: of an EPS it would run Ghostscript
MOST_PIXELS = 50_000_000  # of a picture to edit: more take seconds to shrink, and gigabytes


@dataclasses.dataclass(frozen=True)
class Row:
    """What one model drew, as it is shown.

    Attributes:
        title: who drew it.
        cost: its calls and its time in words.
        drawn: the pictures.
        given: the step, from 1, at which a picture was put in the place of a prediction; 0 for none.
    """

    title: str
    cost: str
    drawn: Drawn
    given: int = 0


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How far the models are.

    Attributes:
        caption: what all of them draw, in words.
        rows: of the models that are done.
        doing: what is being done, "" at the end.
        part: of the work that is done, 0 … 1.
        source: the picture that is edited, uint8 (height, width, channel); None where none is.
        note: a sentence on what was drawn, "" for none.
    """

    caption: str
    rows: tuple[Row, ...] = ()
    doing: str = ""
    part: float = 0.0
    source: np.ndarray | None = None
    note: str = ""

    @property
    def longest(self) -> int:
        """Steps of the longest trajectory."""
        return max((row.drawn.trajectory.shape[1] for row in self.rows), default=1)


def draw(models: Models, told: str | int, seed: object, count: object, names: list[str]) -> Iterator[Drawing]:
    """The same captions or classes from the same noises, by every model that is asked for.

    Args:
        models: of the demo.
        told: the caption, or the number of the class.
        seed, count: of the noises.
        names: of the models.

    Yields:
        After every step of a teacher and every student.

    Raises:
        UserError: something cannot be used, before anything is drawn; or a model cannot be opened.
    """
    told, seed, count = _checked(models, told, seed, count)
    if not names:
        raise UserError("no model is chosen: tick one at least.")
    wanted = [model for model in models.every if model.name in {models.find(name).name for name in names}]
    drawing = Drawing(words_of(models, told))
    for number, model in enumerate(wanted):
        yield dataclasses.replace(drawing, doing=f"{model.title}: getting ready", part=number / len(wanted))
        runner = models.open(model.name)
        steps = runner.draw(told, runner.noise(seed, count))
        while True:
            try:
                done = next(steps)
            except StopIteration as end:
                drawn = end.value
                break
            part = (number + done / runner.steps) / len(wanted)
            yield dataclasses.replace(
                drawing, doing=f"{model.title}: step {done} of {runner.steps}", part=min(part, 0.99)
            )
        row = Row(model.title, _cost(runner.calls, drawn.milliseconds), drawn)
        note = drawing.note or _note_on(told, runner.pipe)
        drawing = dataclasses.replace(drawing, rows=(*drawing.rows, row), note=note)
    yield dataclasses.replace(drawing, part=1.0)


def edit(
    models: Models, told: str | int, seed: object, count: object, name: str, picture: str | None, step: object
) -> Iterator[Drawing]:
    """A picture turned into one of another caption or class by a student; see `ARDPipeline.edit`.

    Args:
        models, told, seed, count: as in `draw`.
        name: of the student.
        picture: the path of the picture, which is cut to a square and shrunk.
        step: after which it takes the place of what the student predicted.

    Yields:
        Before the work and after it.

    Raises:
        UserError: as `draw`, or the picture or the step cannot be used.
    """
    told, seed, count = _checked(models, told, seed, count)
    if picture is None:
        raise UserError("there is no picture to edit: put one in, or take the one that was drawn.")
    if name not in {model.name for model in models.editors}:
        raise UserError("no student is chosen that can edit pictures: choose one of two steps or more.")
    model = models.find(name)
    step = require_int(_whole(step), "the source step", 1, model.steps - 1)
    source = open_picture(models, pathlib.Path(picture))
    drawing = Drawing(words_of(models, told), source=source)
    yield dataclasses.replace(drawing, doing=f"{model.title}: editing", part=0.0)
    pipe = models.open(name).pipe
    made = pipe.edit(source, step, [told] * count, seed, "np", return_trajectory=True)
    images, trajectory = (to_uint8(2 * np.asarray(part) - 1) for part in (made.images, made.trajectory))
    row = Row(model.title, f"{model.steps} calls, the picture after call {step}", Drawn(images, trajectory), step)
    yield dataclasses.replace(drawing, rows=(row,), part=1.0, note=_note_on(told, pipe))


def _note_on(told: str | int, pipe: ARDPipeline) -> str:
    """That a caption is longer than a model is told, if it is."""
    if pipe.prompts is None or not pipe.prompts.count_cut([str(told)]):
        return ""
    return f"The caption has over {pipe.config.captions.length} tokens and was cut there."


def step_at(position: int, longest: int, steps: int) -> int:
    """The step, 1 … steps, of one trajectory where the longest of all is at its step `position`."""
    return min(max(-(-position * steps // longest), 1), steps)


def words_of(models: Models, told: str | int) -> str:
    """A caption, or a class by its name if that is known."""
    if isinstance(told, str):
        return told
    return models.first.pipe.id2label.get(told, f"class {told}")


def open_picture(models: Models, path: pathlib.Path) -> np.ndarray:
    """A picture as the models see one: its middle square, uint8 (height, width, channel).

    Raises:
        UserError: it is too large, or no picture.
    """
    shape = models.first.pipe.image_shape
    assert shape is not None  # models without a VAE are refused
    try:
        image = Image.open(path, formats=FORMATS)
        pixels = image.width * image.height
        if pixels <= MOST_PIXELS:
            image.load()
    except Image.DecompressionBombError:
        pixels = MOST_PIXELS + 1
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(
            f"the picture cannot be read ({type(error).__name__}): give a PNG, JPEG, WebP or GIF."
        ) from None
    if pixels > MOST_PIXELS:
        raise UserError(f"the picture is larger than {MOST_PIXELS // 10**6} megapixels: shrink it first.")
    if min(image.size) < 1 or max(image.size) > 50 * min(image.size):
        raise UserError(f"the picture is {image.width}×{image.height}, too narrow for a square: cut it first.")
    square = center_crop(as_shown(image).convert(MODES[shape[2]]), shape[0])
    return np.asarray(square, np.uint8).reshape(shape)


def _checked(models: Models, told: object, seed: object, count: object) -> tuple[str | int, int, int]:
    """What the fields of the page hold, if it can be used; else UserError."""
    if models.first.pipe.prompts is None:
        told = require_int(_whole(told), "the class", 0, models.first.pipe.config.data.num_classes - 1)
    else:
        told = " ".join(str(told or "").split())
        if not told:
            raise UserError("the caption is empty: say what to draw, in words.")
        if len(told) > MOST_CHARACTERS:
            raise UserError(f"the caption has {len(told):,} characters: give at most {MOST_CHARACTERS:,}.")
    return (
        told,
        require_int(_whole(seed), "the seed", 0, 2**31 - 1),
        require_int(_whole(count), "the number of pictures", 1, MOST_IMAGES),
    )


def _whole(value: object) -> Any:
    """A number of the page, which has floats and None, as a whole one if it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _cost(calls: int, milliseconds: float) -> str:
    spec = ",.0f" if milliseconds >= 10 else ".1f"
    return f"{calls} network calls · {milliseconds:{spec}} ms a picture"
