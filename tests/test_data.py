"""Image sources against their originals, and the stream's promises: order, resuming, host counts."""

import io
import json
import re
import subprocess
import sys
import threading
import time

import grain
import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from ard_jax.data import (
    InMemory,
    center_crop,
    identify,
    image_source,
    in_memory,
    labels_and_images,
    to_uint8,
)
from ard_jax.data.memory import Readers
from ard_jax.data.stream import AHEAD, Joined, stream
from ard_jax.errors import UserError


def config(**fields):
    digits = dict(
        source="digits", name="", dir="", split="train", image_size=8, channels=1, num_classes=10, space="pixel"
    )
    return ml_collections.ConfigDict(digits | fields)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    file.seek(0)
    return file


def write_tfds(root, features, examples):
    """A prepared dataset root/toy/1.0.0 with the split train; images are given as files, so TensorFlow stays out."""
    directory = root / "toy" / "1.0.0"
    directory.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(name="toy", version="1.0.0", data_dir=str(directory), module_name="toy")
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=5, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": examples})
    writer.close_all()
    return directory


def image_features(classes=3):
    return {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=classes)}


class Counting:
    """Records that are not in memory; `reads` tells which were read, and by which threads."""

    def __init__(self, length):
        self._length, self.reads, self.threads = length, [], set()

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        self.reads.append(index)
        self.threads.add(threading.get_ident())
        return {"image": np.full((2, 2, 1), index, np.float32), "label": np.int32(index % 3)}


# ---------------------------------------------------------------------------------------- image sources


def test_digits_are_scikit_learns():
    source, digits = image_source(config()), load_digits()
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    assert len(source) == 1797
    for index in (0, 1000, 1796):
        record = source[index]
        assert record.keys() == {"image", "label"}
        assert (record["image"].dtype, record["image"].shape) == (np.float32, (8, 8, 1))
        assert (record["label"].dtype, record["label"]) == (np.int32, digits.target[index])
        np.testing.assert_array_equal(record["image"][..., 0], (digits.images[index] - 8) / 8)
    images = np.stack([source[index]["image"] for index in range(len(source))])
    assert (images.min(), images.max()) == (-1, 1)


@pytest.mark.parametrize("by_name", [True, False])
def test_tfds_dataset_that_is_on_disk(tmp_path, by_name):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
    directory = write_tfds(
        tmp_path, image_features(), [{"image": png(pixels[i]), "label": i % 3} for i in range(len(pixels))]
    )
    place = dict(name="toy:1.0.0", dir=str(tmp_path)) if by_name else dict(dir=str(directory))
    source = image_source(config(source="tfds", image_size=6, channels=3, num_classes=3, **place))
    assert len(source) == 12
    order = [int(np.argmin([np.abs(source[i]["image"] - p / 127.5 + 1).max() for p in pixels])) for i in range(12)]
    assert sorted(order) == list(range(12))  # TFDS shards in its own order
    for index, original in enumerate(order):
        record = source[index]
        assert record.keys() == {"image", "label"}
        assert (record["image"].dtype, record["label"].dtype) == (np.float32, np.int32)
        np.testing.assert_allclose(record["image"], pixels[original] / 127.5 - 1, atol=1e-6)
        assert record["label"] == original % 3
    half = image_source(config(source="tfds", image_size=6, channels=3, num_classes=3, split="train[:50%]", **place))
    assert len(half) == 6


def test_tfds_latents_are_used_as_they_are(tmp_path):
    latents = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float16) * 5
    features = {
        "latent": tfds.features.Tensor(shape=(4, 4, 2), dtype=np.float16, encoding=tfds.features.Encoding.BYTES),
        "label": tfds.features.Scalar(dtype=np.int64),
    }
    directory = write_tfds(tmp_path, features, [{"latent": latent, "label": 1} for latent in latents])
    fields = dict(source="tfds", dir=str(directory), image_size=4, channels=2, num_classes=2, space="latent")
    source = image_source(config(**fields))
    records = [source[i] for i in range(3)]
    assert all(record["image"].dtype == np.float32 and record["label"] == 1 for record in records)
    by_first = lambda values: sorted(values.tolist(), key=lambda value: value[0][0][0])  # noqa: E731
    assert by_first(np.stack([record["image"] for record in records])) == by_first(latents.astype(np.float32))
    with pytest.raises(UserError, match=r"floats \(8, 8, 2\).*has float16 \(4, 4, 2\): set data.image_size"):
        image_source(config(**fields | {"image_size": 8}))
    with pytest.raises(UserError, match="The label of record 0 of the TFDS dataset .* is 1, .* allows 0 to 0"):
        _ = image_source(config(**fields | {"num_classes": 1}))[0]


