"""How long a step waits for records on a mounted bucket: python -m benchmarks.bucket [--only ITEM …] [--seconds 30]

Plays one of four hosts in a training with batch 64: 16 records a host and step of 60 ms, of a store of 625 shards. Each
read of a file takes 30 ms, one in a hundred ten times as long, and opening a shard takes three reads; the bucket is
played by ArrayRecord's reader, which sleeps. Prints a row of Markdown for each item, number of reading threads and
time of a read, where 0 tells how much of the wait is the machine's:

trajectories  41 kB a record
latents       8 kB a record, of a TFDS dataset
captions      trajectories, and their captions of 120 vectors of width 4096, which are 1 MB each, from a store as well

The wait is the share of the time, after the first step, which compiles for ten seconds, that the loop has no batch to
go on with: over the next ten seconds, and over all. Stores are written to --dir first, about 1 GB for all items.
"""

import itertools
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from ard_jax import sharded
from ard_jax.captions import store as captions_store
from ard_jax.command_line import parse_flags, set_up_logging
from ard_jax.conditions import Conditions, Labels, with_conditions
from ard_jax.config import default_config
from ard_jax.data import Source, image_source
from ard_jax.data.memory import THREADS
from ard_jax.data.stream import stream
from ard_jax.errors import UserError
from ard_jax.files import file_sha256, local_path, write_npz
from ard_jax.trajectories import store as trajectory_store
from ard_jax.types import Batch
from benchmarks.measure import table
from benchmarks.speed import random_store

STEP_SECONDS, COMPILE_SECONDS = 0.06, 10.0
BATCH, HOSTS = 64, 4
SHARDS = 625  # the paper's store has as many, of 4096 records; here they are short
CAPTION = (120, 4096)  # tokens, width


class Bucket:
    """ArrayRecord's reader of a file on a bucket."""

    opened, numbers = array_record_data_source.array_record_module.ArrayRecordReader, itertools.count(1)

    seconds = 0.0  # that a read takes

    def __init__(self, *arguments: Any, **options: Any):
        time.sleep(3 * Bucket.seconds)
        self.reader = Bucket.opened(*arguments, **options)

    def read(self, positions: Any) -> Any:
        time.sleep(Bucket.seconds * (1 if next(Bucket.numbers) % 100 else 10))
        return self.reader.read(positions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)


# --------------------------------------------------------------------------------------------------------- stores


def write_dataset(
    layout: sharded.Layout,
    features: tfds.features.FeaturesDict,
    record: Callable[[int], sharded.Record],
    count: int,
    directory: pathlib.Path,
    **manifest: Any,
) -> None:
    """A whole dataset of `count` records over `SHARDS` shards."""
    for shard, numbers in enumerate(np.array_split(np.arange(count), SHARDS)):
        layout.write_shard(directory, shard, SHARDS, features, map(record, numbers), [])
    shards = sharded.describe(directory, SHARDS)
    layout.finish(directory, features, shards, {"shards": shards, **manifest})


def trajectories(directory: pathlib.Path, write: bool) -> tuple[Source, Conditions]:
    config = default_config()
    config.trajectories.shard_size = 8
    if write:
        random_store(config, directory, 8 * SHARDS)
    return trajectory_store.Store(directory, trajectory_store.read_manifest(directory)), Labels(1000)


def latents(directory: pathlib.Path, write: bool) -> tuple[Source, Conditions]:
    data, rng = default_config().data, np.random.default_rng(0)
    shape = (data.image_size, data.image_size, data.channels)
    features = {"latent": sharded.tensor(shape, "float16"), "label": tfds.features.Scalar(np.int64)}

    def record(number: int) -> sharded.Record:
        return {"latent": rng.standard_normal(shape, np.float32).astype(np.float16), "label": number % 1000}

    if write:
        layout = sharded.Layout("latents", "Random.")
        write_dataset(layout, tfds.features.FeaturesDict(features), record, 16 * SHARDS, directory)
    data.dir = str(sharded.data_folder(directory))
    return image_source(data), Labels(1000)


