"""The latent dataset: what a record is, the same whoever makes it, whole or absent, and what it is refused for."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from pipeline_fixtures import ROOT, copy, done, files, sentence
from pipeline_fixtures import smoke as run_smoke

from ard_jax.convert import vae_to_diffusers
from ard_jax.convert.vae import vae_shapes
from ard_jax.data import identify, image_source
from ard_jax.errors import UserError
from ard_jax.files import file_sha256, read_json, write_json
from ard_jax.models import AutoencoderKL
from ard_jax.models.vae import to_latents
from ard_jax.stages import encode
from ard_jax.weights.tensors import read_tensors, write_tensors
from configs import smoke

# Four images of 8×8 in two classes, latents of 4×4 with 2 channels, eight records in three files.
SETTINGS = {
    "data.space": "latent",
    "data.source": "tfds",
    "data.image_size": 4,
    "data.channels": 2,
    "data.num_classes": 2,
    "encode.image_size": 8,
    "encode.batch_size": 2,
    "encode.shard_size": 3,
    "encode.dtype": "float32",
}


def make_vae(folder, **fields):
    """A small random autoencoder in diffusers' format; returns the model and its parameters."""
    fields = dict(in_channels=3, out_channels=3, latent_channels=2, shift_factor=0.1, scaling_factor=0.5) | fields
    model = AutoencoderKL(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, sample_size=8, **fields)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), vae_shapes(model))
    params["quant_conv"]["bias"][model.latent_channels :] = -2  # log variances
    state_dict, config = vae_to_diffusers(model, params)
    write_json(folder / "config.json", config)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", state_dict)
    return model, params


def make_images(folder, count=4):
    rng = np.random.default_rng(1)
    for index in range(count):
        path = folder / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