def test_a_damaged_record_of_tfds_is_named_in_a_sentence(tmp_path):
    """And not a traceback, after which what was trained since the last checkpoint would be lost."""
    features = {
        "latent": tfds.features.Tensor(shape=(4, 4, 64), dtype=np.float32, encoding=tfds.features.Encoding.BYTES),
        "label": tfds.features.Scalar(dtype=np.int64),
    }
    latents = np.random.default_rng(0).normal(size=(3, 4, 4, 64)).astype(np.float32)
    directory = write_tfds(tmp_path, features, [{"latent": latent, "label": 1} for latent in latents])
    (shard,) = directory.glob("*array_record*")
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1  # what follows the records is empty
    shard.write_bytes(content)
    fields = dict(source="tfds", dir=str(directory), image_size=4, channels=64, num_classes=2, space="latent")
    source = image_source(config(**fields))
    said = []
    for number, latent in enumerate(latents):
        try:
            np.testing.assert_array_equal(source[number]["image"], latent)
        except UserError as error:
            said.append((number, str(error)))
    ((broken, sentence),) = said
    assert re.fullmatch(f"record {broken} of the TFDS dataset in .* cannot be read .*such as 'encode'.", sentence)


def test_a_training_reads_tfds_without_importing_what_is_slow(tmp_path):
    directory = write_tfds(tmp_path, image_features(), [{"image": png(np.zeros((6, 6, 3), np.uint8)), "label": 0}])
    code = (
        "import sys; from types import SimpleNamespace as N; import ard_jax.stages.distill\n"
        "from ard_jax.data import image_source\n"
        f"data = N(source='tfds', name='', dir={str(directory)!r}, split='train', image_size=6, channels=3,"
        " num_classes=3, space='pixel')\n"
        "assert image_source(data)[0]['image'].max() == -1\n"
        "assert not {'tensorflow', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tfds_errors(tmp_path):
    example = {"image": png(np.zeros((6, 6, 3), np.uint8)), "label": 0}
    good = write_tfds(tmp_path / "good", image_features(), [example])
    example["image"].seek(0)
    old = write_tfds(tmp_path / "old", image_features(), [example])
    info = (old / "dataset_info.json").read_text()
    assert '"array_record"' in info
    (old / "dataset_info.json").write_text(info.replace('"array_record"', '"tfrecord"'))
    number = write_tfds(tmp_path / "number", {"label": tfds.features.Scalar(dtype=np.int64)}, [{"label": 1}])

    def sentence(**fields):
        with pytest.raises(UserError) as error:
            image_source(config(**dict(source="tfds", channels=3, num_classes=3) | fields))
        return str(error.value)

    assert sentence(dir=str(good), num_classes=4) == (
        f"data.num_classes is 4, but the TFDS dataset in {good} has 3: set it to 3."
    )
    assert sentence(dir=str(good), split="test") == (
        f"data.split is 'test', but the TFDS dataset in {good} has the splits train: "
        "use one of them or a slice that is not empty, such as 'train[:90%]'."
    )
    assert "data.split is 'train[:0]', but" in sentence(dir=str(good), split="train[:0]")
    assert sentence(dir=str(old)) == (
        f"Reading in random order needs array_record, but the TFDS dataset in {old} is stored as tfrecord in {old}: "
        'choose another data.dir and run tfds.builder("toy", data_dir="…", file_format="array_record")'
        ".download_and_prepare() for it."
    )
    assert "needs the features image and label, but" in sentence(dir=str(number))
    assert "has label: prepare it with image" in sentence(dir=str(number))
    assert f"data.dir is {str(tmp_path)!r}, but that is no prepared TFDS dataset" in sentence(dir=str(tmp_path))
    assert "data.dir is '', but that is no prepared TFDS dataset" in sentence(dir="")
    assert sentence(name="toyy", dir=str(tmp_path)) == (
        "data.name is 'toyy', but TFDS has no such dataset (Dataset toyy not found): "
        "name one of tfds.list_builders() or one prepared under data.dir."
    )
    assert "cifar10" in sentence(name="cifar10/nonsense", dir=str(tmp_path))
    assert sentence(name="mnist", dir=str(tmp_path)) == (
        f"data.name is 'mnist', but that is not prepared in {tmp_path}/mnist/3.0.1: run "
        f'tfds.builder("mnist", data_dir="{tmp_path}", file_format="array_record").download_and_prepare() once, '
        "or set data.dir to where it is."
    )


def classes_of(data):
    return identify(data, image_source(data))["classes"]


def test_names_of_the_classes(folder, tmp_path_factory):
    assert classes_of(config()) == [str(digit) for digit in range(10)]
    assert classes_of(config(source="folder", dir=str(folder), image_size=4, channels=3, num_classes=2)) == ["a", "b"]
    pixels = np.zeros((2, 2, 3), np.uint8)
    for label, expected in (
        (tfds.features.ClassLabel(names=["cat", "dog"]), ["cat", "dog"]),
        (tfds.features.Scalar(dtype=np.int64), None),
    ):
        features = image_features() | {"label": label}
        directory = write_tfds(tmp_path_factory.mktemp("tfds"), features, [{"image": png(pixels), "label": 1}])
        assert (
            classes_of(config(source="tfds", dir=str(directory), image_size=2, channels=3, num_classes=2)) == expected
        )


@pytest.fixture
def folder(tmp_path):
    """Class "a" has one red and one blue image, "b" one grey; a stray file and a hidden folder count for nothing."""
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
    red, blue = np.zeros((2, 4, 4, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    Image.fromarray(red).save(tmp_path / "a" / "1.png")
    Image.fromarray(blue).save(tmp_path / "a" / "2.PNG")
    Image.fromarray(np.full((4, 4), 51, np.uint8)).save(tmp_path / "b" / "0.bmp")
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder_of_images(folder):
    source = image_source(config(source="folder", dir=str(folder), image_size=4, channels=3, num_classes=2))
    records = [source[i] for i in range(len(source))]
    assert [int(record["label"]) for record in records] == [0, 0, 1]
    assert all(record["image"].shape == (4, 4, 3) and record["image"].dtype == np.float32 for record in records)
    expected = [(1, -1, -1), (-1, -1, 1), (-0.6, -0.6, -0.6)]
    for record, colour in zip(records, expected, strict=True):
        np.testing.assert_allclose(record["image"], np.broadcast_to(colour, (4, 4, 3)), atol=1e-6)
    grey = image_source(config(source="folder", dir=str(folder), image_size=2, channels=1, num_classes=2))
    assert grey[0]["image"].shape == (2, 2, 1)
    np.testing.assert_allclose(grey[0]["image"], 76 / 127.5 - 1, atol=1e-6)  # luma of red: 0.299 · 255


def test_folder_errors(folder):
    def sentence(read=None, **fields):
        defaults = dict(source="folder", dir=str(folder), image_size=4, channels=3, num_classes=2)
        with pytest.raises(UserError) as error:
            source = image_source(config(**defaults | fields))
            _ = source[read]
        return str(error.value)

    assert sentence(dir="") == "data.dir is '', but no such folder exists: name one with a sub-folder a class."
    assert f"data.dir is '{folder}/none', but no such folder" in sentence(dir=f"{folder}/none")
    assert sentence(dir=str(folder / "a")) == (
        f"The folder {folder}/a has no sub-folders, but it needs one a class with its images inside."
    )
    assert sentence(num_classes=5) == (
        f"The folder {folder} has 2 sub-folders (classes), but data.num_classes is 5: "
        "set it to 2 or name another folder."
    )
    whole = png(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)).read()
    for damaged in (whole[: len(whole) // 2], b"no image"):
        (folder / "a" / "1.png").write_bytes(damaged)
        message = sentence(read=0)
        assert message.startswith(f"The image {folder}/a/1.png cannot be read (")
        assert message.endswith("): repair it or remove it.") and "\n" not in message
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(folder / "a" / "1.png")
    assert sentence(read=0) == (
        f"The image {folder}/a/1.png has I;16 pixels, but 8 bits a channel are needed: convert it."
    )
    (folder / "b" / "0.bmp").unlink()
    assert f"The class folder {folder}/b holds no images" in sentence()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(source="mnist"),
            "data.source is 'mnist', but it must be one of digits, tfds, folder, openmoji, imagefolder, shapes.",
        ),
        (dict(space="wave"), "data.space is 'wave', but it must be pixel or latent."),
        (dict(space="latent"), "data.space=latent needs data.source=tfds, but data.source is 'digits'."),
        (dict(channels=4), "data.channels is 4, but images have 1 (grey) or 3 (RGB): set one of them."),
        (dict(split="test"), "data.split is 'test', but data.source=digits has only the split train."),
        (
            dict(image_size=16),
            "data.source=digits holds 8×8 images of 1 channel in 10 classes, but the config asks for "
            "image_size=16, channels=1, num_classes=10: set them to 8, 1 and 10.",
        ),
    ],
)
def test_wrong_fields(fields, sentence):
    with pytest.raises(UserError) as error:
        image_source(config(**fields))
    assert str(error.value) == sentence


# ------------------------------------------------------------------------------------------------ pixels


def test_center_crop_halves_by_boxes_and_takes_the_middle():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 28), dtype=np.uint8)
    boxes = pixels.astype(int)
    for _ in range(2):  # 16 → 8 → 4: means of pairs, along the width and then the height, each rounded half up
        boxes = (boxes[:, ::2] + boxes[:, 1::2] + 1) // 2
        boxes = (boxes[::2] + boxes[1::2] + 1) // 2
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 4))
    np.testing.assert_array_equal(cropped, boxes[:, 1:5])  # 7 wide: (7 − 4) // 2 = 1 column goes on the left


