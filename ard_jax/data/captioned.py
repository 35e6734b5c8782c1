"""Pictures with captions: a folder by its metadata.jsonl, and drawn shapes; a picture's label is its own number."""

import hashlib
import io
import json
import math
from collections.abc import Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from ard_jax.data.memory import InMemory, Record
from ard_jax.data.pixels import decode
from ard_jax.errors import UserError

METADATA = "metadata.jsonl"
SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 140, 44),
    "blue": (31, 90, 180),
    "yellow": (240, 190, 0),
    "purple": (128, 62, 160),
    "black": (20, 20, 20),
}
SIDES = {"small": 0.45, "large": 0.8}  # of the picture's
OVERSAMPLED = 8


class ImageFolder:
    """Pictures that a metadata.jsonl names, as Hugging Face's imagefolder has it: {"file_name": …, "text": …} a line.

    Attributes:
        captions: of every picture, in the order of the lines.

    Raises:
        UserError: there is no such file, a line is no such object, or a picture is not there.
    """

    def __init__(self, data: ConfigDict):
        self.root = epath.Path(data.dir).expanduser()
        self._size, self._channels = data.image_size, data.channels
        self.files: list[epath.Path] = []
        self.captions: list[str] = []
        for where, line in read_lines(self.root / METADATA):
            name, caption = line.get("file_name"), line.get(data.caption_key)
            if not isinstance(name, str) or not isinstance(caption, str):
                raise UserError(f"{where} lacks file_name or {data.caption_key} as strings: give it both.")
            path = self.root / name
            if epath.Path(name).is_absolute() or ".." in epath.Path(name).parts or not path.is_file():
                raise UserError(f"{where} names the picture {name!r}, which is not there: put it below {self.root}.")
            self.files.append(path)
            self.captions.append(caption)
        if not self.files:
            raise UserError(f"{self.root / METADATA} names no picture: give it a line each.")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        path = self.files[index]
        return {"image": decode(path.read_bytes, str(path), self._size, self._channels), "label": np.int32(index)}

    def sha256(self) -> str:
        """Of the pictures' names and sizes in bytes; captions have a store of their own."""
        digest, start = hashlib.sha256(), len(str(self.root))
        for path in self.files:
            digest.update(f"{str(path)[start:]}:{path.stat().length}\n".encode())
        return digest.hexdigest()


def read_lines(path: epath.Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file, each with the words that name its line.

    Raises:
        UserError: there is none, it is not UTF-8, or a line is no object.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there: give a folder with a {METADATA}, a line with file_name and text each.")
    for number, text in enumerate(lines_of(read_text(path)), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise UserError(f"line {number} of {path} is no JSON object: mend it, or leave it out.")
        yield f"line {number} of {path}", line


def read_text(path: epath.Path) -> str:
    """A text file; UserError if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"line {number} of {path} is not UTF-8: save the file in that encoding.") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends.

    They end at newlines alone: str.splitlines also cuts at U+2028 and the like, which JSON may hold within a string.
    """
    return [line.removesuffix("\n").removesuffix("\r") for line in io.StringIO(text, newline="\n")]


class Shapes(InMemory):
    """Drawn shapes of four kinds, six colours and two sizes at two places, on white; for tests and a first look.

    Attributes:
        captions: of every picture, such as "a small red circle".

    Raises:
        UserError: the config asks for other than 3 channels.
    """

    def __init__(self, data: ConfigDict):
        if data.channels != 3:
            raise UserError(f"data.source=shapes has 3 channels, but data.channels is {data.channels}: set it to 3.")
        kinds = [
            (size, colour, shape, place)
            for size in SIDES
            for colour in COLOURS
            for shape in SHAPES
            for place in (-1, 1)
        ]
        self.captions = [f"a {size} {colour} {shape}" for size, colour, shape, _ in kinds]
        images = np.stack([_draw(data.image_size, *kind) for kind in kinds]).astype(np.float32) / 127.5 - 1
        super().__init__({"image": images, "label": np.arange(len(kinds), dtype=np.int32)})


def _draw(side: int, size: str, colour: str, shape: str, place: int) -> np.ndarray:
    """uint8 (side, side, 3)."""
    full = OVERSAMPLED * side
    picture = Image.new("RGB", (full, full), "white")
    radius = SIDES[size] * full / 2
    middle = full / 2 + place * (full / 2 - radius) / 2
    box = [middle - radius, middle - radius, middle + radius, middle + radius]
    draw, fill = ImageDraw.Draw(picture), COLOURS[colour]
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(1, int(radius / 2.5)))
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    else:
        turns = [math.pi * (4 * corner / 3 - 1) / 2 for corner in range(3)]
        draw.polygon([(middle + radius * math.cos(t), middle + radius * math.sin(t)) for t in turns], fill=fill)
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX))