def captions(directory: pathlib.Path, write: bool) -> tuple[Source, Conditions]:
    folder, (tokens, width) = directory / "captions", CAPTION
    vectors = np.random.default_rng(0).standard_normal(CAPTION, np.float32).astype(sharded.DTYPES["bfloat16"])

    def record(number: int) -> sharded.Record:
        return {"vectors": np.roll(vectors, number, axis=0), "text": f"caption {number}", "index": number}

    if write:
        write_npz(null := folder / captions_store.NULL, vectors=np.zeros((2, width), np.float32))
        about = dict(encoder="", encoder_sha256="", width=width, longest=tokens, null_sha256=file_sha256(null))
        features = captions_store.record_features(width, "bfloat16")
        write_dataset(captions_store.LAYOUT, features, record, SHARDS, folder, **about)
    source, _ = trajectories(directory / "trajectories", write)
    return source, captions_store.open_captions(folder)


ITEMS = {"trajectories": trajectories, "latents": latents, "captions": captions}


# --------------------------------------------------------------------------------------------------------- the loop


def measure(source: Source, conditions: Conditions, threads: int, seconds: float) -> tuple[float, float, float]:
    """Seconds until the first batch, and shares of the time spent waiting: of the first ten seconds, and of all."""

    def complete(batch: Batch) -> Batch:
        return with_conditions(batch | {"label": batch["label"] % len(conditions)}, conditions)

    started = time.perf_counter()
    batches = stream(source, batch_size=BATCH, seed=0, process_count=HOSTS, num_threads=threads, complete=complete)
    next(batches)
    first = time.perf_counter() - started
    time.sleep(COMPILE_SECONDS)
    begun = time.perf_counter()
    ends, waits = [], []
    while not ends or ends[-1] < seconds:
        before = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - before)
        time.sleep(STEP_SECONDS)
        ends.append(time.perf_counter() - begun)
    early = np.searchsorted(ends, 10) + 1
    return first, sum(waits[:early]) / ends[:early][-1], sum(waits) / ends[-1]


FLAGS = {
    "--only": dict(nargs="+", choices=ITEMS, default=[*ITEMS], metavar="ITEM", help=", ".join(ITEMS)),
    "--threads": dict(nargs="+", type=int, default=[2, THREADS], help="reading threads: run.workers"),
    "--milliseconds": dict(nargs="+", type=float, default=[30.0, 0.0], help="that a read takes"),
    "--seconds": dict(type=float, default=30.0, help="of each row"),
    "--dir": dict(default="runs/bucket", help="where the stores are written; removed in the end"),
}


def main(arguments: list[str]) -> int:
    set_up_logging()
    try:
        args = parse_flags(FLAGS, arguments, prog="python -m benchmarks.bucket", description=__doc__)
    except UserError as error:
        print(f"benchmarks.bucket: {error}", file=sys.stderr)
        return 2
    rows, folder = [], local_path(args.dir)
    try:
        for item in args.only:
            ITEMS[item](folder / item, True)
        array_record_data_source.array_record_module.ArrayRecordReader = Bucket
        for item, threads, milliseconds in itertools.product(args.only, args.threads, args.milliseconds):
            Bucket.seconds = milliseconds / 1e3
            source, conditions = ITEMS[item](folder / item, False)  # opened anew
            first, early, share = measure(source, conditions, threads, args.seconds)
            rows.append((item, threads, milliseconds, f"{first:.2f}", f"{early:.2%}", f"{share:.2%}"))
    finally:
        array_record_data_source.array_record_module.ArrayRecordReader = Bucket.opened
        shutil.rmtree(folder, ignore_errors=True)
    print(
        table(
            ("store", "threads", "a read, ms", "first batch, s", "wait in the first 10 s", f"in {args.seconds:g} s"),
            rows,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