def start(workdir, **changes):
    """The stage in this process; changes by key, with `__` for the dot."""
    settings = {"encode.dir": workdir / "images", **SETTINGS}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return run_smoke("encode", workdir, *(f"{key}={value}" for key, value in settings.items()))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run: its workdir, model and parameters; not to be written to."""
    workdir = tmp_path_factory.mktemp("encode")
    make_images(workdir / "images")
    model, params = make_vae(workdir / "vae")
    outcome = start(workdir)
    assert outcome.status == 0, outcome.err
    (workdir / "log").write_text(outcome.err)
    return workdir, model, params


@pytest.fixture
def workdir(made, tmp_path):
    """The same images and autoencoder, nothing made of them."""
    return copy(made[0], tmp_path, "images", "vae")


def read(workdir):
    """The records by their index, through TFDS alone."""
    source = tfds.builder_from_directory(workdir / "latents" / "1.0.0").as_data_source("train")
    records = {int(record["index"]): record for record in source}
    assert len(records) == len(source)
    return records


def shard_hashes(workdir):
    return [file_sha256(path) for path in sorted((workdir / "latents" / "1.0.0").glob("*array_record*"))]


def pictures(workdir):
    """The images by their number, classes in the order of their names."""
    paths = sorted((workdir / "images").rglob("*.png"))
    return [np.asarray(Image.open(path), np.float32) / 127.5 - 1 for path in paths]


# ------------------------------------------------------------------------------------------------------ records


def test_a_record_is_what_the_model_gives(made):
    """Even records are images, odd ones their mirror images, and each has noise of its own."""
    workdir, model, params = made
    records, images = read(workdir), pictures(workdir)
    assert sorted(records) == list(range(8))
    views = np.stack([view for image in images for view in (image, image[:, ::-1])])
    key = jax.random.fold_in(jax.random.key(0), 2)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(np.arange(8))
    expected = jax.jit(to_latents, static_argnums=0)(model, params, views, keys)
    np.testing.assert_allclose(np.stack([records[i]["latent"] for i in range(8)]), expected, rtol=1e-4, atol=1e-5)
    assert [records[i]["label"] for i in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [bool(records[i]["flipped"]) for i in range(8)] == [False, True] * 4
    mirrored = np.stack([records[i]["latent"][:, ::-1] for i in range(0, 8, 2)])
    odd = np.stack([records[i]["latent"] for i in range(1, 8, 2)])
    assert np.abs(mirrored - odd).max() > 0.1  # latents of a mirror image are no mirrored latents


def test_the_mean_and_no_mirror_images_on_demand(made, workdir):
    _, model, params = made
    assert start(workdir, encode__sample=False, encode__horizontal_flip=False).status == 0
    records, images = read(workdir), np.stack(pictures(workdir))
    assert sorted(records) == [0, 1, 2, 3] and not any(record["flipped"] for record in records.values())
    expected = jax.jit(to_latents, static_argnums=0)(model, params, images)
    np.testing.assert_allclose(np.stack([records[i]["latent"] for i in range(4)]), expected, rtol=1e-4, atol=1e-5)


def test_another_seed_draws_other_latents_of_the_same_images(made, workdir):
    assert start(workdir, seed=1).status == 0
    ours, theirs = read(workdir), read(made[0])
    assert all(np.abs(ours[i]["latent"] - theirs[i]["latent"]).max() > 0.05 for i in range(8))
    assert all(np.abs(ours[i]["latent"] - theirs[i]["latent"]).max() < 2 for i in range(8))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_are_rounded_to_the_type_that_is_stored(made, workdir, dtype):
    assert start(workdir, encode__dtype=dtype).status == 0
    ours, theirs = read(workdir), read(made[0])
    for index in range(8):
        assert ours[index]["latent"].dtype == encode.DTYPES[dtype]
        np.testing.assert_array_equal(ours[index]["latent"], theirs[index]["latent"].astype(encode.DTYPES[dtype]))


@pytest.mark.parametrize("changes", [dict(encode__batch_size=1), dict(encode__batch_size=5), dict(run__workers=5)])
def test_the_shards_do_not_depend_on_batches_or_threads(made, workdir, changes):
    assert start(workdir, **changes).status == 0
    if "run__workers" in changes:
        assert shard_hashes(workdir) == shard_hashes(made[0])
    ours, theirs = read(workdir), read(made[0])
    for index, record in theirs.items():  # another batch size is another program, which may round otherwise
        assert ours[index]["label"] == record["label"]
        np.testing.assert_allclose(ours[index]["latent"], record["latent"], rtol=2e-3, atol=2e-3)


def test_the_shards_do_not_depend_on_the_number_of_devices(made, workdir):
    command = [sys.executable, "-m", "ard_jax", "encode", "--config", smoke.__file__, "--workdir", workdir]
    command += [f"--config.{key}={value}" for key, value in (SETTINGS | {"encode.dir": workdir / "images"}).items()]
    devices = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    subprocess.run(command, env=os.environ | {"XLA_FLAGS": devices}, check=True, capture_output=True, cwd=ROOT)
    assert shard_hashes(workdir) == shard_hashes(made[0])


# ------------------------------------------------------------------------------------------------- the dataset


def test_anybody_can_open_it(made):
    """With TFDS alone: nothing of ours, and no TensorFlow."""
    code = """if True:
        import json, sys
        import numpy as np
        import tensorflow_datasets as tfds
        builder = tfds.builder_from_directory(sys.argv[1])
        source = builder.as_data_source("train")
        record = {name: np.asarray(value) for name, value in source[3].items()}
        kinds = {name: [str(value.dtype), list(value.shape)] for name, value in record.items()}
        print(json.dumps([len(source), builder.info.features["label"].num_classes, kinds]))
        assert "tensorflow" not in sys.modules and "ard_jax" not in sys.modules
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, made[0] / "latents" / "1.0.0"]
    opened = subprocess.run(command, cwd=made[0], env=environment, capture_output=True, text=True)
    assert opened.returncode == 0, opened.stderr
    kinds = dict(latent=["float32", [4, 4, 2]], label=["int64", []], index=["int64", []], flipped=["bool", []])
    assert json.loads(opened.stdout) == [8, 2, kinds]


def flags(workdir):
    """What the stage ends by naming, and the sizes that go with it."""
    named = (workdir / "log").read_text().split("train on them with ")[1].split("\n")[0].split()
    sizes = [f"{key}={SETTINGS[key]}" for key in ("data.image_size", "data.channels", "data.num_classes")]
    return [flag.removeprefix("--config.") for flag in named] + sizes


def test_it_is_read_with_the_flags_that_the_stage_names(made):
    workdir, _, _ = made
    data = dict(flag.removeprefix("data.").split("=") for flag in flags(workdir))
    assert (data["source"], data["space"], data["dir"]) == ("tfds", "latent", str(workdir / "latents" / "1.0.0"))
    config = smoke.get_config()
    with config.unlocked():
        config.data.update({key: int(value) if value.isdigit() else value for key, value in data.items()})
    source = image_source(config.data)
    folders = sorted(path.name for path in (workdir / "images").iterdir())
    assert identify(config.data, image_source(config.data))["classes"] == folders and len(folders) == 2
    stored = {record["latent"].tobytes(): int(record["label"]) for record in read(workdir).values()}
    assert {source[i]["image"].tobytes(): int(source[i]["label"]) for i in range(8)} == stored and len(stored) == 8


