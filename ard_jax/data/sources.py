"""Images with labels: scikit-learn's digits, a prepared TFDS dataset, a folder, OpenMoji, or drawn shapes.

A label is a class, or where there are no classes (`num_classes` is 0) the number of a caption.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ard_jax.data.captioned import ImageFolder, Shapes
from ard_jax.data.folder import Folder
from ard_jax.data.memory import InMemory, Record, Source, in_threads
from ard_jax.data.pixels import MODES, decode, to_uint8
from ard_jax.errors import UserError, first_line

if TYPE_CHECKING:
    import tensorflow_datasets as tfds  # takes seconds, and only two sources need it

    from ard_jax.data.openmoji import OpenMoji


def image_source(data: ConfigDict) -> Source:
    """The labelled images that a config's `data` section names.

    Args:
      data: an object with the fields
        source: "digits" (scikit-learn's, 1797 of 8×8×1), "tfds" or "folder"; with captions "imagefolder" (a folder with
          a metadata.jsonl), "shapes" (96 drawn ones) or "tfds"; "openmoji" (3,953 pictures) has both.
        name: a TFDS name such as "cifar10" or "name/config:1.0.0"; "" to open `dir` itself as a prepared dataset.
        dir: TFDS's data_dir ("" is TFDS's default), or the prepared dataset, or the folder with one sub-folder a class,
          or where OpenMoji's pictures are drawn ("" is the user's cache).
        split: "train"; for "tfds" any split expression such as "train[:90%]"; for "openmoji" also "held_out", "all".
        image_size: height and width of the images (pixels) or latents (latent pixels) that come out.
        channels: their channels; 1 or 3 for pixels.
        num_classes: labels lie in [0, num_classes); 0 for captions, of which record i has number i, or the number
          that is its label where there are no captions but labels, as in latents that `encode` made.
        caption_key: what a caption is called in a line of metadata.jsonl, or among a TFDS dataset's features.
        space: "pixel" (feature "image": uint8, cropped and resized as ADM does, in [-1, 1]) or "latent" (TFDS only;
          feature "latent": float (H, W, C), used as it is).

    Returns:
      A source of records `{"image": float32 (H, W, C), "label": np.int32}`; of a folder, see `Folder`.

    Raises:
      UserError: a field is wrong, the data are missing or of another shape or format. An image that cannot be
        read and a label out of range raise it when that record is read.
    """
    classed: dict[str, Callable[[ConfigDict], Source]] = {
        "digits": _digits, "tfds": _tfds, "folder": Folder, "openmoji": _openmoji,
    }  # fmt: skip
    captioned: dict[str, Callable[[ConfigDict], Source]] = {
        "imagefolder": ImageFolder, "shapes": Shapes, "tfds": _tfds, "openmoji": _openmoji,
    }  # fmt: skip
    makers = classed if data.num_classes else captioned
    if data.source not in {**classed, **captioned}:
        known = ", ".join({**classed, **captioned})
        raise UserError(f"data.source is {data.source!r}, but it must be one of {known}.")
    if data.source not in makers:
        has, lacks = ("classes", "captions") if data.source in classed else ("captions", "classes")
        raise UserError(
            f"data.source is {data.source!r}, which has {has} and no {lacks}, but data.num_classes is "
            f"{data.num_classes}: set it to {'0' if has == 'captions' else 'their number'}, or name one of "
            f"{', '.join(makers)}."
        )
    if data.space not in ("pixel", "latent"):
        raise UserError(f"data.space is {data.space!r}, but it must be pixel or latent.")
    if data.space == "latent" and data.source != "tfds":
        raise UserError(f"data.space=latent needs data.source=tfds, but data.source is {data.source!r}.")
    if data.space == "pixel" and data.channels not in MODES:
        raise UserError(f"data.channels is {data.channels}, but images have 1 (grey) or 3 (RGB): set one of them.")
    if data.source not in ("tfds", "openmoji") and data.split != "train":
        raise UserError(f"data.split is {data.split!r}, but data.source={data.source} has only the split train.")
    return makers[data.source](data)


def _digits(data: ConfigDict) -> InMemory:
    from sklearn.datasets import load_digits

    if (data.image_size, data.channels, data.num_classes) != (8, 1, 10):
        raise UserError(
            f"data.source=digits holds 8×8 images of 1 channel in 10 classes, but the config asks for image_size="
            f"{data.image_size}, channels={data.channels}, num_classes={data.num_classes}: set them to 8, 1 and 10."
        )
    digits = load_digits()
    images = digits.images[..., None].astype(np.float32) / 8 - 1  # grey levels 0 … 16
    return InMemory({"image": images, "label": digits.target.astype(np.int32)})


def _openmoji(data: ConfigDict) -> "OpenMoji":
    from ard_jax.data.openmoji import OpenMoji  # which imports TFDS

    return OpenMoji(data)


class Identity(TypedDict):
    """What data are, wherever they lie: classes by number, how many records, a hash of the files' names and sizes."""

    classes: list[str] | None
    records: int
    sha256: str