def bicubic_matrix(old, new):
    """Rows of weights of Pillow's bicubic resize (Keys, a = −1/2), widened by the scale where it shrinks."""
    scale = old / new
    distance = np.abs((np.arange(old) + 0.5)[None] - ((np.arange(new) + 0.5) * scale)[:, None]) / max(scale, 1)
    near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", [(7, 9), (9, 6), (4, 3)])  # between size and twice it, upright, smaller than size
def test_center_crop_is_bicubic_to_the_short_side(shape):
    size = 5
    pixels = np.random.default_rng(1).integers(60, 196, shape, dtype=np.uint8)
    height, width = (round(side * size / min(shape)) for side in shape)
    resized = bicubic_matrix(shape[0], height) @ pixels @ bicubic_matrix(shape[1], width).T
    top, left = (height - size) // 2, (width - size) // 2
    cropped = np.asarray(center_crop(Image.fromarray(pixels), size))
    assert cropped.shape == (size, size)
    np.testing.assert_allclose(cropped, resized[top : top + size, left : left + size], atol=1.01)  # two roundings


def test_to_uint8_rounds_and_clips():
    images = np.array([-1, 1, 0.001, -0.9961, -70.0, np.inf], np.float32)
    assert to_uint8(images).tolist() == [0, 255, 128, 0, 0, 255]
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels.astype(np.float32) / 127.5 - 1), levels)
    with pytest.raises(UserError, match="^1 of 2 pixels are NaN"):
        to_uint8(np.array([np.nan, 0]))


