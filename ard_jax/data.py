"""Labelled images, and the endless, resumable stream of batches that training reads.

A *source* is a `grain.sources.RandomAccessDataSource`: `len(source)` records, `source[i]` a dict of
arrays. `image_source` makes one from digits, TFDS or a folder; the trajectory store is another; `stream`
batches any of them.
"""

import dataclasses
import functools
import io
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from ard_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MODES = {1: "L", 3: "RGB"}  # channels → Pillow's name of the mode
THREADS = min(16, 2 * (os.cpu_count() or 1))  # readers wait for storage half of the time


class InMemory:
    """A source whose records lie decoded in memory, as rows of arrays.

    Attributes:
      arrays: name → array (record, …), read-only because records are views of them.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = {name: array.view() for name, array in arrays.items()}
        for array in self.arrays.values():
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.arrays.items()}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of the records `indices` (batch,), copied: name → array (batch, …)."""
        return {name: array[indices] for name, array in self.arrays.items()}


# ---------------------------------------------------------------------------------------- image sources


def image_source(data: Any) -> grain.sources.RandomAccessDataSource:
    """The labelled images that a config's `data` section names.

    Args:
      data: an object with the fields
        source: "digits" (scikit-learn's, 1797 of 8×8×1), "tfds" or "folder".
        name: a TFDS name such as "cifar10" or "name/config:1.0.0"; "" to open `dir` itself as a prepared dataset.
        dir: TFDS's data_dir ("" is TFDS's default), or the prepared dataset, or the folder with one sub-folder a class.
        split: "train", or for "tfds" any split expression such as "train[:90%]".
        image_size: height and width of the images (pixels) or latents (latent pixels) that come out.
        channels: their channels; 1 or 3 for pixels.
        num_classes: labels lie in [0, num_classes).
        space: "pixel" (feature "image": uint8, cropped and resized as ADM does, in [-1, 1]) or "latent" (TFDS only;
          feature "latent": float (H, W, C), used as it is).

    Returns:
      A source of records `{"image": float32 (H, W, C), "label": np.int32}`. Classes of a folder are numbered in
      the order of their names.

    Raises:
      UserError: a field is wrong, the data are missing or of another shape or format. An image that cannot be
        read and a label out of range raise it when that record is read.
    """
    makers = {"digits": _digits, "tfds": _tfds, "folder": _Folder}
    if data.source not in makers:
        raise UserError(f"data.source is {data.source!r}, but it must be one of {', '.join(makers)}.")
    if data.space not in ("pixel", "latent"):
        raise UserError(f"data.space is {data.space!r}, but it must be pixel or latent.")
    if data.space == "latent" and data.source != "tfds":
        raise UserError(f"data.space=latent needs data.source=tfds, but data.source is {data.source!r}.")
    if data.space == "pixel" and data.channels not in MODES:
        raise UserError(f"data.channels is {data.channels}, but images have 1 (grey) or 3 (RGB): set one of them.")
    if data.source != "tfds" and data.split != "train":
        raise UserError(f"data.split is {data.split!r}, but data.source={data.source} has only the split train.")
    return makers[data.source](data)


def _digits(data: Any) -> InMemory:
    from sklearn.datasets import load_digits

    if (data.image_size, data.channels, data.num_classes) != (8, 1, 10):
        raise UserError(
            f"data.source=digits holds 8×8 images of 1 channel in 10 classes, but the config asks for image_size="
            f"{data.image_size}, channels={data.channels}, num_classes={data.num_classes}: set them to 8, 1 and 10."
        )
    digits = load_digits()
    images = digits.images[..., None].astype(np.float32) / 8 - 1  # grey levels 0 … 16
    return InMemory({"image": images, "label": digits.target.astype(np.int32)})


class _Folder:
    """Images in one sub-folder a class."""

    def __init__(self, data: Any):
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
        self._files = [(path, label) for label, folder in enumerate(folders) for path in _image_files(folder)]
        self._size, self._channels = data.image_size, data.channels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        path, label = self._files[index]
        return {"image": _decode(path.read_bytes, str(path), self._size, self._channels), "label": np.int32(label)}


def _class_folders(root: epath.Path) -> list[epath.Path]:
    """In the order of their names; .ipynb_checkpoints and the like are nobody's class."""
    folders = (path for path in root.iterdir() if not path.name.startswith(".") and path.is_dir())
    return sorted(folders, key=lambda path: path.name)