@pytest.mark.slow
def test_a_teacher_trains_on_it(made, tmp_path):
    assert run_smoke("teacher", tmp_path, *flags(made[0]), "teacher.steps=2").status == 0
    assert done(tmp_path / "teacher")["step"] == 2


def test_the_manifest_says_how_it_was_made(made):
    workdir, _, _ = made
    manifest = read_json(workdir / "latents" / "manifest.json")
    assert (manifest["images"], manifest["records"], manifest["seed"]) == (4, 8, 0)
    assert (manifest["scaling_factor"], manifest["shift_factor"]) == (0.5, 0.1)
    assert (manifest["latent_shape"], manifest["num_classes"]) == ([4, 4, 2], 2)
    assert manifest["settings"]["horizontal_flip"] is True and manifest["settings"]["image_size"] == 8
    assert [shard["records"] for shard in manifest["shards"]] == [3, 3, 2]
    assert [shard["sha256"] for shard in manifest["shards"]] == shard_hashes(workdir)
    assert len(manifest["vae_sha256"]) == 64
    finished = done(workdir / "latents")
    assert finished["records"] == 8 and list(finished["sha256"].values()) == shard_hashes(workdir)
    log = (workdir / "log").read_text()
    assert "shard 3 of 3 written" in log and "latents/s" in log and "8 latents written" in log
    assert not [name for name in files(workdir / "latents") if ".partial" in name]


# --------------------------------------------------------------------------------------------- started again


def test_a_run_that_was_interrupted_makes_what_is_missing(made, workdir, monkeypatch):
    finite = encode.check_finite

    def interrupt(batch, dtype):
        if 5 in batch["index"]:  # in the middle of the second shard
            raise KeyboardInterrupt
        finite(batch, dtype)

    monkeypatch.setattr(encode, "check_finite", interrupt)
    assert start(workdir).status == 130
    (first,) = (workdir / "latents" / "1.0.0").iterdir()
    before = first.stat().st_mtime_ns
    assert not (workdir / "latents" / "manifest.json").exists()
    monkeypatch.undo()
    assert start(workdir).status == 0
    assert first.stat().st_mtime_ns == before
    assert shard_hashes(workdir) == shard_hashes(made[0])


def test_only_a_damaged_shard_is_made_again(made, workdir):
    assert start(workdir).status == 0
    paths = sorted((workdir / "latents" / "1.0.0").glob("*array_record*"))
    before = [path.stat().st_mtime_ns for path in paths]
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[1].write_bytes(content)
    assert start(workdir).status == 0
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, before, strict=True)] == [True, False, True]
    assert shard_hashes(workdir) == shard_hashes(made[0])


