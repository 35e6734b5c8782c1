"""The store of encoded captions: a TFDS dataset of ragged vectors, and the empty caption's beside it.

Folder: as sharded.py says, and null.npz ("vectors": those of the empty caption, and last the one that pads it).
Record i holds `vectors` (token, width), the caption's own alone, its `text` and its `index`.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any, Required, TypedDict

import numpy as np
import tensorflow_datasets as tfds

from ard_jax.data.memory import THREADS, Readers
from ard_jax.errors import UserError, first_line
from ard_jax.files import file_sha256, read_json, read_npz
from ard_jax.sharded import Layout, Shard, data_folder, first_problem, open_records, tensor
from ard_jax.text_encoders import BUCKET
from ard_jax.types import Caption

IN_MEMORY = 2**28  # bytes of padded vectors up to which a store is decoded once, not row by row as it is asked
LAYOUT = Layout("captions", "Captions as a text encoder's vectors, to train and sample a diffusion model with.")
NULL = "null.npz"


def record_features(width: int, dtype: str) -> tfds.features.FeaturesDict:
    """The record: vectors (token, width), text and index."""
    return tfds.features.FeaturesDict(
        {
            "vectors": tensor((None, width), dtype),
            "text": tfds.features.Text(),
            "index": tfds.features.Scalar(dtype=np.int64),
        }
    )


class Manifest(TypedDict, total=False):
    """What those who read a store ask of its manifest."""

    shards: Required[list[Shard]]
    encoder_sha256: Required[str]
    encoder: Required[str]
    width: Required[int]
    longest: Required[int]
    null_sha256: Required[str]
    held_out: int


def read_manifest(directory: pathlib.Path) -> Manifest:
    """The manifest of a whole store.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = directory / "manifest.json"
    if not path.exists():
        raise UserError(
            f"there are no encoded captions in {directory} (no manifest.json): run the stage 'captions' first, with "
            f"the same config, or set captions.dir to where they are."
        )
    return read_json(path, Manifest, "run the stage 'captions' again")


@dataclasses.dataclass(frozen=True, eq=False)
class Captions:
    """A whole store as `conditions.Conditions`: numbers in, what a network is told out.

    Attributes:
        directory: of the store.
        sha256: hash of all that it holds.
        encoder_sha256: of the text encoder that made it.
        width: channels of a vector.
        length: tokens that captions are padded to.
        held_out: how many captions, the last ones, are sampled but never trained on.
    """

    directory: pathlib.Path
    sha256: str
    encoder_sha256: str
    width: int
    length: int
    held_out: int
    _records: Any
    _null: np.ndarray
    _readers: Readers

    def __len__(self) -> int:
        return len(self._records)

    @property
    def for_training(self) -> int:
        """How many captions, the first ones, may be trained on."""
        return len(self) - self.held_out

    @property
    def in_memory(self) -> bool:
        """Whether the store is small enough to be decoded once, when a row is first asked for."""
        return len(self) * self.length * self.width * self._null.dtype.itemsize <= IN_MEMORY

    def rows(self, numbers: np.ndarray) -> Caption:
        """Vectors (batch, token, width) in the store's type, their mask, and the empty caption's."""
        if self.in_memory:
            tokens, mask = (np.take(array, numbers, axis=0).view(dtype) for array, dtype in self._all)
        else:
            tokens, mask = self._padded(numbers)
        return Caption(tokens, mask, np.broadcast_to(self._null, (len(numbers), *self._null.shape)).copy())

    @functools.cached_property
    def _all(self) -> list[tuple[np.ndarray, np.dtype]]:
        """What `_padded` gives of every caption as bytes, which NumPy copies faster than bfloat16, and their types."""
        return [(array.view(np.uint8), array.dtype) for array in self._padded(np.arange(len(self)))]

    def _padded(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (batch, token, width), 0 where a caption has no more of them, and where it has them."""
        records = self._read(numbers)
        tokens = np.zeros((len(records), self.length, self.width), self._null.dtype)
        mask = np.zeros((len(records), self.length), bool)
        for row, record in enumerate(records):
            own = record["vectors"]
            tokens[row, : len(own)], mask[row, : len(own)] = own, True
        return tokens, mask

    def words(self, number: int) -> str:
        """The caption's text."""
        return self._read(np.array([number]))[0]["text"].decode()

    def _read(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        try:
            return self._readers.read(self._records, numbers)
        except RuntimeError as error:  # ArrayRecord's own checksums
            raise UserError(
                f"the captions in {self.directory} cannot be read ({first_line(error)}): run 'captions' again."
            ) from error


def open_captions(directory: pathlib.Path, threads: int = THREADS) -> Captions:
    """Opens a store, whose captions so many threads read.

    Raises:
        UserError: there is none, it is not whole, or was altered.
    """
    manifest = read_manifest(directory)
    again = "run the stage 'captions' again, which makes only what is missing"
    if found := first_problem(directory, manifest["shards"]):
        raise UserError(f"shard {data_folder(directory) / found[0]['file']} is missing or not whole: {again}.")
    if not (directory / NULL).exists() or file_sha256(directory / NULL) != manifest["null_sha256"]:
        raise UserError(f"the empty caption, {directory / NULL}, is missing or was altered: {again}.")
    try:
        records = open_records(tfds.builder_from_directory(os.fspath(data_folder(directory))))
    except Exception as error:  # what TFDS and protobuf raise of a file that is cut
        raise UserError(f"TFDS cannot read the captions in {directory} ({first_line(error)}): {again}.") from error
    dtype = records.dataset_info.features["vectors"].np_dtype
    return Captions(
        directory=directory,
        sha256=store_hash(manifest),
        encoder_sha256=manifest["encoder_sha256"],
        width=manifest["width"],
        length=-(-max(manifest["longest"], 2) // BUCKET) * BUCKET,
        held_out=manifest.get("held_out", 0),
        _records=records,
        _null=read_npz(directory / NULL)["vectors"].astype(dtype),
        _readers=Readers(threads),
    )


def store_hash(manifest: Manifest) -> str:
    """One hash for all that a store holds."""
    hashes = [*(shard["sha256"] for shard in manifest["shards"]), manifest["null_sha256"]]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