def test_labels_and_images():
    source, digits = image_source(config()), load_digits()
    images, labels = labels_and_images(source)
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (1797, 8, 8, 1), np.int32)
    np.testing.assert_array_equal(images[..., 0], np.rint(digits.images * 255 / 16))
    np.testing.assert_array_equal(labels, digits.target)
    some, some_labels = labels_and_images(source, limit=599)
    np.testing.assert_array_equal(some, images[::3])  # spread over the source, since folders are sorted by class
    np.testing.assert_array_equal(some_labels, labels[::3])
    assert len(labels_and_images(source, limit=5000)[0]) == 1797


def test_in_memory_holds_any_records_that_fit():
    random = np.random.default_rng(0)
    records = [
        {
            "noise": random.normal(size=(2, 2, 1)).astype(np.float16),
            "x0": random.normal(size=(3, 2, 2, 1)).astype(np.float16),
            "label": index % 4,
            "index": np.int64(index + 2**40),
        }
        for index in range(150)
    ]
    size = 150 * (8 + 24 + 8 + 8)
    assert in_memory(records, limit_bytes=size - 1) is records
    source = in_memory(records, limit_bytes=size)
    assert isinstance(source, InMemory) and len(source) == 150
    assert in_memory(source) is source
    for index in (0, 77, 149):
        for name, value in records[index].items():
            np.testing.assert_array_equal(source[index][name], value)
            assert source[index][name].dtype == np.asarray(value).dtype
    with pytest.raises(ValueError, match="read-only"):
        source[0]["noise"][:] = 0


