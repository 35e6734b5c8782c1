"""Pictures in one sub-folder a class."""

import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from ard_jax.data.memory import Record, in_threads
from ard_jax.data.pixels import decode
from ard_jax.errors import UserError

log = logging.getLogger("ard_jax")

# Pillow's formats of pictures; what else it opens are documents, films and containers of other data.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF",
    "WEBP",
)  # fmt: skip


class Folder:
    """Pictures in one sub-folder a class, or anywhere below it; hidden files and folders are nobody's.

    Attributes:
        classes: names in the order of their numbers: of their names, or if all are whole numbers, of these.
        files: (path, label) of every picture.

    Raises:
        UserError: there is no such folder, it has not `num_classes` sub-folders, or one of them holds no picture.
    """

    def __init__(self, data: ConfigDict):
        root = epath.Path(data.dir).expanduser()
        if not data.dir or not root.is_dir():
            raise UserError(f"data.dir is {data.dir!r}, but no such folder exists: name one with a sub-folder a class.")
        folders = _class_folders(root)
        if not folders:
            raise UserError(f"The folder {root} has no sub-folders, but it needs one a class with its images inside.")
        if len(folders) != data.num_classes:
            raise UserError(
                f"The folder {root} has {len(folders)} sub-folders (classes), but data.num_classes is "
                f"{data.num_classes}: set it to {len(folders)} or name another folder."
            )
        known = _suffixes()
        others = [path.name for path in root.iterdir() if not path.is_dir() and not _is_hidden(path)]
        self.root, self.classes, self.files = root, [_name(folder) for folder in folders], []
        for label, folder in enumerate(folders):
            below = sorted(_files_below(folder, set()), key=os.fspath)
            pictures = [path for path in below if path.suffix.lower() in known]
            others += [path.name for path in below if path.suffix.lower() not in known]
            if not pictures:
                raise UserError(f"The class folder {folder} holds no images: put {', '.join(sorted(known))} into it.")
            self.files += [(path, label) for path in pictures]
        left = f"; {len(others)} other files left out ({', '.join(others[:3])})" if others else ""
        log.info("%d pictures in %d classes%s.", len(self.files), len(folders), left)
        self._size, self._channels = data.image_size, data.channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        path, label = self.files[index]
        return {"image": decode(path.read_bytes, str(path), self._size, self._channels), "label": np.int32(label)}

    def sha256(self) -> str:
        """Of the pictures' places below the folder, in one Unicode form, and their sizes in bytes."""
        sizes = np.zeros(len(self.files), np.int64)

        def measure(row: int) -> None:
            sizes[row] = self.files[row][0].stat().length

        in_threads(measure, len(self.files))
        digest, start = hashlib.sha256(), len(os.fspath(self.root))
        for (path, _), size in zip(self.files, sizes, strict=True):
            digest.update(f"{unicodedata.normalize('NFC', os.fspath(path)[start:])}:{size}\n".encode())
        return digest.hexdigest()


def _suffixes() -> set[str]:
    """Of the pictures that are taken, lower case."""
    return {suffix for suffix, of in Image.registered_extensions().items() if of in FORMATS and of in Image.OPEN}


def _name(path: epath.Path) -> str:
    """A file's name in one Unicode form, since some systems take names apart that others keep."""
    return unicodedata.normalize("NFC", path.name)


def _is_hidden(path: epath.Path) -> bool:
    """.ipynb_checkpoints, ._picture.png and what macOS puts into archives."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def _class_folders(root: epath.Path) -> list[epath.Path]:
    folders = [path for path in root.iterdir() if not _is_hidden(path) and path.is_dir()]
    if all(path.name.isdecimal() for path in folders):
        return sorted(folders, key=lambda path: (int(path.name), path.name))
    return sorted(folders, key=_name)


def _files_below(folder: epath.Path, seen: set[str]) -> Iterator[epath.Path]:
    """Files of a folder and of those below it; `seen` keeps links from leading around in a circle."""
    place = os.path.realpath(folder)
    if place in seen:
        return
    seen.add(place)
    for path in folder.iterdir():
        if _is_hidden(path):
            continue
        if path.is_dir():
            yield from _files_below(path, seen)
        else:
            yield path
