"""Captions: their sources, their store, the stages that are told them, and a PixArt from its folder to its exports."""

import gc
import json
import re
import shlex
import subprocess
import sys
import weakref

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from pipeline_fixtures import ROOT, copy, done, files, run, sentence
from pixart_fixtures import small_pixart, write_pixart, write_text_encoder
from test_stages_latents import write_vae

from ard_jax import ARDPipeline
from ard_jax.captions import texts as caption_texts
from ard_jax.captions.conditions import check_texts
from ard_jax.captions.store import open_captions
from ard_jax.config import plain
from ard_jax.convert import pixart_to_published
from ard_jax.convert.published import NULL_CAPTION
from ard_jax.data import image_source
from ard_jax.errors import UserError
from ard_jax.files import read_json, read_npz, write_json
from ard_jax.models import network_shapes
from ard_jax.pipeline.prompts import Prompts
from ard_jax.text_encoders import open_text_encoder
from ard_jax.weights.tensors import read_tensors, write_tensors
from configs import smoke_captions

CONFIG = "configs/smoke_captions.py"
PROMPTS = ["a red apple", "green circle", "a", "red " * 30, "blue square a red circle"]


def stage(name, workdir, *overrides):
    return run(name, "--config", CONFIG, "--workdir", str(workdir), *(f"--config.{override}" for override in overrides))


def captions_config(**changes):
    config = smoke_captions.get_config()
    with config.unlocked():
        config.captions.update(changes.pop("captions", {}))
        config.data.update(changes.pop("data", {}))
    return config


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def encode(workdir, prompts, encoder, *more):
    settings = [f"captions.path={prompts}", f"captions.encoder={encoder}", "captions.source=file", "captions.length=20"]
    return stage("captions", workdir, *settings, "captions.shard_size=2", "captions.batch_size=2", *more)


# ----------------------------------------------------------------------------------------------------------- texts