# ------------------------------------------------------------------------------------------------ stream


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


def read(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.fixture(params=["memory", "storage"])
def source(request):
    return in_memory(Counting(10)) if request.param == "memory" else Counting(10)


def test_stream_shuffles_every_epoch_anew(source):
    batches = read(stream(source, batch_size=4, seed=7), 20)
    np.testing.assert_array_equal(np.concatenate([batch["position"] for batch in batches]), np.arange(80))
    assert batches[0]["position"].dtype == np.int64
    indices = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).astype(int)
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in batches]), indices % 3)
    epochs = indices.reshape(8, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in [*epochs.tolist(), list(range(10))]}) == 9
    other = np.concatenate([batch["image"][:, 0, 0, 0] for batch in read(stream(source, batch_size=4, seed=8), 20)])
    assert not np.array_equal(other.reshape(8, 10)[:7], epochs[1:])  # seed + epoch would only shift the epochs


def test_stream_resumes_bit_for_bit(source):
    def start(process_index=0, process_count=1):
        return stream(source, batch_size=6, seed=1, process_index=process_index, process_count=process_count)

    iterator = start()
    assert json.loads(json.dumps(iterator.get_state())) == iterator.get_state()
    read(iterator, 5)
    saved = json.dumps(iterator.get_state())  # what was prefetched beyond the fifth batch must not count
    rest = read(iterator, 4)
    restored = start()
    restored.set_state(json.loads(saved))
    for left, right in zip(rest, read(restored, 4), strict=True):
        assert_same(left, right)
    iterator.set_state(json.loads(saved))  # back in time, with other batches prefetched
    assert_same(rest[0], next(iterator))
    hosts = [start(process_index, 3) for process_index in range(3)]
    for host in hosts:
        host.set_state(json.loads(saved))
    for batch in rest:
        parts = [next(host) for host in hosts]
        assert_same(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})
    assert hosts[0].get_state() == hosts[2].get_state() == restored.get_state()


def test_joined_streams_go_on_together(source):
    def start():
        return Joined({"one": stream(source, batch_size=6, seed=1), "other": stream(Counting(7), batch_size=6, seed=2)})

    iterator = start()
    assert iter(iterator) is iterator
    alone = read(stream(Counting(7), batch_size=6, seed=2), 9)
    batches = read(iterator, 5)
    state = json.dumps(iterator.get_state())
    rest = read(iterator, 4)
    restored = start()
    restored.set_state(json.loads(state))
    for left, right in zip(rest, read(restored, 4), strict=True):
        for name in ("one", "other"):
            assert_same(left[name], right[name])
    for left, right in zip([*batches, *rest], alone, strict=True):
        assert_same(left["other"], right)


class Breakable(Counting):
    """Record 3 cannot be read while the source is broken."""

    broken = True

    def __getitem__(self, index):
        if self.broken and index == 3:
            raise UserError("The image 3 cannot be read: repair it or remove it.")
        return super().__getitem__(index)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("names", [("whole", "breakable"), ("breakable", "whole")])
def test_joined_streams_stay_where_they_are_when_one_cannot_be_read(names, threads):
    """What is saved then is where both go on, bit for bit, once the record is mended."""
    breakable = Breakable(20)
    sources = {"whole": Counting(20), "breakable": breakable}

    def start():
        streams = ((name, stream(sources[name], batch_size=4, seed=6, num_threads=threads)) for name in names)
        return Joined(dict(streams))

    breakable.broken = False
    uninterrupted = read(start(), 8)
    first = next(k for k, batch in enumerate(uninterrupted) if 3 in batch["breakable"]["image"])
    assert first > 0
    breakable.broken = True
    iterator = start()
    read(iterator, first)
    before = iterator.get_state()
    for _ in range(2):
        with pytest.raises(UserError, match="3 cannot be read"):
            next(iterator)
        assert iterator.get_state() == before
    breakable.broken = False
    resumed = start()
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    for goes_on in (iterator, resumed):
        for left, right in zip(read(goes_on, 8 - first), uninterrupted[first:], strict=True):
            for name in names:
                assert_same(left[name], right[name])