def identify(data: ConfigDict, source: Source) -> Identity:
    """Tells what data are.

    Args:
      data: what `image_source` takes.
      source: what it made of them.

    Returns:
      Their identity; names of the classes in the order of their numbers, or None where the data do not tell.
    """
    if isinstance(source, Folder):
        return {"classes": source.classes, "records": len(source), "sha256": source.sha256()}
    if data.source == "openmoji":
        pictures = cast("OpenMoji", source)
        return {"classes": pictures.classes, "records": len(source), "sha256": pictures.sha256()}
    if isinstance(source, ImageFolder):
        return {"classes": None, "records": len(source), "sha256": source.sha256()}
    if data.source == "shapes":
        return {"classes": None, "records": len(source), "sha256": "drawn"}
    if data.source == "digits":
        return {"classes": [str(digit) for digit in range(10)], "records": len(source), "sha256": "scikit-learn"}
    info = _tfds_builder(data)[0].info
    names = getattr(info.features["label"], "names", None) if data.num_classes else None
    splits = sorted((name, split.num_examples, split.num_bytes) for name, split in info.splits.items())
    sha256 = hashlib.sha256(f"{info.full_name} {data.split} {splits}".encode()).hexdigest()
    return {"classes": list(names) if names else None, "records": len(source), "sha256": sha256}


