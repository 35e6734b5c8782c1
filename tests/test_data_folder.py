"""Folders of pictures: what a viewer shows, all that are there, and what they are wherever they lie."""

import json
import logging
import pathlib
import types
import unicodedata

import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import FOLDER, files, sentence, smoke, write_classes

from ard_jax.data import identify, image_source
from ard_jax.data.captioned import ImageFolder
from ard_jax.errors import UserError
from ard_jax.files import read_json

RED, GREEN = (255, 0, 0), (0, 255, 0)


def source(root, channels=3, classes=1, size=8):
    data = types.SimpleNamespace(
        source="folder", name="", dir=str(root), split="train", image_size=size, channels=channels, num_classes=classes,
        space="pixel",
    )  # fmt: skip
    return image_source(data)


def levels(root, **kind):
    return np.rint((source(root, **kind)[0]["image"] + 1) * 127.5).astype(int)


def save(image, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)


def grey(value):
    return Image.new("L", (16, 16), value)


def palette_with_transparency():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *GREEN])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("picture", "channels", "expected"),
    [
        (Image.new("LA", (8, 8), (0, 0)), 1, 255),  # black ink, all of it transparent
        (Image.new("LA", (8, 8), (0, 255)), 1, 0),
        (Image.new("RGBA", (8, 8), (255, 0, 255, 0)), 3, (255, 255, 255)),  # a colour that nobody sees
        (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), 3, (127, 127, 127)),
        (palette_with_transparency(), 3, (255, 255, 255)),
        (Image.new("RGB", (8, 8), RED), 3, RED),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), 3, (255, 255, 255)),
    ],
)
def test_transparency_is_laid_on_white(tmp_path, picture, channels, expected):
    save(picture, tmp_path / "c" / ("x.tif" if picture.mode == "CMYK" else "x.png"))
    assert np.unique(levels(tmp_path, channels=channels).reshape(-1, channels), axis=0).tolist() == [
        list(np.atleast_1d(expected))
    ]


@pytest.mark.parametrize("turn", range(1, 9))
def test_photographs_stand_as_their_camera_says(tmp_path, turn):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:2, :3] = RED
    exif = Image.Exif()
    exif[0x0112] = turn
    save(Image.fromarray(pixels), tmp_path / "c" / "x.png", exif=exif)
    upright = {  # what EXIF's eight numbers stand for
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels),
    }  # fmt: skip
    np.testing.assert_array_equal(levels(tmp_path), upright[turn])


def test_every_picture_is_read_and_what_is_left_out_is_said(tmp_path, caplog):
    kinds = {"gif": "GIF", "tif": "TIFF", "ppm": "PPM", "jfif": "JPEG", "JPEG": "JPEG", "webp": "WEBP", "avif": "AVIF"}
    for suffix, kind in kinds.items():
        save(grey(9), tmp_path / "c" / f"a.{suffix}", format=kind)
    save(grey(9), tmp_path / "c" / "deep" / "er" / "b.png")
    save(grey(9), tmp_path / "c" / "._a.png")
    save(grey(9), tmp_path / "c" / ".hidden" / "x.png")
    save(grey(9), tmp_path / "__MACOSX" / "x.png")
    for name in ("c/notes.txt", "c/deep/b.json", "labels.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "c" / "deep" / "circle").symlink_to(tmp_path / "c")
    with caplog.at_level(logging.INFO, "ard_jax"):
        assert len(source(tmp_path)) == len(kinds) + 1
    said = caplog.messages[-1]
    assert said.startswith(f"{len(kinds) + 1} pictures in 1 classes; 3 other files left out (")
    assert all(name in said for name in ("notes.txt", "b.json", "labels.csv"))


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "1"], ["1", "9", "10"]),
        (["10", "9", "b"], ["10", "9", "b"]),
        (["007", "7", "08"], ["007", "7", "08"]),
    ],
)
def test_folders_that_are_numbers_are_in_their_order(tmp_path, names, order):
    for name in names:
        save(grey(9), tmp_path / name / "x.png")
    assert source(tmp_path, classes=3).classes == order


def test_the_same_data_elsewhere_are_the_same_and_others_are_not(tmp_path):
    def made(root, names=("a", "é"), size=16, more=False):
        for name in names:
            save(Image.new("L", (size, size), 9), root / name / "ö.png")
        if more:
            save(grey(9), root / names[0] / "more.png")
        found = source(root, classes=len(names))
        return identify(types.SimpleNamespace(source="folder"), found)

    here = made(tmp_path / "1")
    apart = [unicodedata.normalize("NFD", name) for name in ("a", "é")]
    assert here == made(tmp_path / "2") == made(tmp_path / "3", names=apart)
    assert here["classes"] == ["a", "é"] and here["records"] == 2
    assert made(tmp_path / "4", more=True)["records"] == 3
    assert made(tmp_path / "5", size=64)["sha256"] != here["sha256"]
    assert made(tmp_path / "6", names=("a", "b"))["classes"] != here["classes"]


def test_captions_may_hold_separators_and_lines_keep_their_numbers(tmp_path):
    captions = ["a red\u2028heart", "a\x85b\u2029c"]
    lines = [json.dumps({"file_name": "x.png", "text": text}, ensure_ascii=False) for text in captions]
    save(grey(9), tmp_path / "x.png")
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_bytes("\r\n\n".join(lines).encode())
    data = types.SimpleNamespace(dir=str(tmp_path), image_size=8, channels=3, caption_key="text")
    assert ImageFolder(data).captions == captions
    metadata.write_text("\n".join([lines[0], "", "{"]), encoding="utf-8")
    with pytest.raises(UserError, match="^line 3 of .*metadata.jsonl is no JSON object"):
        ImageFolder(data)