def test_stream_of_fewer_records_than_a_batch():
    batch = next(stream(Counting(3), batch_size=8, seed=0))
    assert np.bincount(batch["image"][:6, 0, 0, 0].astype(int)).tolist() == [2, 2, 2]
    assert batch["image"].shape == (8, 2, 2, 1)


@pytest.mark.parametrize(("memory", "batches"), [(2**30, AHEAD // 4), (40 * 28, 10), (0, 2)])
def test_stream_reads_ahead_in_threads_but_not_far(memory, batches):
    source = Counting(1000)
    iterator = stream(source, batch_size=4, seed=0, num_threads=3, memory=memory)
    probed = len(source.reads)  # how large a record is: 28 bytes
    read(iterator, 2)
    ahead = probed + 4 * (2 + batches)  # two batches handed out, the others on their way
    deadline = time.monotonic() + 10
    while len(source.reads) < ahead and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)  # long enough for a reader that would not stop there
    assert len(source.reads) == ahead
    assert threading.get_ident() not in source.threads


class Bucket(Counting):
    """Records of which none comes before `expected` are on their way at once."""

    def __init__(self, length, expected):
        super().__init__(length)
        self.open, self.lock, self.under_way, self.expected = threading.Event(), threading.Lock(), 0, expected

    def __getitem__(self, index):
        with self.lock:
            self.under_way += index != FIRST  # whose size is looked at
            if self.under_way == self.expected:
                self.open.set()
        assert index == FIRST or self.open.wait(60), f"only {self.under_way} reads at once"
        return super().__getitem__(index)


FIRST = int(next(stream(in_memory(Counting(5000)), batch_size=1, seed=3))["image"][0, 0, 0, 0])


@pytest.mark.parametrize("where", ["records", "conditions"])
def test_a_slow_bucket_is_asked_for_many_records_at_once(where):
    """16 records a step, by 64 readers: those of four batches are on their way before the first has come."""
    bucket, readers = Bucket(5000, expected=64), Readers(64)
    if where == "records":
        batches = stream(bucket, batch_size=64, seed=3, process_index=1, process_count=4, num_threads=64)
    else:
        source = in_memory(Counting(5000))

        def complete(batch):
            rows = readers.read(bucket, batch["image"][:, 0, 0, 0])
            return batch | {"condition": np.stack([row["image"] for row in rows])}

        batches = stream(
            source, batch_size=64, seed=3, process_index=1, process_count=4, num_threads=64, complete=complete
        )
    quick = stream(in_memory(Counting(5000)), batch_size=64, seed=3, process_index=1, process_count=4)
    state = batches.get_state()
    for _ in range(3):
        batch, expected = next(batches), next(quick)
        np.testing.assert_array_equal(batch.pop("condition", batch["image"]), expected["image"])
        assert_same(batch, expected)
    batches.set_state(state)
    quick.set_state(state)
    np.testing.assert_array_equal(next(batches)["image"], next(quick)["image"])
    assert threading.get_ident() not in bucket.threads


def test_stream_passes_on_what_a_record_raises(folder):
    (folder / "a" / "1.png").write_bytes(b"no image")
    source = image_source(config(source="folder", dir=str(folder), image_size=4, channels=3, num_classes=2))
    with pytest.raises(UserError, match="a/1.png cannot be read"):
        next(stream(source, batch_size=3, seed=0))


@pytest.mark.parametrize(
    ("length", "fields", "sentence"),
    [
        (
            9,
            dict(batch_size=6, seed=0, process_count=4),
            "batch_size is 6, but it must be a positive multiple of the 4",
        ),
        (9, dict(batch_size=0, seed=0), "batch_size is 0, but it must be a positive multiple"),
        (9, dict(batch_size=6, seed=-1), "The data seed is -1, but it must be 0 or more."),
        (0, dict(batch_size=6, seed=0), "The data source holds no records"),
    ],
)
def test_stream_errors(length, fields, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        stream(Counting(length), **fields)