class _Tfds:
    """A prepared TFDS dataset: `read(record, where)` makes the image, labels are checked here.

    `num_classes` is None if a record's own number is its label, and 0 if labels are numbers of captions.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        read: Callable[[dict, str], np.ndarray],
        num_classes: int | None,
        where: str,
    ):
        self._records, self._read, self._num_classes, self._where = records, read, num_classes, where

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        where = f"record {index} of {self._where}"
        try:
            record = self._records[index]
        except RuntimeError as error:  # ArrayRecord's own checksums
            raise UserError(
                f"{where} cannot be read ({first_line(error)}): restore its files, or run again what made them, such "
                f"as 'encode'."
            ) from error
        if self._num_classes is None:
            return {"image": self._read(record, where), "label": np.int32(index)}
        label = int(record["label"])
        if not 0 <= label < (self._num_classes or np.inf):
            raise UserError(
                f"The label of {where} is {label}, but data.num_classes={self._num_classes} allows 0 to "
                f"{self._num_classes - 1}: set data.num_classes to the number of classes in the data."
            )
        return {"image": self._read(record, where), "label": np.int32(label)}


def _tfds(data: ConfigDict) -> _Tfds:
    import tensorflow_datasets as tfds

    builder, where = _tfds_builder(data)
    feature = "image" if data.space == "pixel" else "latent"
    features = dict(builder.info.features)
    has_captions = not data.num_classes and data.caption_key in features
    if missing := {feature, data.caption_key if has_captions else "label"} - features.keys():
        raise UserError(
            f"data.space={data.space} needs the features {feature} and label, but {where} has "
            f"{', '.join(sorted(features))}: prepare it with {' and '.join(sorted(missing))}, or use another dataset."
        )
    num_classes = None if has_captions else data.num_classes
    classes = getattr(features.get("label"), "num_classes", None)
    if data.num_classes and classes not in (None, data.num_classes):
        raise UserError(f"data.num_classes is {data.num_classes}, but {where} has {classes}: set it to {classes}.")
    if data.space == "latent":
        _check_latents(features["latent"], data, where)
        records = _tfds_records(builder, data, where, decoders=None)
        return _Tfds(records, lambda record, _: record["latent"].astype(np.float32), num_classes, where)
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
        lambda record, where: decode(lambda: record["image"], where, size, channels),
        num_classes,
        where,
    )


def captions_of(data: ConfigDict, source: Source) -> tuple[list[str], int]:
    """The captions of images in the order of their numbers, and how many, the last, are held out of training.

    Args:
      data: what `image_source` takes.
      source: what it made of them.

    Raises:
      UserError: they have none.
    """
    if isinstance(source, ImageFolder | Shapes):
        return source.captions, 0
    if data.source == "openmoji":
        pictures = cast("OpenMoji", source)
        return pictures.captions, pictures.held_out
    return tfds_texts(data), 0


def tfds_texts(data: ConfigDict) -> list[str]:
    """The texts of a prepared TFDS dataset under `data.caption_key`.

    Raises:
      UserError: there is no such dataset, or it has no such feature of text.
    """
    import tensorflow_datasets as tfds

    builder, where = _tfds_builder(data)
    features = dict(builder.info.features)
    if not isinstance(features.get(data.caption_key), tfds.features.Text):
        raise UserError(
            f"{where} has no captions under {data.caption_key!r}, but {', '.join(sorted(features))}: set "
            f"data.caption_key to a feature that is text."
        )
    images = [name for name, kind in features.items() if isinstance(kind, tfds.features.Image)]
    decoders = {name: tfds.decode.SkipDecoding() for name in images}  # which nobody looks at
    records = _tfds_records(builder, data, where, decoders=decoders)
    return [records[index][data.caption_key].decode() for index in range(len(records))]


def _tfds_builder(data: ConfigDict) -> tuple["tfds.core.DatasetBuilder", str]:
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


def _tfds_records(
    builder: "tfds.core.DatasetBuilder", data: ConfigDict, where: str, decoders: Any
) -> Sequence[dict[str, Any]]:
    from ard_jax.sharded import open_records  # which imports TFDS

    try:
        return open_records(builder, data.split, decoders)
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


def _check_latents(feature: "tfds.features.Tensor", data: ConfigDict, where: str) -> None:
    expected = (data.image_size, data.image_size, data.channels)
    if tuple(feature.shape) != expected or not jnp.issubdtype(feature.np_dtype, jnp.floating):
        raise UserError(
            f"The config asks for latents of floats {expected} (image_size, image_size, channels), but {where} has "
            f"{np.dtype(feature.np_dtype).name} {tuple(feature.shape)}: set data.image_size and data.channels to fit."
        )


class PixelRows:
    """Images of a pixel source as rows of an array that is not there: they are read where NumPy would take them.

    Args:
      source: the source.
      numbers: of the records that are rows, in their order.

    Attributes:
      shape: (record, H, W, C).
      dtype: uint8.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, source: Source, numbers: np.ndarray):
        self._source, self._numbers = source, numbers
        self.shape = (len(numbers), *source[0]["image"].shape)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """uint8 (row, H, W, C) of a slice, of numbers of rows, or of a mask of them."""
        return self.read(rows)[0]

    def read(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same, with the records' labels int32 (row,)."""
        numbers = self._numbers[rows]
        images, labels = np.empty((len(numbers), *self.shape[1:]), np.uint8), np.empty(len(numbers), np.int32)

        def read(row: int) -> None:
            record = self._source[int(numbers[row])]
            images[row], labels[row] = to_uint8(record["image"]), record["label"]

        in_threads(read, len(numbers))
        return images, labels

    def labels(self, at_once: int = 256) -> np.ndarray:
        """Labels of all rows, int32 (row,)."""
        parts = [self.read(slice(start, start + at_once))[1] for start in range(0, len(self), at_once)]
        return np.concatenate(parts)


def labels_and_images(
    source: Source, limit: int | None = None, limit_bytes: float = np.inf
) -> tuple[np.ndarray | PixelRows, np.ndarray]:
    """All images of a pixel source, or `limit` of them spread evenly over it (folders are sorted by class).

    Returns:
      images uint8 (record, H, W, C), in memory or where they take more than `limit_bytes` as `PixelRows`; and labels
      int32 (record,), in the order of the source.
    """
    count = len(source) if limit is None else min(limit, len(source))
    rows = PixelRows(source, np.arange(count) * len(source) // count)
    if np.prod(rows.shape) > limit_bytes:
        return rows, rows.labels()
    return rows.read(slice(None))