def _image_files(folder: epath.Path) -> list[epath.Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"The class folder {folder} holds no images: put {', '.join(IMAGE_SUFFIXES)} files into it.")
    return files


def class_names(data: Any) -> list[str] | None:
    """Names of the classes in the order of their numbers, or None where the data do not tell.

    Args:
      data: what `image_source` takes, and has taken.
    """
    if data.source == "digits":
        return [str(digit) for digit in range(10)]
    if data.source == "folder":
        return [folder.name for folder in _class_folders(epath.Path(data.dir).expanduser())]
    label = _tfds_builder(data)[0].info.features["label"]
    return list(getattr(label, "names", None) or []) or None


class _Tfds:
    """A prepared TFDS dataset: `read(record, where)` makes the image, labels are checked here."""

    def __init__(self, records: Any, read: Callable[[dict, str], np.ndarray], num_classes: int, where: str):
        self._records, self._read, self._num_classes, self._where = records, read, num_classes, where

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record, where = self._records[index], f"record {index} of {self._where}"
        label = int(record["label"])
        if not 0 <= label < self._num_classes:
            raise UserError(
                f"The label of {where} is {label}, but data.num_classes={self._num_classes} allows 0 to "
                f"{self._num_classes - 1}: set data.num_classes to the number of classes in the data."
            )
        return {"image": self._read(record, where), "label": np.int32(label)}


def _tfds(data: Any) -> _Tfds:
    import tensorflow_datasets as tfds

    builder, where = _tfds_builder(data)
    feature = "image" if data.space == "pixel" else "latent"
    features = dict(builder.info.features)
    if missing := {feature, "label"} - features.keys():
        raise UserError(
            f"data.space={data.space} needs the features {feature} and label, but {where} has "
            f"{', '.join(sorted(features))}: prepare it with {' and '.join(sorted(missing))}, or use another dataset."
        )
    classes = getattr(features["label"], "num_classes", None)
    if classes not in (None, data.num_classes):
        raise UserError(f"data.num_classes is {data.num_classes}, but {where} has {classes}: set it to {classes}.")
    if data.space == "latent":
        _check_latents(features["latent"], data, where)
        records = _tfds_records(builder, data, where, decoders=None)
        return _Tfds(records, lambda record, _: record["latent"].astype(np.float32), data.num_classes, where)
    if not isinstance(features["image"], tfds.features.Image) or features["image"].np_dtype != np.uint8:
        raise UserError(
            f"data.space=pixel needs a tfds.features.Image of uint8, but the feature image of {where} is "
            f"{features['image']}: prepare it as such, or use another dataset."
        )
    # Pillow decodes the stored bytes itself: grey, palette and CMYK files come out right whatever the
    # feature's nominal shape, and nothing imports TensorFlow or OpenCV.
    records = _tfds_records(builder, data, where, decoders={"image": tfds.decode.SkipDecoding()})
    size, channels = data.image_size, data.channels
    return _Tfds(
        records,
        lambda record, where: _decode(lambda: record["image"], where, size, channels),
        data.num_classes,
        where,
    )


def _tfds_builder(data: Any) -> tuple[Any, str]:
    """The builder of a prepared dataset, and the words that name it in messages."""
    import tensorflow_datasets as tfds

    if not data.name:
        try:
            return tfds.builder_from_directory(data.dir), f"the TFDS dataset in {data.dir}"
        except (OSError, ValueError) as error:
            raise UserError(
                f"data.name is empty and data.dir is {data.dir!r}, but that is no prepared TFDS dataset (no "
                "readable dataset_info.json): give a data.name, or the folder of one version of a dataset."
            ) from error
    try:
        builder = tfds.builder(data.name, data_dir=data.dir or None)
    except (ValueError, AssertionError, OSError) as error:  # TFDS: unknown name, config; version; unreadable
        reason = str(error).splitlines()[0].rstrip(".:")
        raise UserError(
            f"data.name is {data.name!r}, but TFDS has no such dataset ({reason}): "
            "name one of tfds.list_builders() or one prepared under data.dir."
        ) from error
    where = f"the TFDS dataset {data.name}"
    if not builder.info.splits:
        raise UserError(
            f"data.name is {data.name!r}, but that is not prepared in {builder.data_dir}: "
            f"run {_prepare_call(data.name, data.dir)} once, or set data.dir to where it is."
        )
    return builder, where