def test_processes_share_the_shards_out(made, workdir, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.sync_global_devices", lambda _: None)
    for name in ("check_same_settings", "check_same_workdir"):
        monkeypatch.setattr(f"ard_jax.hosts.{name}", lambda _: None)
    monkeypatch.setattr("ard_jax.hosts.gather_json", lambda value: [value])  # of both it is the same
    for process, there in ((1, [1]), (0, [0, 1, 2])):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        outcome = start(workdir)
        assert outcome.status == 0, outcome.err
        names = sorted(path.name for path in (workdir / "latents" / "1.0.0").glob("*array_record*"))
        assert [int(name.split("-")[-3]) for name in names] == there
    assert shard_hashes(workdir) == shard_hashes(made[0])


def test_images_are_read_ahead_by_threads_but_not_far():
    reads = []

    class Source:
        def __getitem__(self, image):
            reads.append(image)
            return {"image": np.full((1, 2, 1), image, np.float32), "label": np.int32(0)}

    with encode.ThreadPoolExecutor(3) as threads:
        batches = [(np.arange(first, first + 4), 4) for first in range(0, 40, 4)]
        ahead = encode.read_ahead(Source(), batches, 2, threads)
        batch, count = next(ahead)
    assert sorted(reads) == list(range(6)) and count == 4  # two images a batch: this one and two more
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], [0, 0, 1, 1])


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.space": "pixel"}, "data.space is 'pixel', but encode makes latents"),
        ({"encode.image_size": 9}, "encode.image_size 9 is not a multiple of 2"),
        (
            {"data.image_size": 8},
            "images of 8×8 become latents of 4×4 with 2 channels in the autoencoder in {}/vae, but data.image_size is "
            "8 and data.channels is 2: set them to 4 and 2, or change encode.image_size.",
        ),
        ({"data.channels": 4}, "data.image_size is 4 and data.channels is 4: set them to 4 and 2"),
        ({"data.num_classes": 3}, "has 2 sub-folders (classes), but data.num_classes is 3"),
        ({"encode.dir": ""}, "encode.dir is '', but no such folder exists"),
        ({"encode.source": "files"}, "encode.source is 'files', but it must be one of"),
        ({"encode.split": "test"}, "encode.split is 'test', but encode.source=folder has only the split train"),
        ({"encode.source": "tfds"}, "encode.name is empty and encode.dir is "),
        ({"encode.dtype": "int8"}, "encode.dtype is 'int8': choose float16, bfloat16 or float32."),
        ({"encode.batch_size": 0}, "encode.batch_size is 0: give a number of at least 1."),
        ({"encode.shard_size": -1}, "encode.shard_size is -1: give a number of at least 1."),
        ({"vae.dir": "nowhere"}, "there is no autoencoder in nowhere (no config.json): put one there with the stage"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(workdir, changes, said):
    before = files(workdir)
    found = sentence(start(workdir, **changes), "encode")
    assert said.format(workdir) in found
    assert files(workdir) == before


def test_a_broken_autoencoder_is_refused(workdir):
    weights, settings = workdir / "vae" / "diffusion_pytorch_model.safetensors", workdir / "vae" / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"{weights} is truncated or corrupt" in sentence(start(workdir), "encode")
    weights.write_bytes(whole)
    write_json(settings, read_json(settings) | {"latent_channels": 3})
    assert "does not fit the architecture that its config describes" in sentence(start(workdir), "encode")
    settings.write_text("[]")
    assert f"{settings} is damaged" in sentence(start(workdir), "encode")
    make_vae(workdir / "vae", in_channels=4, out_channels=4)
    assert "takes images of 4 channels, but images have 1 (grey) or 3 (RGB)" in sentence(start(workdir), "encode")
    assert not (workdir / "latents").exists()


def test_an_image_that_cannot_be_read_is_named(workdir):
    image = workdir / "images" / "class1" / "3.png"
    image.write_bytes(b"no image")
    assert f"The image {image} cannot be read" in sentence_of_running(start(workdir))
    there = sorted(path.name for path in (workdir / "latents" / "1.0.0").glob("*array_record*"))
    assert there == [f"latents-train.array_record-0000{shard}-of-00003" for shard in (0, 1)]  # the third has it
    assert not (workdir / "latents" / "manifest.json").exists()


def test_latents_that_are_not_finite_are_no_dataset(workdir):
    weights = workdir / "vae" / "diffusion_pytorch_model.safetensors"
    state_dict = read_tensors(weights)
    state_dict["quant_conv.bias"][0] = np.nan
    write_tensors(weights, state_dict)
    said = sentence_of_running(start(workdir))
    assert "the latent of record 0 is not finite in float32: see that" in said
    assert not list((workdir / "latents").rglob("*array_record*"))
    in_float16 = {"latent": np.asarray([1e4, np.inf]).reshape(2, 1, 1, 1).astype(np.float16), "index": np.arange(7, 9)}
    with pytest.raises(UserError, match="the latent of record 8 is not finite in float16"):
        encode.check_finite(in_float16, "float16")


def sentence_of_running(outcome):
    """The last line, after the log's."""
    assert outcome.status == 2 and "Traceback" not in outcome.err
    return outcome.err.strip().splitlines()[-1]


def test_a_folder_of_another_dataset_is_refused(made, workdir):
    assert start(workdir).status == 0
    before = shard_hashes(workdir)
    said = sentence(start(workdir, encode__horizontal_flip=False), "encode")
    assert "belongs to another config (encode.horizontal_flip True there, False here)" in said
    make_images(workdir / "images", count=5)
    assert "inputs.images '4' there, '5' here" in sentence(start(workdir), "encode")
    (workdir / "images" / "class0" / "4.png").unlink()
    settings = workdir / "vae" / "config.json"
    write_json(settings, read_json(settings) | {"scaling_factor": 0.25})
    assert "inputs.vae" in sentence(start(workdir), "encode")
    assert shard_hashes(workdir) == before