def test_texts_of_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\n  two  \r\nthr\xc3\xa9e")
    assert caption_texts.read_texts(captions_config(captions={"source": "file", "path": str(path)})).texts == [
        "one", "two", "thrée"
    ]  # fmt: skip
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one", "x": 1}\n\n{"text": " "}\n{"text": "two"}\n')
    assert caption_texts.read_texts(captions_config(captions={"source": "file", "path": str(lines)})).texts == [
        "one",
        "two",
    ]
    given = captions_config(captions={"source": "prompts", "prompts": ("a", "b")})
    assert caption_texts.read_texts(given).texts == ["a", "b"]
    drawn, held_out = caption_texts.read_texts(captions_config())
    assert (
        len(drawn) == 96
        and not held_out
        and drawn[0] == drawn[1] == "a small red circle"
        and drawn[-1] == "a large black ring"
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"fine\n\xff\xfe", r"line 2 of .*a.txt is not UTF-8"),
        ("a.txt", b"\n \n", "which holds no caption"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', r"line 2 of .*a.jsonl has no string 'text'"),
        ("a.jsonl", b'{"text": "a"}\n["a"]', "line 2 of .*a.jsonl is no JSON object"),
        ("b.txt", None, "captions.path is .*b.txt', which is no file"),
    ],
)
def test_files_that_hold_no_captions(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        caption_texts.read_texts(captions_config(captions={"source": "file", "path": str(tmp_path / name)}))


def imagefolder(folder, captions):
    folder.mkdir(parents=True)
    lines = []
    for number, caption in enumerate(captions):
        name = f"{number}.png"
        Image.new("RGB", (20, 20), (number * 40, 0, 0)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_an_image_folder_with_its_metadata(tmp_path):
    folder = imagefolder(tmp_path / "pictures", ["black", "", "red"])
    config = captions_config(data={"source": "imagefolder", "dir": str(folder)}, captions={"source": "data"})
    source = image_source(config.data)
    assert [int(source[i]["label"]) for i in range(3)] == [0, 1, 2]  # a picture's caption is its own number
    assert np.rint((source[2]["image"][0, 0, 0] + 1) * 127.5) == 80
    assert caption_texts.read_texts(config).texts == ["black", "", "red"]  # an empty one stays with its picture
    for line, said in (
        ('{"file_name": "9.png", "text": "x"}', "names the picture '9.png', which is not there"),
        ('{"file_name": "../a.png", "text": "x"}', "names the picture '../a.png'"),
        ('{"file_name": "0.png"}', "line 1 of .* lacks file_name or text"),
    ):
        (folder / "metadata.jsonl").write_text(line)
        with pytest.raises(UserError, match=said):
            image_source(config.data)
    with pytest.raises(UserError, match="has captions and no classes, but data.num_classes is 3: set it to 0"):
        image_source(captions_config(data={"source": "imagefolder", "num_classes": 3}).data)
    with pytest.raises(UserError, match="has classes and no captions, but data.num_classes is 0: set it to their"):
        image_source(captions_config(data={"source": "digits", "channels": 1}).data)


def test_drawn_shapes_look_like_their_captions():
    config = captions_config(data={"image_size": 32})
    source, said = image_source(config.data), caption_texts.read_texts(config).texts
    for number, caption in enumerate(said):
        image = (np.asarray(source[number]["image"]) + 1) / 2
        inked = image.min(axis=-1) < 0.7
        red, green, blue = image[inked].mean(axis=0)
        if "red" in caption:
            assert red > 1.5 * max(green, blue)
        if "blue" in caption:
            assert blue > 1.5 * max(red, green)
        assert ("large" in caption) == (np.ptp(np.nonzero(inked)[1]) > 18)


# ----------------------------------------------------------------------------------------------------------- store


def test_a_record_is_its_text_s_own_vectors(tmp_path, prompts, encoder):
    outcome = encode(tmp_path / "run", prompts, encoder)
    assert outcome.status == 0, outcome.err
    assert "1 of 5 captions have over 20 tokens and are cut" in outcome.err
    store = open_captions(tmp_path / "run" / "captions")
    opened = open_text_encoder(str(encoder), 20, "none", jax.numpy.float32)
    assert len(store) == 5 and store.width == 20 and store.length == 32
    caption = store.rows(np.array([3, 0, 4]))
    assert caption.tokens.shape == (3, 32, 20) and caption.mask.sum(axis=1).tolist() == [20, 4, 6]
    for row, number in enumerate((3, 0, 4)):
        own = opened.encode([PROMPTS[number].strip()])[0]
        assert store.words(number) == PROMPTS[number].strip()
        kept = np.asarray(caption.tokens[row], np.float32)
        np.testing.assert_allclose(kept[: len(own)], own, rtol=2**-8, atol=1e-6)  # bfloat16's
        assert not kept[len(own) :].any()
    np.testing.assert_allclose(np.asarray(caption.null[1], np.float32), opened.null(), rtol=2**-8, atol=1e-6)
    # however they are batched and sharded, and after a restart that finds a shard broken
    for more in (("captions.batch_size=3",), ("captions.shard_size=5",)):
        workdir = tmp_path / more[0]
        assert encode(workdir, prompts, encoder, *more).status == 0
        other = open_captions(workdir / "captions")
        again = other.rows(np.arange(5))
        np.testing.assert_allclose(
            np.asarray(again.tokens, np.float32),
            np.asarray(store.rows(np.arange(5)).tokens, np.float32),
            rtol=2**-7,
            atol=1e-5,
        )
    before = done(tmp_path / "run" / "captions")["sha256"]
    shard = sorted((tmp_path / "run" / "captions" / "1.0.0").glob("*array_record*"))[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match="is missing or not whole"):
        open_captions(tmp_path / "run" / "captions")
    assert encode(tmp_path / "run", prompts, encoder).status == 0
    assert done(tmp_path / "run" / "captions")["sha256"] == before


def test_a_large_store_is_read_row_by_row_and_says_the_same(tmp_path, prompts, encoder, monkeypatch):
    assert encode(tmp_path / "run", prompts, encoder).status == 0
    numbers = np.array([3, 0, 4, 4])
    small = open_captions(tmp_path / "run" / "captions").rows(numbers)
    monkeypatch.setattr("ard_jax.captions.store.IN_MEMORY", 0)
    large = open_captions(tmp_path / "run" / "captions")
    for one, other in zip(jax.tree.leaves(small), jax.tree.leaves(large.rows(numbers)), strict=True):
        assert one.dtype == other.dtype and (np.asarray(one, np.float32) == np.asarray(other, np.float32)).all()
    assert "_all" not in vars(large) and small.tokens.flags.writeable  # a batch is nobody else's


def test_captions_of_a_tfds_dataset(tmp_path, prompts, encoder):
    """Here the store itself, which is one that has texts and no pictures."""
    assert encode(tmp_path / "run", prompts, encoder).status == 0
    dataset = str(tmp_path / "run" / "captions" / "1.0.0")
    found = caption_texts.read_texts(captions_config(captions={"source": "tfds", "path": dataset})).texts
    assert found == [prompt.strip() for prompt in PROMPTS]
    config = captions_config(captions={"source": "tfds", "path": dataset}, data={"caption_key": "index"})
    with pytest.raises(
        UserError, match="has no captions under 'index', but index, text, vectors: set data.caption_key"
    ):
        caption_texts.read_texts(config)


def test_other_captions_or_another_encoder_are_another_store(tmp_path, prompts, encoder):
    assert encode(tmp_path / "run", prompts, encoder).status == 0
    other = write_text_encoder(tmp_path / "other", seed=9)
    assert "belongs to another config (inputs.encoder" in sentence(encode(tmp_path / "run", prompts, other), "captions")
    prompts.write_text("something else")
    said = sentence(encode(tmp_path / "run", prompts, encoder), "captions")
    assert "inputs.texts" in said
    assert "there is no" not in said and files(tmp_path / "run" / "captions")


def test_the_stage_refuses(tmp_path, prompts, encoder):
    said = sentence(encode(tmp_path / "run", prompts, tmp_path / "none"), "captions")
    assert "none' is not there: give 'wordllama', or the folder" in said
    said = sentence(encode(tmp_path / "run", prompts, encoder, "captions.source=web"), "captions")
    assert "captions.source is 'web': choose one of data, file, tfds, prompts" in said
    assert not (tmp_path / "run").exists() or not files(tmp_path / "run")


# ------------------------------------------------------------------------------------------------- stages, on shapes


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A run of configs/smoke_captions.py, not to be written to."""
    pytest.importorskip("wordllama")
    workdir = tmp_path_factory.mktemp("captioned") / "run"
    for name in ("captions", "teacher", "trajectories", "distill", "sample", "evaluate", "report"):
        outcome = stage(name, workdir)
        assert outcome.status == 0, outcome.err
    return workdir


def test_a_run_with_captions_from_its_data_to_its_report(captioned):
    store = open_captions(captioned / "captions")
    recorded = read_json(captioned / "teacher" / "config.json")["inputs"]
    assert recorded == {"captions": store.sha256, "text_encoder": store.encoder_sha256}
    labels = read_npz(captioned / "sample" / "ard" / "samples.npz")["labels"]
    pictures = read_npz(captioned / "evaluate" / "pictures.npz")
    assert labels.max() < 96 and len(set(labels)) > 20
    known = {store.words(number) for number in range(96)}
    assert set(pictures["label"]) <= known and pictures["label"].dtype.kind == "U"
    page = (captioned / "report" / "index.html").read_text()
    assert all(str(label) in page for label in pictures["label"])


def hold_out(workdir, count):
    """Declares the last captions of a store held out of training."""
    path = workdir / "captions" / "manifest.json"
    path.write_text(json.dumps(read_json(path) | {"held_out": count}))


def test_held_out_captions_are_never_trained_on_and_are_measured_apart(captioned, tmp_path):
    workdir = copy(captioned, tmp_path / "run", "captions", "teacher")
    hold_out(workdir, 86)
    for name in ("trajectories", "distill"):
        assert stage(name, workdir).status == 0
    shard = tfds.builder_from_directory(workdir / "trajectories" / "1.0.0").as_data_source("train")
    assert {int(record["label"]) for record in shard} <= set(range(10))
    said = sentence(stage("sample", workdir, "sample.held_out=73"), "sample")
    assert "sample.held_out is 73, but it must be at most sample.count, which is 72" in said
    said = sentence(stage("sample", workdir, "sample.held_out=2", "sample.labels=(1,)"), "sample")
    assert "and sample.labels must be ()" in said
    for name in ("sample", "evaluate", "report"):
        assert stage(name, workdir, "sample.held_out=6").status == 0
    labels = read_npz(workdir / "sample" / "ard" / "samples.npz")["labels"]
    assert labels[-6:].tolist() == [10, 11, 12, 13, 14, 15] and labels[:-6].max() < 10
    found = read_json(workdir / "report" / "results.json")
    assert found["samples"] == 66 and found["real_images"] == 10
    for measured in (found["teacher"], found["ard"], found["judge"]["real"], found["judge"]["augmented"]):
        assert set(measured["recall_at_5"]) == {"trained", "held_out"}
        assert 0 <= measured["recall_at_1"]["trained"] <= measured["recall_at_5"]["trained"] <= 1
    gallery = read_npz(workdir / "evaluate" / "gallery.npz")
    assert gallery["held_out"].tolist() == [False] * 4 + [True] * 4
    assert gallery["label"][-1] == open_captions(workdir / "captions").words(13)
    assert np.array_equal(gallery["ard"][4], read_npz(workdir / "sample" / "ard" / "samples.npz")["arr_0"][66])
    page = (workdir / "report" / "index.html").read_text()
    assert "Captions trained on" in page and "Captions held out of training" in page


@pytest.mark.parametrize(
    ("overrides", "samples"),
    [(("sample.held_out=72",), 72), (("sample.labels=(1, 10, 2)",), 48)],  # of none but held-out ones; a third of them
)
def test_results_say_how_many_samples_were_held_against_real_images(captioned, tmp_path, overrides, samples):
    workdir = copy(captioned, tmp_path / "run", "captions", "teacher")
    hold_out(workdir, 86)
    outcome = stage("evaluate", workdir, "evaluate.draw=True", "sample.models=('teacher',)", *overrides)
    assert outcome.status == 0, outcome.err
    assert read_json(workdir / "evaluate" / "results.json")["samples"] == samples


def test_nothing_held_out_cannot_be_asked_for(captioned, tmp_path):
    workdir = copy(captioned, tmp_path / "run", "captions", "teacher", "distill")
    said = sentence(stage("sample", workdir, "sample.held_out=2"), "sample")
    assert "sample.held_out is 2, but nothing is held out of training: set it to 0" in said


def test_captions_of_another_encoder_are_refused_by_whoever_learned_others(captioned, tmp_path):
    workdir = copy(captioned, tmp_path / "run", "teacher", "captions")
    (workdir / "captions").rename(workdir / "before")
    assert stage("captions", workdir, "captions.length=12").status == 0
    for name in ("trajectories", "distill", "sample"):
        said = sentence(stage(name, workdir, "captions.length=12"), name)
        assert "were made by another text encoder" in said and "with the same encoder, length and cleaning" in said


def test_what_numbers_captions_is_refused_with_other_captions(captioned, tmp_path):
    """Trajectories and samples keep a caption's number alone, whose words another store of the same encoder has."""
    workdir = copy(captioned, tmp_path / "run", "captions", "teacher", "trajectories", "distill", "sample")
    (workdir / "captions").rename(workdir / "before")
    texts = tmp_path / "reversed.txt"
    texts.write_text("\n".join(reversed(caption_texts.read_texts(captions_config()).texts)))
    other = "captions.source=file", f"captions.path={texts}"
    assert stage("captions", workdir, *other).status == 0
    for name in ("distill", "finetune"):
        said = sentence(stage(name, workdir, *other), name)
        assert "the trajectory store was made of other captions (hash" in said and "make a store with this" in said
    before = {path: path.read_bytes() for path in (workdir / "sample").rglob("*.npz")}
    for name in ("sample", "evaluate"):
        said = sentence(stage(name, workdir, *other), name)
        assert f"{workdir / 'sample' / 'teacher'} holds samples of other settings (captions of hash" in said
    assert before == {path: path.read_bytes() for path in before}
    assert not (workdir / "evaluate").exists()


def test_pictures_are_trained_on_with_their_own_captions_alone(captioned, tmp_path):
    folder = imagefolder(tmp_path / "pictures", ["black", "brown", "maroon", "red"])
    workdir, data = tmp_path / "run", ("data.source=imagefolder", f"data.dir={folder}")
    assert stage("captions", workdir, *data).status == 0
    file = folder / "metadata.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(reversed(lines)))
    said = sentence(stage("teacher", workdir, *data), "teacher")
    assert f"the captions in {workdir / 'captions'} are not those of these pictures (texts of hash" in said
    file.write_text("\n".join([*lines, lines[0]]))
    said = sentence(stage("teacher", workdir, *data), "teacher")
    assert "the last of the 5 pictures of `data` has the caption of number 4, but" in said and "holds 4: give" in said
    assert not (workdir / "teacher").exists()
    file.write_text("\n".join(lines))
    assert stage("teacher", workdir, *data).status == 0
    # nor are captions met that are held out
    workdir = copy(captioned, tmp_path / "held", "captions")
    hold_out(workdir, 3)
    said = sentence(stage("teacher", workdir), "teacher")
    assert "has the caption of number 95, but" in said and "holds 96, of which 3 are held out of training: give" in said


def test_latents_are_trained_on_with_the_captions_of_their_pictures_alone(tmp_path):
    """Also where the pictures' captions changed after 'encode', before there were any in the workdir."""
    folder, workdir = imagefolder(tmp_path / "pictures", ["black", "brown", "maroon", "red"]), tmp_path / "run"
    write_vae(workdir / "vae", channels=3)
    data = (
        "data.source=tfds", f"data.dir={workdir / 'latents' / '1.0.0'}", "data.space=latent", "data.image_size=8",
        "data.channels=2", "encode.source=imagefolder", f"encode.dir={folder}", "encode.image_size=16",
    )  # fmt: skip
    assert stage("encode", workdir, *data).status == 0
    file = folder / "metadata.jsonl"
    lines = file.read_text()
    file.write_text("\n".join(reversed(lines.splitlines())))
    assert stage("captions", workdir, *data).status == 0
    said = sentence(stage("teacher", workdir, *data), "teacher")
    assert f"the captions in {workdir / 'captions'} are not those of these pictures (texts of hash" in said
    assert not (workdir / "teacher").exists()
    file.write_text(lines)
    (workdir / "captions").rename(workdir / "before")
    assert stage("captions", workdir, *data).status == 0
    assert stage("teacher", workdir, *data).status == 0


def test_captions_of_another_split_of_a_dataset_are_not_its_pictures(tmp_path):
    config = captions_config(data={"source": "tfds", "name": "pictures", "split": "train"})
    write_json(tmp_path / "captions" / "config.json", plain(config))
    check_texts(config, tmp_path, [])
    config.data.split = "test"
    with pytest.raises(UserError, match="not those of these pictures \\(data.split 'train' there, 'test' here\\)"):
        check_texts(config, tmp_path, [])


def test_networks_and_data_must_agree_on_what_is_told(tmp_path):
    said = sentence(stage("teacher", tmp_path, "data.num_classes=4"), "teacher")
    assert "data.num_classes is 4, but a PixArt is told captions: set it to 0." in said
    said = sentence(stage("teacher", tmp_path, "model.name="), "teacher")
    assert "data.num_classes is 0, but a DiT is told a class: set it to their number." in said
    said = sentence(stage("teacher", tmp_path), "teacher")
    assert "there are no encoded captions in" in said and "run the stage 'captions' first" in said


def test_captions_of_another_width_are_refused(captioned, tmp_path):
    workdir = copy(captioned, tmp_path / "run", "captions")
    said = sentence(stage("teacher", workdir, "model.caption_width=20"), "teacher")
    assert "have 256 channels, but the network reads 20" in said


@pytest.mark.slow
def test_online_rivals_and_fine_tune_with_captions(captioned, tmp_path):
    workdir = copy(captioned, tmp_path / "run", "captions", "teacher", "trajectories", "distill")
    assert stage("distill", workdir, "distill.online=True", "student.name=online").status == 0
    rivals = {"consistency": "stochastic", "progressive": "deterministic", "distribution_matching": "stochastic"}
    rivals |= {"trajectory_matching": "deterministic", "mean_flow": "stochastic"}
    for objective, kind in rivals.items():
        settings = (f"student.kind={kind}", f"student.name={objective}", f"distill.objective={objective}")
        assert stage("distill", workdir, *settings).status == 0
    assert stage("finetune", workdir).status == 0
    models = ("online", "ard_adversarial", *rivals)
    assert stage("sample", workdir, f"sample.models={models}").status == 0
    assert stage("evaluate", workdir).status == 0
    assert set(read_json(workdir / "evaluate" / "results.json")["models"]) == set(models)


COMPARED = """
from configs import smoke_captions


def get_config(argument=""):
    config = smoke_captions.get_config("process=flow")
    with config.unlocked():
        config.trajectories.points, config.student.points = (3, 2, 0), (2, 0)
        config.compare.update(steps=(2,), points=((2, 0),))
        config.compare.methods = {
            "ard": {"title": "ARD"},
            "step": {"title": "Step distillation", "settings": {"student": {"mask": "diagonal"}}},
        }
    return config
"""


@pytest.mark.slow
def test_methods_are_compared_with_captions(tmp_path):
    """Of a teacher that predicts velocity; the captions are encoded on the way, once."""
    (tmp_path / "compared.py").write_text(COMPARED)
    arguments = ["--config", str(tmp_path / "compared.py"), "--workdir", str(tmp_path / "run")]
    outcome = run("compare", *arguments)
    assert outcome.status == 0, outcome.err
    rows = read_json(tmp_path / "run" / "compare" / "compare.json")["rows"]
    assert [row["name"] for row in rows] == ["teacher", "ard_2", "step_2"]
    assert all(0 < row["mean"]["fd"] < np.inf for row in rows)
    encoded = tmp_path / "run" / "seed0" / "captions" / "done.json"
    before = encoded.stat().st_mtime_ns
    assert run("compare", *arguments).status == 0
    assert encoded.stat().st_mtime_ns == before


def test_two_students_are_told_different_captions_apart(captioned):
    pipe = ARDPipeline.from_pretrained(captioned / "distill" / "ard")
    one = pipe(["a large red circle", "a small blue square"], seed=3, output_type="np")
    same = pipe(prompt=["a small blue square", "a large red circle"], latents=np.zeros((2, 16, 16, 3), np.float32))
    assert one.labels.tolist() == ["a large red circle", "a small blue square"] and len(same.images) == 2
    noise = np.random.default_rng(0).standard_normal((1, 16, 16, 3), np.float32).repeat(2, axis=0)
    apart = pipe(["a large red circle", "a small blue square"], latents=noise, output_type="np").images
    assert np.abs(apart[0] - apart[1]).max() > 1e-6


# ------------------------------------------------------------------------------------ PixArt's folder, line by line

TINY = (
    "diffusion.solver=ddim", "diffusion.spacing=linspace", "diffusion.steps=4", "trajectories.points=(2,1,0)",
    "student.points=(2,1,0)", "student.history_layers=1", "student.target=xt", "distill.online=True",
    "distill.steps=3", "distill.batch_size=4", "run.loggers=()", "run.sample_every=3", "sample.count=4",
    "sample.batch_size=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    """A tiny PixArt's folder, and a workdir with its teacher, captions and a student; not to be written to."""
    root = tmp_path_factory.mktemp("pixart")
    write_pixart(root / "folder")
    workdir = root / "run"
    outcome = run("convert", "--source", str(root / "folder"), "--workdir", str(workdir))
    assert outcome.status == 0, outcome.err
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = ["--config", str(workdir / "config.py"), "--workdir", str(workdir)]
    file = ["--config.captions.source=file", f"--config.captions.path={root / 'prompts.txt'}"]
    tiny = [f"--config.{setting}" for setting in TINY]
    for name, more in (("captions", file), ("distill", tiny), ("sample", tiny)):
        outcome = run(name, *settings, *more)
        assert outcome.status == 0, outcome.err
    return root


def test_what_convert_says_and_writes(pixart):
    config = read_json(pixart / "run" / "teacher" / "config.json")
    assert config["model"]["name"] == "PixArt" and config["data"]["num_classes"] == 0
    assert config["model"]["interpolation"] == 0.5 and config["model"]["null_mask"] == "own"
    assert config["captions"]["encoder"] == str(pixart / "folder") and config["captions"]["length"] == 300
    diffusion = config["diffusion"]
    assert (diffusion["solver"], diffusion["spacing"], diffusion["steps"]) == ("dpm++2m", "dpm", 20)
    assert (diffusion["guidance_scale"], diffusion["guided_channels"]) == (4.5, 0)


def test_a_student_draws_captions_while_it_learns(pixart, tmp_path):
    """The last picture has what `sample` draws of the five captions in turn."""
    for folder in ("teacher", "captions", "vae", "distill"):
        (tmp_path / folder).symlink_to(pixart / "run" / folder)
    numbers = tuple(number * 5 // 16 for number in range(16))
    more = (f"sample.labels={numbers}", "sample.count=16", "sample.models=('ard',)")
    tiny = [f"--config.{setting}" for setting in (*TINY, *more)]
    outcome = run("sample", "--config", str(pixart / "run" / "config.py"), "--workdir", str(tmp_path), *tiny)
    assert outcome.status == 0, outcome.err
    learned = pixart / "run" / "distill" / "ard" / "progress"
    assert {path.name for path in learned.iterdir()} == {"0.png", "3.png"}
    grid = np.asarray(Image.open(tmp_path / "sample" / "ard" / "grid.png").convert("RGB")).astype(int)
    assert np.abs(np.asarray(Image.open(learned / "3.png")) - grid).max() <= 1
    assert np.abs(np.asarray(Image.open(learned / "0.png")) - grid).max() > 1


def test_the_authors_file(tmp_path):
    """With its position table and its empty caption, which go out again."""
    model = small_pixart(image_size=32, interpolation=0.5)
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(0).standard_normal(leaf.shape).astype(np.float32), network_shapes(model)
    )
    null = np.random.default_rng(1).standard_normal((120, 20)).astype(np.float32)
    published = pixart_to_published(model, params, null)
    write_tensors(tmp_path / "mine.safetensors", published)
    source = ["--source", str(tmp_path / "mine.safetensors"), "--workdir", str(tmp_path / "run")]
    said = sentence(run("convert", *source), "convert")
    assert "nothing tells the attention heads of this PixArt of width 24: give --num-heads." in said
    outcome = run("convert", *source, "--num-heads", "2")
    assert outcome.status == 0, outcome.err
    assert "PixArt teacher, a state dict with the published names" in outcome.out
    config = read_json(tmp_path / "run" / "teacher" / "config.json")
    assert config["model"]["null_mask"] == "caption" and config["model"]["interpolation"] == 0.5
    assert (config["captions"]["length"], config["captions"]["cleaning"]) == (120, "clean")  # α's, by its empty caption
    outcome = run("export", "--workdir", str(tmp_path / "run"), "--model", "teacher", "--format", "safetensors")
    assert outcome.status == 0, outcome.err
    again = read_tensors(tmp_path / "run" / "export" / "teacher" / "safetensors" / "teacher.safetensors")
    assert again.keys() == published.keys() and NULL_CAPTION in again
    for name, array in published.items():
        np.testing.assert_array_equal(again[name], array)
    del published["pos_embed"]
    write_tensors(tmp_path / "other.safetensors", published)
    source = ["--source", str(tmp_path / "other.safetensors"), "--workdir", str(tmp_path / "x"), "--num-heads", "2"]
    said = sentence(run("convert", *source), "convert")
    assert "nothing tells how this PixArt's positions are scaled" in said


@pytest.mark.oracle
def test_the_authors_pth_is_known_by_its_name(tmp_path):
    """{"state_dict": …} with Σ's longest captions; the name says how positions are scaled, whatever is in the file."""
    import torch

    model = small_pixart(image_size=32, interpolation=0.5)
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), network_shapes(model))
    published = pixart_to_published(model, params, np.ones((300, 20), np.float32))
    tensors = {name: torch.from_numpy(array) for name, array in published.items() if name != "pos_embed"}
    path = tmp_path / "PixArt-Sigma-XL-2-256x256.pth"
    torch.save({"state_dict": tensors, "epoch": 3}, path)
    outcome = run("convert", "--source", str(path), "--workdir", str(tmp_path / "run"), "--num-heads", "2")
    assert outcome.status == 0, outcome.err
    assert "PixArt teacher PixArt-Sigma-XL-2-256x256, the state_dict of a training checkpoint" in outcome.out
    config = read_json(tmp_path / "run" / "teacher" / "config.json")
    assert (config["data"]["image_size"], config["model"]["interpolation"]) == (32, 0.5)
    assert (config["captions"]["length"], config["captions"]["cleaning"]) == (300, "none")
    assert read_npz(tmp_path / "run" / "teacher" / "null_caption.npz")["vectors"].shape == (300, 20)


def test_a_pipeline_goes_out_and_in_with_its_text_encoder(pixart, tmp_path):
    student = ARDPipeline.from_pretrained(pixart / "run" / "distill" / "ard")
    drawn = student(["a red apple", "green circle"], num_images_per_prompt=2, seed=1, output_type="np")
    assert drawn.images.shape == (4, 16, 16, 3)
    student.save_pretrained(tmp_path / "pipe")
    again = ARDPipeline.from_pretrained(tmp_path / "pipe")
    assert again.prompts.source == str(tmp_path / "pipe")
    other = again(prompt=["a red apple", "green circle"], num_images_per_prompt=2, seed=1, output_type="np")
    np.testing.assert_array_equal(other.images, drawn.images)
    again.prompts.drop()
    encoder = again.prompts.encoder
    vectors = encoder.encode(["a red apple", "green circle"])
    tokens, mask = np.zeros((2, 16, 20), np.float32), np.zeros((2, 16), bool)
    for row, own in enumerate(vectors):
        tokens[row, : len(own)], mask[row, : len(own)] = own, True
    given = again(prompt_embeds=tokens, prompt_attention_mask=mask, num_images_per_prompt=2, seed=1, output_type="np")
    np.testing.assert_allclose(given.images, drawn.images, rtol=0, atol=2e-5)
    edited = again.edit(drawn.images[0], 1, prompt=["blue square"], output_type="np").images
    assert edited.shape == (1, 16, 16, 3)
    outcome = run("convert", "--source", str(tmp_path / "pipe"), "--workdir", str(tmp_path / "run"))
    assert outcome.status == 0, outcome.err
    outcome = run("export", "--workdir", str(tmp_path / "run"), "--model", "ard", "--format", "pipeline")
    assert outcome.status == 0, outcome.err
    exported = ARDPipeline.from_pretrained(tmp_path / "run" / "export" / "ard" / "pipeline")
    other = exported(["a red apple", "green circle"], num_images_per_prompt=2, seed=1, output_type="np")
    np.testing.assert_array_equal(other.images, drawn.images)


@pytest.mark.parametrize("named", [True, False])
def test_convert_knows_the_text_encoder_of_a_pipeline(pixart, tmp_path, monkeypatch, named):
    """By its name, or the folder's: the repository of one that was downloaded."""
    student = ARDPipeline.from_pretrained(pixart / "run" / "distill" / "ard")
    student.prompts.source = "wordllama" if named else student.prompts.source
    student.save_pretrained(tmp_path / "pipe")
    monkeypatch.setattr("ard_jax.stages.convert.fetch_source", lambda source: tmp_path / "pipe")
    outcome = run("convert", "--source", "hf:ORG/NAME", "--workdir", str(tmp_path / "run"))
    assert outcome.status == 0, outcome.err
    found = read_json(tmp_path / "run" / "distill" / "ard" / "config.json")["captions"]["encoder"]
    assert found == ("wordllama" if named else "hf:ORG/NAME")


def teacher_with(pixart, workdir, encoder):
    """A workdir of the teacher alone, whose captions another text encoder has encoded."""
    copy(pixart / "run", workdir, "teacher", "vae")
    path = workdir / "teacher" / "config.json"
    config = read_json(path)
    config["captions"]["encoder"] = str(encoder)
    write_json(path, config)
    return workdir


def export_teacher(workdir, form, *more):
    return run("export", "--workdir", str(workdir), "--model", "teacher", "--format", form, *more)


@pytest.mark.parametrize("form", ["pipeline", "diffusers"])
def test_a_text_encoder_that_is_gone_is_said(pixart, tmp_path, form):
    workdir = teacher_with(pixart, tmp_path / "run", "gone/t5")
    said = sentence(export_teacher(workdir, form), "export", last=True)
    assert "the text encoder's folder 'gone/t5', which captions.encoder names, is not there" in said
    assert not (workdir / "export" / "teacher" / form).exists()


@pytest.mark.oracle
def test_a_tokenizer_in_its_encoder_s_folder_goes_to_where_diffusers_looks(pixart, tmp_path):
    import diffusers
    import sentencepiece

    encoder = write_text_encoder(tmp_path / "t5")
    (encoder / "tokenizer.json").unlink()
    (tmp_path / "text").write_text("\n".join(" ".join(PROMPTS).split() * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(encoder / "spiece"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", minloglevel=2,
    )  # fmt: skip
    (encoder / "spiece.vocab").unlink()
    write_json(encoder / "tokenizer_config.json", {"extra_ids": 0})
    outcome = export_teacher(teacher_with(pixart, tmp_path / "run", encoder), "diffusers")
    assert outcome.status == 0, outcome.err
    out = tmp_path / "run" / "export" / "teacher" / "diffusers"
    assert {path.name for path in (out / "text_encoder").iterdir()} == {"config.json", "model.safetensors"}
    texts = ["a red apple", "green circle"]
    theirs = diffusers.DiffusionPipeline.from_pretrained(out).tokenizer(texts)["input_ids"]
    ours = open_text_encoder(str(encoder), 300, "none")
    assert [list(map(int, own)) for own in ours.tokenize(texts)[0]] == theirs
    again = open_text_encoder(str(out), 300, "none")
    for one, other in zip(again.encode(texts), ours.encode(texts), strict=True):
        np.testing.assert_array_equal(one, other)


def test_stablehlo_of_a_teacher_without_a_text_encoder(pixart, tmp_path):
    outcome = export_teacher(teacher_with(pixart, tmp_path / "run", ""), "stablehlo", "--platforms", "cpu")
    said = sentence(outcome, "export", last=True)
    assert said.startswith("ard_jax export: captions.encoder is '', but a teacher's guidance needs the vectors of")


@pytest.mark.oracle
@pytest.mark.parametrize(("form", "encoder"), [("pipeline", ""), ("diffusers", ""), ("diffusers", "wordllama")])
def test_a_card_tells_vectors_where_no_text_encoder_goes_along(pixart, tmp_path, monkeypatch, form, encoder):
    workdir = teacher_with(pixart, tmp_path / "run", encoder)
    outcome = export_teacher(workdir, form)
    assert outcome.status == 0, outcome.err
    folder = workdir / "export" / "teacher" / form
    card = (folder / "README.md").read_text()
    assert "a red apple" not in card and "No text encoder goes along: `tokens` (prompt, token, channel)" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    embeds, mask = np.random.default_rng(0).normal(size=(1, 16, 20)).astype(np.float32), np.ones((1, 16), np.int32)
    told = {"tokens": embeds, "mask": mask, "empty": embeds[0, :1]}
    if form == "diffusers":
        import torch

        told = {"tokens": torch.tensor(embeds), "mask": torch.tensor(mask)}
        told |= {"empty": -told["tokens"], "empty_mask": told["mask"]}
        code = code.replace("pipe(", "pipe(use_resolution_binning=False, height=16, width=16, ")  # it is so small
    monkeypatch.chdir(folder)
    exec(code, told)
    assert [image.size for image in told["images"]] == [(16, 16)]


def test_a_pipeline_s_card_names_a_prompt_where_its_text_encoder_has_a_name(pixart, tmp_path):
    workdir = teacher_with(pixart, tmp_path / "run", "wordllama")
    assert export_teacher(workdir, "pipeline").status == 0
    card = (workdir / "export" / "teacher" / "pipeline" / "README.md").read_text()
    assert 'pipe("a red apple", num_images_per_prompt=4' in card and "No text encoder" not in card


def test_a_teacher_s_negative_prompt_and_sides(pixart):
    teacher = ARDPipeline.from_pretrained(pixart / "folder")
    settings = dict(seed=1, num_inference_steps=3, output_type="np")
    plain = teacher("a red apple", **settings).images
    np.testing.assert_array_equal(teacher("a red apple", negative_prompt="", **settings).images, plain)
    assert np.abs(teacher("a red apple", negative_prompt="green", **settings).images - plain).max() > 1e-4
    assert teacher("a red apple", height=24, width=8, **settings).images.shape == (1, 24, 8, 3)


def test_a_negative_prompt_is_as_long_as_it_is_itself(pixart):
    """Whatever mask the empty caption has: of the authors' weights that of the caption in whose place it stands."""
    teacher, random = ARDPipeline.from_pretrained(pixart / "folder"), np.random.default_rng(0)
    long = random.normal(size=(5, 20)).astype(np.float32)
    other = np.concatenate([long[:2], random.normal(size=(3, 20)).astype(np.float32)])

    def drawn(prompt, **negative):
        return teacher(prompt, seed=1, num_inference_steps=3, output_type="np", **negative).images

    asked = [("red", long), ("red", other), ("a red apple a green circle", long[:1])]  # shorter and longer ones
    own = [drawn(prompt, negative_prompt_embeds=embeds) for prompt, embeds in asked]
    empty, green = drawn("red apple"), drawn("red apple", negative_prompt="green")
    teacher.model = teacher.model.clone(null_mask="caption")
    teacher._jitted.clear()
    assert np.abs(drawn("red apple") - empty).max() > 1e-4
    np.testing.assert_array_equal(drawn("red apple", negative_prompt="green"), green)
    found = [drawn(prompt, negative_prompt_embeds=embeds) for prompt, embeds in asked]
    for one, expected in zip(found, own, strict=True):
        np.testing.assert_array_equal(one, expected)
    assert np.abs(found[0] - found[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("negative", "said"),
    [
        (["blue"], r"negative_prompt is \['blue'\]: give one string, which is for all images."),
        ("blu\ud83d", r"the text 'blu\\ud83d' has '\\ud83d' in it, which is half a character: leave that out"),
    ],
    ids=["several", "half a character"],  # which no report could print
)
def test_negative_prompts_that_are_none(pixart, negative, said):
    with pytest.raises(UserError, match=said):
        ARDPipeline.from_pretrained(pixart / "folder")("red", negative_prompt=negative, num_inference_steps=2)


def test_pipelines_have_one_text_encoder_together(pixart, tmp_path):
    """As long as one of them has it, in the type that they compute in, and its files are as they were."""
    teacher, student = (ARDPipeline.from_pretrained(pixart / name) for name in ("folder", "run/distill/ard"))
    assert teacher.prompts.encoder is student.prompts.encoder
    half = ARDPipeline.from_pretrained(pixart / "folder", dtype="bfloat16").prompts.encoder
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16", "float32"}  # norms are summed
    theirs, loaded = weakref.ref(teacher.prompts.encoder), open_text_encoder(str(pixart / "folder"), 300, "none").params
    jax.tree.map(np.testing.assert_array_equal, teacher.prompts.encoder.params, loaded)
    teacher.prompts.drop()
    assert theirs() is student.prompts.encoder
    student.prompts.drop()
    gc.collect()
    assert theirs() is None
    write_text_encoder(tmp_path / "t5")
    one, other = (Prompts(str(tmp_path / "t5"), student.config.captions, 20) for _ in range(2))
    before = one.encoder.sha256
    write_text_encoder(tmp_path / "t5", seed=7)
    assert other.encoder.sha256 != before == one.encoder.sha256


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give one of prompt, prompt_embeds and the first argument"),
        ({"class_labels": "a", "prompt": "b"}, "give one of prompt, prompt_embeds and the first argument"),
        ({"prompt": 3}, "the prompt is 3: give a string, or several"),
        ({"prompt": []}, r"the prompt is \[\]: give a string"),
        ({"prompt": "a", "negative_prompt": "b"}, "negative_prompt is a teacher's, and this is a student"),
        ({"prompt": "a", "height": 18}, "height is 18, which is no multiple of 4"),
        ({"prompt_embeds": np.zeros((1, 4, 20))}, r"with a prompt_attention_mask \(\)"),
        (
            {"prompt_embeds": np.zeros((1, 4, 20)), "prompt_attention_mask": np.zeros((1, 4))},
            "a prompt's mask is all zeros",
        ),
        (
            {"prompt_embeds": np.zeros((1, 4, 9)), "prompt_attention_mask": np.ones((1, 4))},
            r"floats \(prompt, token, 20\) .* were expected",
        ),
    ],
)
def test_what_a_pipeline_of_captions_refuses(pixart, given, said):
    student = ARDPipeline.from_pretrained(pixart / "run" / "distill" / "ard")
    with pytest.raises(UserError, match=said):
        student(**given)


def test_a_pipeline_without_a_text_encoder_takes_vectors(pixart):
    student = ARDPipeline.from_pretrained(pixart / "run" / "distill" / "ard")
    student.prompts.source = ""
    with pytest.raises(UserError, match="has no text encoder: give prompt_embeds"):
        student("a red apple")


# --------------------------------------------------------------------------------------------------- the document

DOCUMENT = (ROOT / "docs" / "TEXT_TO_IMAGE.md").read_text()
# What makes configs/pixart_sigma_1024.py the tiny network of `write_pixart`, and its runs short.
SMALL = (
    "model.name=PixArt", "model.patch_size=2", "model.hidden_size=24", "model.depth=2", "model.num_heads=2",
    "model.caption_width=20", "model.interpolation=0.5", "data.image_size=8", "diffusion.steps=34",
)  # fmt: skip
FEWER = {
    "distill": ("distill.steps=2", "distill.batch_size=4", "run.loggers=()"),
    "sample": ("sample.batch_size=32", "sample.models=('ard',)"),
    "teacher": ("teacher.steps=2", "teacher.batch_size=4", "run.loggers=()"),
    "encode": ("encode.image_size=16", "encode.batch_size=4"),
    "captions": ("captions.batch_size=2",),
    "plan": (),
}


@pytest.mark.slow
def test_every_command_of_the_document_runs_as_written(tmp_path, monkeypatch):
    """In its order, on a tiny random PixArt; the networks of configs/pixart_sigma_1024.py are made as small."""
    write_pixart(tmp_path / "PixArt-Sigma-XL-2-1024-MS")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    imagefolder(tmp_path / "PICTURES", ["black", "a red apple", "green circle", "blue"])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 18 and all(line.startswith("python ") for line in lines)
    for line in lines:
        words = shlex.split(line)
        if words[1] != "-m":
            ended = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
            assert Image.open(tmp_path / words[-1]).size == (32, 16)  # two pictures of 16 pixels
            continue
        stage_name, *flags = words[3:]
        if "configs/pixart_sigma_1024.py" in flags:
            flags += [f"--config.{setting}" for setting in (*SMALL, *FEWER[stage_name])]
        if stage_name == "plan":
            flags[flags.index("v5e:4x4")] = "cpu"
        outcome = run(stage_name, *flags)
        assert outcome.status == 0, (line, outcome.err)
    code = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    made: dict = {}
    exec(code[0], made)
    assert len(made["images"]) == 1 and len(made["edited"]) == 1 and made["edited"][0].size == (16, 16)


ALONE = """
import json, pathlib, sys
import numpy
sys.path.insert(0, sys.argv[1])
import run
folder = pathlib.Path(sys.argv[1])
told = run.encode(folder, json.loads(sys.argv[2]))
images = run.load(folder)(run.draw_noise(folder, 1, 2), *told)
numpy.save(sys.argv[3], images)
assert "ard_jax" not in sys.modules and "flax" not in sys.modules
"""


@pytest.mark.parametrize("model", ["teacher", "ard"])
def test_stablehlo_with_its_text_encoder(pixart, tmp_path, model):
    """What a machine with jax and the tokenizer's library makes is what the pipeline makes."""
    out = tmp_path / "out"
    asked = ["--workdir", str(pixart / "run"), "--model", model, "--format", "stablehlo", "--platforms", "cpu"]
    outcome = run("export", *asked, "--output", str(out))
    assert outcome.status == 0, outcome.err
    signature = read_json(out / "signature.json")
    assert signature["inputs"]["tokens"] == {"shape": ["batch", 300, 20], "dtype": "float32"}
    assert signature["inputs"]["mask"] == {"shape": ["batch", 300], "dtype": "bool"}
    assert signature["text_encoder"]["tokenizer"] == "tokenizer.json"
    texts = ["a red apple", "green circle"]
    ended = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(out), json.dumps(texts), str(tmp_path / "images.npy")],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    folder = pixart / "run" / ("teacher" if model == "teacher" else "distill/ard")
    expected = ARDPipeline.from_pretrained(folder)(texts, seed=1, output_type="np").images
    # another padding of the captions sums in another order; twenty guided steps enlarge that
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, rtol=0, atol=2e-3)
    assert 'run.py --prompts "a red apple"' in (out / "README.md").read_text()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["PixArtSigmaPipeline", "PixArtAlphaPipeline"])