@pytest.fixture
def trained(tmp_path):
    """A workdir with a teacher of pictures in tmp_path/data."""
    given = write_classes(tmp_path / "data")
    assert smoke("teacher", tmp_path / "run", *FOLDER, given, "teacher.steps=4").status == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "b").rename(root / "c"), "classes ['a', 'b'] there, classes ['a', 'c'] here"),
        (lambda root: (root / "b" / "3.png").unlink(), "8 records there, 7 records here"),
        (lambda root: save(Image.new("L", (99, 99), 5), root / "b" / "3.png"), "files of hash"),
    ],
)
def test_a_run_goes_on_with_its_own_data_alone(trained, tmp_path, change, said):
    labels = (trained / "teacher" / "labels.json").read_bytes()
    (trained / "teacher" / "done.json").unlink()
    change(tmp_path / "data")
    found = sentence(smoke("teacher", trained, *FOLDER, f"data.dir={tmp_path}/data", "teacher.steps=4"), "teacher")
    assert f"{trained / 'teacher'} was made of other data" in found and said in found
    assert (trained / "teacher" / "labels.json").read_bytes() == labels
    assert not (trained / "teacher" / "done.json").exists()


def test_the_same_data_elsewhere_go_on(trained, tmp_path):
    (tmp_path / "data").rename(tmp_path / "moved")
    assert smoke("teacher", trained, *FOLDER, f"data.dir={tmp_path}/moved", "teacher.steps=4").status == 0
    # no picture is read here, so it does not matter where they are
    assert smoke("trajectories", trained, *FOLDER, "data.dir=/nowhere", "teacher.steps=4").status == 0


def test_labels_of_an_earlier_version_are_not_rewritten(trained, tmp_path):
    (trained / "teacher" / "data.json").unlink()
    (tmp_path / "data" / "b").rename(tmp_path / "data" / "c")
    said = sentence(smoke("teacher", trained, *FOLDER, f"data.dir={tmp_path}/data", "teacher.steps=4"), "teacher")
    assert "classes ['a', 'b'] there, classes ['a', 'c'] here" in said
    assert read_json(trained / "teacher" / "labels.json") == ["a", "b"]


def test_check_reads_all_and_names_every_broken_picture(tmp_path):
    given = write_classes(tmp_path / "data")
    assert smoke("teacher", tmp_path / "run", *FOLDER, given, flags=["--check"]).status == 0
    for name in ("a/1.png", "b/3.png"):
        (tmp_path / "data" / name).write_bytes(b"broken")
    said = smoke("teacher", tmp_path / "run", *FOLDER, given, flags=["--check"])
    assert said.status == 2 and "2 of 8 records cannot be used: " in said.err
    assert all(str(tmp_path / "data" / name) in said.err for name in ("a/1.png", "b/3.png"))
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_picture_that_breaks_on_the_way_costs_no_step(tmp_path):
    """Too large to be held in memory, they are read as they come: step 1 is saved before the run ends."""
    given = write_classes(tmp_path / "data", count=16)
    workdir, settings = tmp_path / "run", [*FOLDER, given, "teacher.steps=40", "run.in_memory=0"]
    broken = tmp_path / "data" / "b" / "3.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"broken" + whole[6:])
    stopped = smoke("teacher", workdir, *settings, "teacher.batch_size=2")
    assert stopped.status == 2 and str(broken) in stopped.err.splitlines()[-1]
    (step,) = [int(path.name) for path in (workdir / "teacher" / "checkpoints").iterdir()]
    assert 0 < step < 32 and f"stopped at step {step}, which is saved." in stopped.err
    broken.write_bytes(whole)
    assert smoke("teacher", workdir, *settings, "teacher.batch_size=2").status == 0


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "hdfs://host/run", "file:///tmp/run"])
def test_a_path_that_is_on_no_disk_is_refused_before_any_work(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    root = pathlib.Path(path)
    assert f"{root} is no path on this machine" in sentence(smoke("teacher", root), "teacher")
    for key in ("teacher.dir", "trajectories.dir", "vae.dir", "data.dir", "encode.dir"):
        said = sentence(smoke("trajectories", tmp_path / "run", f"{key}={path}"), "trajectories")
        assert f"{path} is no path on this machine" in said and "gcsfuse" in said
    assert not files(tmp_path)


def test_home_is_where_the_user_lives(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "teacher").symlink_to(pipeline / "teacher")
    assert smoke("trajectories", pathlib.Path("~/run"), "teacher.dir=~/teacher").status == 0
    assert (tmp_path / "run" / "trajectories" / "done.json").exists()
    said = sentence(smoke("teacher", pathlib.Path("~nobody-of-that-name/run")), "teacher")
    assert "~nobody-of-that-name/run cannot be used" in said


def test_home_is_where_a_library_s_user_lives_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(grey(9), tmp_path / "pictures" / "c" / "x.png")
    assert len(source("~/pictures")) == 1


def test_a_source_that_is_on_no_disk_is_refused():
    from ard_jax.convert.hub import fetch_source

    with pytest.raises(UserError, match="gs://bucket/DiT.pt is no path on this machine"):
        fetch_source("gs://bucket/DiT.pt")