def _tfds_records(builder: Any, data: Any, where: str, decoders: Any) -> Any:
    try:
        return builder.as_data_source(data.split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"Reading in random order needs array_record, but {where} is stored as "
            f"{builder.info.file_format.value} in {builder.data_dir}: choose another data.dir and run "
            f"{_prepare_call(builder.name, '…')} for it."
        ) from error
    except ValueError as error:
        raise UserError(
            f"data.split is {data.split!r}, but {where} has the splits "
            f"{', '.join(builder.info.splits)}: use one of them or a slice that is not empty, such as 'train[:90%]'."
        ) from error


def _prepare_call(name: str, data_dir: str) -> str:
    directory = f', data_dir="{data_dir}"' if data_dir else ""
    return f'tfds.builder("{name}"{directory}, file_format="array_record").download_and_prepare()'


def _check_latents(feature: Any, data: Any, where: str) -> None:
    expected = (data.image_size, data.image_size, data.channels)
    if tuple(feature.shape) != expected or not jnp.issubdtype(feature.np_dtype, jnp.floating):
        raise UserError(
            f"The config asks for latents of floats {expected} (image_size, image_size, channels), but {where} has "
            f"{np.dtype(feature.np_dtype).name} {tuple(feature.shape)}: set data.image_size and data.channels to fit."
        )


# ------------------------------------------------------------------------------------------------ pixels


def _decode(read_bytes: Callable[[], bytes], where: str, size: int, channels: int) -> np.ndarray:
    """An image file's bytes → float32 (size, size, channels) in [-1, 1]."""
    try:
        image = Image.open(io.BytesIO(read_bytes()))
        image.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(
            f"The image {where} cannot be read ({type(error).__name__}): repair it or remove it."
        ) from error
    if image.mode.startswith(("I", "F")):  # convert() would clip those to 255 without a word
        raise UserError(f"The image {where} has {image.mode} pixels, but 8 bits a channel are needed: convert it.")
    pixels = np.asarray(center_crop(image.convert(MODES[channels]), size), np.float32)
    return pixels.reshape(size, size, channels) / 127.5 - 1


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, (size, size) pixels, shrunk as ADM and DiT do it.

    Halved with a box filter while the short side is at least twice `size`, then bicubic to it, then cut.
    Source: `center_crop_arr`, guided_diffusion/image_datasets.py (openai/guided-diffusion), train.py
    (facebookresearch/DiT); pixel for pixel the same, so that published teachers see what they learned from.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_uint8(images: Any) -> np.ndarray:
    """Images of any shape in [-1, 1] → uint8 grey levels 0 … 255, rounded; values outside are clipped.

    Raises:
      UserError: a pixel is NaN, which no grey level stands for.
    """
    levels = (np.asarray(images, np.float32) + 1) * 127.5
    if np.isnan(levels).any():
        raise UserError(
            f"{np.isnan(levels).sum()} of {levels.size} pixels are NaN, but pictures need numbers: "
            "the model that made them has diverged, use an earlier checkpoint."
        )
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def labels_and_images(source: Any, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All images of a pixel source, or `limit` of them spread evenly over it (folders are sorted by class).

    Returns:
      images uint8 (record, H, W, C) and labels int32 (record,), in the order of the source.
    """
    count = len(source) if limit is None else min(limit, len(source))
    images = np.empty((count, *source[0]["image"].shape), np.uint8)
    labels = np.empty(count, np.int32)

    def read(row: int) -> None:
        record = source[row * len(source) // count]
        images[row], labels[row] = to_uint8(record["image"]), record["label"]

    _in_threads(read, count)
    return images, labels


def in_memory(source: Any, limit_bytes: int = 2**30) -> Any:
    """The source with every record decoded into memory, or the source itself where that takes over `limit_bytes`.

    Records may be any dict of arrays and numbers whose shapes and types are the same in every record.
    """
    if isinstance(source, InMemory) or not len(source):
        return source
    first = {name: np.asarray(value) for name, value in source[0].items()}
    if len(source) * sum(value.nbytes for value in first.values()) > limit_bytes:
        return source
    arrays = {name: np.empty((len(source), *value.shape), value.dtype) for name, value in first.items()}

    def read(row: int) -> None:
        for name, value in source[row].items():
            arrays[name][row] = value

    _in_threads(read, len(source))
    return InMemory(arrays)


def _in_threads(function: Callable[[int], None], count: int, chunk: int = 64) -> None:
    """Calls function(0) … function(count - 1) from several threads; the first exception is raised here."""

    def run(start: int) -> None:
        for index in range(start, min(start + chunk, count)):
            function(index)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(run, range(0, count, chunk)):
            pass


# ------------------------------------------------------------------------------------------------ stream


def stream(
    source: Any,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = THREADS,
) -> grain.DatasetIterator:
    """Endless shuffled batches: what is read is a function of (source, batch_size, seed, batches read so far) alone.

    The records stand in one endless row, every epoch in a new order; global batch k is positions
    [k·batch_size, (k+1)·batch_size) of it, and process p of P gets its rows [p·B/P, (p+1)·B/P), in that order.

    Args:
      source: any source whose records are dicts of arrays and numbers.
      batch_size: records of a global batch, over all processes.
      seed: of the order, at least 0.
      process_index, process_count: this host and how many there are.
      num_threads: threads that read records while the last batch is worked on; an `InMemory` source needs none.

    Returns:
      A Grain iterator of dicts name → array (batch_size / process_count, …): the records' own entries, and
      "position" int64, each record's place in the endless row, for noise, times and dropout to be drawn from.
      `get_state()` is a JSON-serialisable count of the batches handed out, the same on every process and for
      every process count; `set_state()` of it goes on with the next batch, bit for bit.

    Raises:
      UserError: batch_size is not a positive multiple of process_count, seed is negative, the source is empty.
        Iterating raises what reading a record raises.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size is {batch_size}, but it must be a positive multiple of the {process_count} processes (hosts)."
        )
    if seed < 0:
        raise UserError(f"The data seed is {seed}, but it must be 0 or more.")
    if not len(source):
        raise UserError("The data source holds no records, but training needs at least one: check the data section.")
    if isinstance(source, InMemory):
        take = source.take
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # as Grain advises: threads only cost here
    else:
        take = functools.partial(_take, source, ThreadPoolExecutor(num_threads), num_threads)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)  # batches; each is read by the pool
    batches = _Batches(take, len(source), seed, batch_size, process_index, process_count)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


