"""The trajectory store: a TFDS dataset of ArrayRecord shards that anybody can open.

    tfds.builder_from_directory(directory / "1.0.0").as_data_source("train")

(A store in bfloat16 wants `import ml_dtypes` before, as JAX does, or TFDS imports TensorFlow to learn that type.)

Folder:
    1.0.0/trajectories-train.array_record-00000-of-00008   one record a trajectory
    1.0.0/features.json, dataset_info.json                 TFDS's own; written last
    shards/00000.json                                      what one shard holds, and its SHA-256
    manifest.json                                          how the store was made; written when it is whole

A shard is written under a temporary name and renamed when whole. Its description in shards/ is written just before, so
a shard under its final name always has one; a shard that is there is never made again.
"""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from ard_jax.errors import UserError
from ard_jax.files import atomic_write, file_sha256, read_json, write_json

VERSION = "1.0.0"
NAME, SPLIT = "trajectories", "train"
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


def record_features(
    shape: tuple[int, int, int], points: int, dtype: str, keep_noisy: bool
) -> tfds.features.FeaturesDict:
    """The record: noise (H, W, C), x0 (P, H, W, C), optionally xt (P, H, W, C), label and index."""

    def tensor(*size):  # without BYTES, TFDS writes ten times slower
        return tfds.features.Tensor(shape=size, dtype=DTYPES[dtype], encoding=tfds.features.Encoding.BYTES)

    features = {
        "noise": tensor(*shape),
        "x0": tensor(points, *shape),
        "label": tfds.features.Scalar(dtype=np.int64),
        "index": tfds.features.Scalar(dtype=np.int64),
    }
    if keep_noisy:
        features["xt"] = tensor(points, *shape)
    return tfds.features.FeaturesDict(features)


def data_folder(directory: pathlib.Path) -> pathlib.Path:
    return directory / VERSION


def shard_path(directory: pathlib.Path, shard: int, shards: int) -> pathlib.Path:
    return data_folder(directory) / f"{NAME}-{SPLIT}.array_record-{shard:05d}-of-{shards:05d}"


def description_path(directory: pathlib.Path, shard: int) -> pathlib.Path:
    return directory / "shards" / f"{shard:05d}.json"


def write_shard(
    directory: pathlib.Path,
    shard: int,
    shards: int,
    features: tfds.features.FeaturesDict,
    records: Iterable[dict[str, Any]],
    dropped: list[int],
) -> None:
    """Writes one shard and its description, both whole or not at all.

    Args:
        directory: of the store.
        shard, shards: its number, and how many there are.
        features: from `record_features`.
        records: dicts of arrays.
        dropped: indices of trajectories that were left out; described, not stored.
    """
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    path = shard_path(directory, shard, shards)
    for leftover in path.parent.glob(f".partial-*{path.suffix}"):  # of a run that was killed while writing this shard
        leftover.unlink()

    def write(temporary: pathlib.Path) -> None:
        writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")
        count = 0
        for count, record in enumerate(records, start=1):  # noqa: B007 (the count is used after the loop)
            example = serializer.get_tf_example(features.encode_example(record))
            writer.write(example.SerializeToString(deterministic=True))  # or the fields come in an order of chance
        writer.close()
        description = {
            "file": path.name,
            "records": count,
            "dropped": dropped,
            "bytes": temporary.stat().st_size,
            "sha256": file_sha256(temporary),
        }
        write_json(description_path(directory, shard), description)

    atomic_write(path, write)


def whole_shards(directory: pathlib.Path, shards: int, which: Iterable[int]) -> set[int]:
    """Which of some shards lie under their final names with the bytes that they were written with."""
    found = set()
    for shard in which:
        path, description = shard_path(directory, shard, shards), description_path(directory, shard)
        if path.exists() and description.exists() and file_sha256(path) == read_json(description)["sha256"]:
            found.add(shard)
    return found


def describe(directory: pathlib.Path, shards: int) -> list[dict[str, Any]]:
    """What every shard holds, in order; all of them must have been written."""
    return [read_json(description_path(directory, shard)) for shard in range(shards)]


def finish(
    directory: pathlib.Path, features: tfds.features.FeaturesDict, shards: Sequence[dict[str, Any]], manifest: dict
) -> None:
    """Writes TFDS's metadata, then the manifest: the store is whole."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=data_folder(directory), dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[shard["records"] for shard in shards],
        num_bytes=sum(shard["bytes"] for shard in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=data_folder(directory),
        features=features,
        split_infos=[split],
        filename_template=template,
        check_data=False,
        description="ODE trajectories of a diffusion teacher, for distillation.",
    )
    write_json(directory / "manifest.json", manifest)


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """The manifest of a whole store.

    Raises:
        UserError: there is none.
    """
    path = directory / "manifest.json"
    if not path.exists():
        raise UserError(
            f"there is no whole trajectory store in {directory} (no manifest.json): run the stage 'trajectories' "
            f"first, with the same config, or set trajectories.dir to a store."
        )
    return read_json(path)


def check_shards(directory: pathlib.Path, manifest: dict[str, Any], checksums: bool) -> None:
    """Compares every shard with the manifest: its size, and with `checksums` its SHA-256.

    Raises:
        UserError: a shard is missing, truncated or altered; the sentence names it and says how to remake it alone.
    """
    for shard in manifest["shards"]:
        path = data_folder(directory) / shard["file"]
        if not path.exists():
            problem = "is missing"
        elif path.stat().st_size != shard["bytes"]:
            problem = f"has {path.stat().st_size} bytes instead of {shard['bytes']}"
        elif checksums and file_sha256(path) != shard["sha256"]:
            problem = "does not have the checksum that it was written with"
        else:
            continue
        raise broken_shard(path, problem)


def broken_shard(path: pathlib.Path, problem: str) -> UserError:
    return UserError(
        f"shard {path} {problem}: delete that file and run the stage 'trajectories' again, "
        f"which makes only what is missing."
    )


class Store:
    """A whole store as a random-access source of records (dicts of arrays); see `check_shards`.

    Reading a record raises UserError if its bytes are not those that were written, as ArrayRecord's checksums tell.
    """

    def __init__(self, directory: pathlib.Path, manifest: dict[str, Any]):
        self.records = tfds.builder_from_directory(os.fspath(data_folder(directory))).as_data_source(SPLIT)
        self.paths = [data_folder(directory) / shard["file"] for shard in manifest["shards"]]
        self.ends = np.cumsum([shard["records"] for shard in manifest["shards"]])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            return self.records[index]
        except RuntimeError as error:
            path = self.paths[np.searchsorted(self.ends, index, side="right")]
            raise broken_shard(path, f"cannot be read ({str(error).splitlines()[0]})") from error
