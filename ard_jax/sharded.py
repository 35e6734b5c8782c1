"""TFDS datasets of ArrayRecord shards that a job makes one by one, resumably, and that anybody can open.

    tfds.builder_from_directory(directory / "1.0.0").as_data_source("train")

(A dataset in bfloat16 wants `import ml_dtypes` before, as JAX does, or TFDS imports TensorFlow to learn that type.)

Folder:
    1.0.0/NAME-train.array_record-00000-of-00008   records
    1.0.0/features.json, dataset_info.json         TFDS's own; written last
    shards/00000.json                              what one shard holds, and its SHA-256
    manifest.json                                  how the dataset was made; written when it is whole

A shard is written under a temporary name and renamed when whole. Its description in shards/ is written just before, so
a shard under its final name always has one; a shard that is there is never made again. Processes share the shards out
by number and never talk while they work.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from ard_jax.errors import UserError
from ard_jax.files import atomic_write, file_sha256, read_json, write_json
from ard_jax.progress import progress_bar

log = logging.getLogger("ard_jax")

THREADS = 64  # that look at shards side by side
VERSION, SPLIT = "1.0.0", "train"
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

Record = dict[str, np.ndarray | np.generic]


class Shard(TypedDict):
    """What is written of a shard: its file, its records and the numbers of those left out, its size and hash."""

    file: str
    records: int
    dropped: list[int]
    bytes: int
    sha256: str


def tensor(shape: tuple[int | None, ...], dtype: str) -> tfds.features.Tensor:
    """The feature of an array; without BYTES, TFDS writes ten times slower."""
    return tfds.features.Tensor(shape=shape, dtype=DTYPES[dtype], encoding=tfds.features.Encoding.BYTES)


def data_folder(directory: pathlib.Path) -> pathlib.Path:
    return directory / VERSION


def _description_path(directory: pathlib.Path, shard: int) -> pathlib.Path:
    return directory / "shards" / f"{shard:05d}.json"


def describe(directory: pathlib.Path, shards: int) -> list[Shard]:
    """What every shard holds, in order; all of them must have been written."""
    return [read_json(_description_path(directory, shard), Shard) for shard in range(shards)]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a dataset of some kind lies in its folder.

    Attributes:
        name: of the dataset; its files carry it.
        about: a line for TFDS.
    """

    name: str
    about: str

    def shard_path(self, directory: pathlib.Path, shard: int, shards: int) -> pathlib.Path:
        return data_folder(directory) / f"{self.name}-{SPLIT}.array_record-{shard:05d}-of-{shards:05d}"

    def write_shard(
        self,
        directory: pathlib.Path,
        shard: int,
        shards: int,
        features: tfds.features.FeaturesDict,
        records: Iterable[Record],
        dropped: list[int],
    ) -> None:
        """Writes one shard and its description, both whole or not at all.

        Args:
            directory: of the dataset.
            shard, shards: its number, and how many there are.
            features: of a record.
            records: dicts of arrays.
            dropped: numbers of records that were left out, known once `records` is through; described, not stored.
        """
        serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
        path = self.shard_path(directory, shard, shards)
        # of a run killed while writing this shard, whatever it took their number to be: the dataset may have grown
        for leftover in path.parent.glob(f".partial-*.array_record-{shard:05d}-of-*"):
            leftover.unlink()

        def write(temporary: pathlib.Path) -> None:
            writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")
            count = 0
            for count, record in enumerate(records, start=1):  # noqa: B007 (the count is used after the loop)
                example = serializer.get_tf_example(features.encode_example(record))
                writer.write(example.SerializeToString(deterministic=True))  # or the fields come in an order of chance
            writer.close()
            description: Shard = {
                "file": path.name,
                "records": count,
                "dropped": dropped,
                "bytes": temporary.stat().st_size,
                "sha256": file_sha256(temporary),
            }
            write_json(_description_path(directory, shard), description)

        atomic_write(path, write)

    def whole_shards(self, directory: pathlib.Path, shards: int, which: Iterable[int]) -> set[int]:
        """Which of some shards lie under their final names with the bytes that they were written with."""
        found = set()
        for shard in which:
            path, description = self.shard_path(directory, shard, shards), _description_path(directory, shard)
            with contextlib.suppress(UserError):  # a damaged description is as good as none
                if path.exists() and description.exists():
                    found |= {shard} if file_sha256(path) == read_json(description, Shard)["sha256"] else set()
        return found

    def _take_over(self, directory: pathlib.Path, shards: int, sizes: Mapping[int, int]) -> None:
        """Gives shards of a smaller dataset, which this one goes on from, their new names; those cut short go."""
        for shard, size in sizes.items():
            path, description = self.shard_path(directory, shard, shards), _description_path(directory, shard)
            others = path.parent.glob(f"{self.name}-{SPLIT}.array_record-{shard:05d}-of-*")
            for other in sorted(others):
                with contextlib.suppress(UserError, FileNotFoundError):  # a damaged description is as good as none
                    made = read_json(description, Shard)
                    if made["records"] + len(made["dropped"]) == size:
                        if made["file"] != path.name or other != path:
                            os.replace(other, path)
                            write_json(description, made | {"file": path.name})
                        continue
                other.unlink()

    def finish(
        self,
        directory: pathlib.Path,
        features: tfds.features.FeaturesDict,
        shards: Sequence[Shard],
        manifest: dict[str, Any],
    ) -> None:
        """Writes TFDS's metadata, then the manifest: the dataset is whole."""
        template = tfds.core.ShardedFileTemplate(
            data_dir=data_folder(directory), dataset_name=self.name, split=SPLIT, filetype_suffix="array_record"
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
            description=self.about,
        )
        write_json(directory / "manifest.json", manifest)

    def make_shards(
        self,
        directory: pathlib.Path,
        features: tfds.features.FeaturesDict,
        count: int,
        shard_size: int,
        records: Callable[[np.ndarray, list[int], tqdm.tqdm], Iterator[Record]],
        unit: str,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Makes this process's shards that are missing, truncated or altered.

        Args:
            directory: of the dataset.
            features: of a record.
            count: records of the dataset.
            shard_size: records a shard.
            records: (numbers, dropped, bar) → the records of these numbers in their order; it notes the numbers that
                it leaves out in `dropped`, and moves the bar on.
            unit: what records are called.
            process_index, process_count: which shards are this process's: every process_count-th.
        """
        shards = number_of_shards(count, shard_size)
        mine = range(process_index, shards, process_count)
        sizes = {shard: min(shard_size, count - shard * shard_size) for shard in mine}
        self._take_over(directory, shards, sizes)
        whole = self.whole_shards(directory, shards, mine)
        numbers = {shard: shard * shard_size + np.arange(sizes[shard]) for shard in mine if shard not in whole}
        total, done, started = sum(map(len, numbers.values())), 0, time.monotonic()
        with progress_bar(total, unit) as bar:
            for shard, here in numbers.items():
                dropped: list[int] = []
                self.write_shard(directory, shard, shards, features, records(here, dropped, bar), dropped)
                done += len(here)
                rate = done / (time.monotonic() - started)
                left = (total - done) / rate
                log.info("shard %d of %d written, %.0f %s/s, %.0f s left.", shard + 1, shards, rate, unit, left)


def problem_of(directory: pathlib.Path, shard: Shard, checksum: bool = False) -> str:
    """What is wrong with a shard's file, in words; "" if it is as it was written, by its size, or by its hash too."""
    path = data_folder(directory) / shard["file"]
    if not path.exists():
        return "is missing"
    if path.stat().st_size != shard["bytes"]:
        return f"has {path.stat().st_size} bytes instead of {shard['bytes']}"
    if checksum and file_sha256(path) != shard["sha256"]:
        return "does not have the checksum that it was written with"
    return ""


def first_problem(
    directory: pathlib.Path, shards: Sequence[Shard], checksums: bool = False
) -> tuple[Shard, str] | None:
    """The first shard that is not as it was written, and what `problem_of` says; a bucket is asked side by side."""
    with ThreadPoolExecutor(THREADS) as pool:
        problems = pool.map(lambda shard: problem_of(directory, shard, checksums), shards)
        return next(((shard, problem) for shard, problem in zip(shards, problems, strict=True) if problem), None)


class _Shards:
    """Records of several files: TFDS opens a file when it is first read from and holds a lock of the dataset's
    meanwhile, so that a bucket's hundreds of shards would be opened one after another.
    """

    def __init__(self, instructions: Sequence[Any]):
        self._files = [ArrayRecordDataSource([instruction]) for instruction in instructions]
        self._ends = np.cumsum([len(file) for file in self._files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[file][index - int(self._ends[file]) + len(self._files[file])]


def open_records(builder: tfds.core.DatasetBuilder, split: str = SPLIT, decoders: Any = None) -> Any:
    """TFDS's random-access source of a dataset's records, each file of which is opened on its own.

    Raises:
        What `builder.as_data_source` raises.
    """
    records = builder.as_data_source(split, decoders=decoders)
    if builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:  # of the others, Parquet is in memory
        records.data_source = _Shards(builder.info.splits[split].file_instructions)
    return records


def number_of_shards(count: int, shard_size: int) -> int:
    return -(-count // shard_size)