class Joined:
    """Several streams read side by side: the batches of each under its name, and one state for all.

    Args:
      streams: name → what `stream` returns.
    """

    def __init__(self, streams: Mapping[str, Any]):
        self.streams = dict(streams)

    def __iter__(self) -> "Joined":
        return self

    def __next__(self) -> dict[str, dict[str, np.ndarray]]:
        return {name: next(batches) for name, batches in self.streams.items()}

    def get_state(self) -> dict[str, Any]:
        return {name: batches.get_state() for name, batches in self.streams.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state of `get_state` was taken, bit for bit."""
        for name, batches in self.streams.items():
            batches.set_state(state[name])


@dataclasses.dataclass(frozen=True)
class _Batches:
    """This process's part of every global batch, by the batch's number.

    Grain would shuffle and batch record by record, which costs a millisecond for 64 digits; one gather costs 20 µs.
    """

    take: Callable[[np.ndarray], dict[str, np.ndarray]]
    length: int
    seed: int
    batch_size: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size  # the last position still fits 64 bits

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        rows = self.batch_size // self.process_count
        first = number * self.batch_size + self.process_index * rows
        positions = np.arange(first, first + rows, dtype=np.int64)
        return self.take(_shuffled(positions, self.length, self.seed)) | {"position": positions}


def _take(source: Any, pool: ThreadPoolExecutor, parts: int, indices: np.ndarray) -> dict[str, np.ndarray]:
    """`InMemory.take` for any source: the records are read by `pool` in `parts` runs."""

    def read(part: np.ndarray) -> list[dict]:
        return [source[int(index)] for index in part]

    records = [record for part in pool.map(read, np.array_split(indices, parts)) for record in part]
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def _shuffled(positions: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Places in the endless row (batch,) → records (batch,)."""
    epochs, offsets = np.divmod(positions, length)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _order(length, seed, int(epoch))[offsets[here]]
    return indices


@functools.lru_cache(maxsize=4)  # a batch touches one epoch, or two where they meet; two streams may be joined
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: Grain's own shuffle costs 12 µs an index, half a training step for digits."""
    return np.random.default_rng([seed, epoch]).permutation(length)