def test_diffusers_opens_what_is_exported(tmp_path, kind):
    """The folder that convert has read, written again: the same weights by the same names, and it draws the same."""
    import diffusers
    import torch

    alpha = kind == "PixArtAlphaPipeline"
    write_pixart(tmp_path / "folder", kind, **({"image_size": 8, "interpolation": 1.0} if alpha else {}))
    outcome = run("convert", "--source", str(tmp_path / "folder"), "--workdir", str(tmp_path / "run"))
    assert outcome.status == 0, outcome.err
    outcome = run("export", "--workdir", str(tmp_path / "run"), "--model", "teacher", "--format", "diffusers")
    assert outcome.status == 0, outcome.err
    out = tmp_path / "run" / "export" / "teacher" / "diffusers"
    assert outcome.out.strip().endswith(f'open it with {kind}.from_pretrained("{out}").')
    for part, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before, after = (read_tensors(folder / part / f"{name}.safetensors") for folder in (tmp_path / "folder", out))
        assert before.keys() == after.keys()
        for key, array in before.items():
            np.testing.assert_array_equal(after[key], array)
    index = read_json(out / "model_index.json")
    assert index["_class_name"] == kind and index["text_encoder"] == ["transformers", "T5EncoderModel"]
    transformer = diffusers.PixArtTransformer2DModel.from_pretrained(out / "transformer")
    vae = diffusers.AutoencoderKL.from_pretrained(out / "vae")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(out / "scheduler")
    pipe = getattr(diffusers, kind)(None, None, vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    ours = ARDPipeline.from_pretrained(out)
    text = ours.prompts.encoder
    (own,), null = text.encode(["a red apple"]), text.null()
    pad = lambda rows: torch.from_numpy(np.pad(rows, ((0, 16 - len(rows)), (0, 0))))[None]  # noqa: E731
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    theirs = pipe(
        prompt=None, negative_prompt=None, prompt_embeds=pad(own), negative_prompt_embeds=pad(null[:-1]),
        prompt_attention_mask=(torch.arange(16) < len(own))[None].int(),
        negative_prompt_attention_mask=(torch.arange(16) < len(null) - 1)[None].int(),
        guidance_scale=4.5, num_inference_steps=20, height=16, width=16, use_resolution_binning=False,
        latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()), output_type="latent",
    ).images.numpy()  # fmt: skip
    mine = ours("a red apple", latents=noise, output_type="latent", num_inference_steps=20).images
    assert np.abs(mine - np.moveaxis(theirs, 1, -1)).max() < 2e-5 * np.abs(mine).max()
