"""The demo without its page: what it shows of a workdir, what it draws and how it can be stopped, what it refuses."""

import base64
import dataclasses
import importlib.util
import io
import os
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import EpsImagePlugin, Image
from pipeline_fixtures import copy, run, sentence

from ard_jax import ARDPipeline
from ard_jax.build import make_solve
from ard_jax.demo import html
from ard_jax.demo.drawing import MOST_CHARACTERS, MOST_PIXELS, draw, edit, open_picture, step_at
from ard_jax.demo.models import Model, Models, find_models
from ard_jax.demo.runner import Drawn
from ard_jax.errors import UserError
from ard_jax.files import read_json, write_json
from ard_jax.pipeline.inputs import read_image
from ard_jax.pipeline.prompts import Prompts
from ard_jax.progress import Stopwatch
from ard_jax.sampling import sample_teacher, teacher_steps


@pytest.fixture(scope="module")
def models(pipeline):
    return find_models(pipeline)


@pytest.fixture(scope="module")
def drawing(models):
    return list(draw(models, 3, 5, 2, ["ard", "teacher"]))[-1]


def refused(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        list(function(*arguments))
    said = str(caught.value)
    assert "\n" not in said and said.endswith("."), said
    return said


# --------------------------------------------------------------------------------------------------- what is shown


def test_a_workdir_has_its_teacher_and_its_students(models, pipeline):
    teacher, ard = models.every
    assert teacher == Model("teacher", pipeline / "teacher")
    assert ard == Model("ard", pipeline / "distill" / "ard", steps=3, has_history=True)
    assert [model.title for model in models.every] == ["Teacher", "Student ard"]
    assert models.usable == [teacher, ard] and models.editors == [ard]
    assert models.with_history(True) == ["ard"] and models.with_history(False) == []


def test_what_cannot_draw_is_there_with_the_reason(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher", "distill")
    changes = {"half": {}, "rival": {"kind": "stochastic"}, "step": {"mask": "diagonal"}}
    for name, student in changes.items():
        folder = copy(workdir / "distill", tmp_path / "copies" / name, "ard") / "ard"
        config = read_json(folder / "config.json")
        config["student"] |= student
        write_json(folder / "config.json", config)
        folder.rename(workdir / "distill" / name)
    (workdir / "distill" / "half" / "done.json").unlink()
    (workdir / "distill" / "broken").mkdir()
    (workdir / "distill" / "broken" / "config.json").write_text("{")
    found = find_models(workdir)
    why = {model.name: model.why_not for model in found.every}
    assert [name for name, reason in why.items() if not reason] == ["teacher", "ard", "step"]
    assert why["half"] == (
        "its training is not finished (its newest checkpoint is of step 20): run the stage 'distill' to its end."
    )
    assert "kind 'stochastic'" in why["rival"] and "is damaged" in why["broken"]
    assert found.with_history(False) == ["step"]
    greyed = html.greyed(found)
    assert greyed.count("<li aria-disabled") == 3 and "Student half</b>: its training is not finished" in greyed
    assert "there is no model 'half' that can draw" in refused(draw, found, 1, 0, 1, ["half"])


def test_nothing_to_show(pipeline, tmp_path):
    assert "there is no folder" in refused(find_models, tmp_path / "nowhere")
    assert "there is no finished model to show: train one" in refused(find_models, tmp_path)
    workdir = copy(pipeline, tmp_path, "teacher")
    (workdir / "teacher" / "done.json").unlink()
    assert "(Teacher: its training is not finished" in refused(find_models, workdir)
    assert "are both given" in refused(find_models, workdir, [workdir])


def test_folders_are_shown_by_their_names(pipeline, models, tmp_path):
    for name in ("one", "two"):
        ARDPipeline.from_pretrained(pipeline / "distill" / "ard").save_pretrained(tmp_path / name / "ard")
    folders = [tmp_path / "one" / "ard", tmp_path / "two" / "ard", pipeline / "teacher"]
    found = find_models(None, folders)
    assert [model.name for model in found.every] == ["teacher", str(folders[0]), str(folders[1])]
    assert all(model.steps == 3 for model in found.every[1:])


def test_models_that_are_told_other_things_are_not_shown_together(models, pipeline):
    other = ARDPipeline.from_pretrained(pipeline / "distill" / "ard")
    other.config.data.num_classes = 7
    pipes = {"teacher": models.open("teacher").pipe, "ard": other}
    with pytest.raises(
        UserError, match="ard is of 7 classes and 8×8×1, but the first model is of 10 classes and 8×8×1"
    ):
        Models(models.every, pipes)


# --------------------------------------------------------------------------------------------------- what is drawn


def test_every_model_draws_what_its_pipeline_draws_from_the_same_noise(models, drawing):
    assert [row.title for row in drawing.rows] == ["Teacher", "Student ard"]
    for name, row in zip(("teacher", "ard"), drawing.rows, strict=True):
        made = models.open(name).pipe([3, 3], seed=5, output_type="np", return_trajectory=True)
        for shown, expected in ((row.drawn.images, made.images), (row.drawn.trajectory, made.trajectory)):
            assert shown.dtype == np.uint8 and shown.shape == expected.shape
            assert np.abs(shown - 255 * expected).max() < 0.51
    assert not (drawing.rows[0].drawn.images[0] == drawing.rows[0].drawn.images[1]).all()
    assert drawing.doing == "" and drawing.part == 1 and drawing.caption == "3"


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm++2m"])
def test_a_solve_cut_at_its_steps_is_the_solve(models, solver):
    """Before anything is clipped to a picture, which hides much of a teacher that has hardly been trained."""
    runner, labels = models.open("teacher"), jnp.asarray([3, 1])
    model, params, noise = runner.pipe.model, runner.pipe.params, runner.noise(5, 2)
    how = dataclasses.replace(make_solve(runner.pipe.config), solver=solver)
    whole = jax.jit(lambda: sample_teacher(model, params, noise, labels, how))()
    steps = teacher_steps(model, how)
    prepared, step = steps.prepare(params, labels), jax.jit(steps.step)
    x, x0 = jnp.asarray(noise), jnp.zeros_like(noise)
    for number in range(how.steps):
        x, x0 = step(params, prepared, x, x0, number)
        np.testing.assert_allclose(x0, whole.x0[:, number], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(x, whole.xt[:, number], rtol=1e-4, atol=1e-4)


def test_what_it_cost_is_said(drawing):
    for row, calls in zip(drawing.rows, (10, 3), strict=True):
        assert re.fullmatch(rf"{calls} network calls · [\d,.]+ ms a picture", row.cost)


def test_time_is_the_networks_alone(models, monkeypatch):
    """A clock that goes a second a reading: 5 steps and the preparation are 6 seconds, of 2 pictures."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("ard_jax.progress.time.monotonic", lambda: float(next(ticks)))
    assert Stopwatch()() == 1
    seen = list(draw(models, 3, 0, 2, ["teacher", "ard"]))[-1]
    assert [row.drawn.milliseconds for row in seen.rows] == [3000, 500]


def test_a_teacher_says_each_step(models):
    seen = list(draw(models, 3, 5, 2, ["teacher", "ard"]))
    assert [drawing.doing for drawing in seen] == [
        "Teacher: getting ready", *(f"Teacher: step {step} of 5" for step in range(1, 6)),
        "Student ard: getting ready", "Student ard: step 3 of 3", "",
    ]  # fmt: skip
    parts = [drawing.part for drawing in seen]
    assert parts == sorted(parts) and parts[2] == pytest.approx(0.2) and parts[6] == 0.5
    assert [len(drawing.rows) for drawing in seen] == [0] * 6 + [1, 1, 2]


def test_who_goes_away_stops_the_teacher(models):
    runner, calls = models.open("teacher"), []
    solve = runner._solve
    runner._solve = solve._replace(step=lambda *arguments: calls.append(0) or solve.step(*arguments))
    try:
        work = draw(models, 3, 5, 2, ["teacher", "ard"])
        while next(work).doing != "Teacher: step 2 of 5":
            pass
        before = len(calls)
        work.close()
        assert len(calls) == before < 5 and next(work, None) is None
    finally:
        runner._solve = solve


def test_an_edit_is_the_pipelines(models, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(levels).save(tmp_path / "picture.png")
    first, last = edit(models, 4, 1, 2, "ard", str(tmp_path / "picture.png"), 2.0)
    assert first.doing == "Student ard: editing" and not first.rows
    made = models.open("ard").pipe.edit(levels, 2, [4, 4], 1, "np", return_trajectory=True)
    (row,) = last.rows
    assert np.abs(row.drawn.trajectory - 255 * made.trajectory).max() < 0.51 and row.given == 2
    np.testing.assert_array_equal(row.drawn.trajectory[0, 1, ..., 0], levels)
    np.testing.assert_array_equal(last.source[..., 0], levels)
    assert row.cost == "3 calls, the picture after call 2"


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((10, 0, 1, ["ard"]), "the class is 10: give a whole number from 0 to 9."),
        ((None, 0, 1, ["ard"]), "the class is None: give a whole number from 0 to 9."),
        ((1, -1.0, 1, ["ard"]), "the seed is -1: give a whole number from 0 to 2147483647."),
        ((1, 0.5, 1, ["ard"]), "the seed is 0.5: give a whole number from 0 to 2147483647."),
        ((1, 0, 9, ["ard"]), "the number of pictures is 9: give a whole number from 1 to 8."),
        ((1, 0, 1, []), "no model is chosen: tick one at least."),
    ],
)
def test_what_cannot_be_drawn(models, asked, said):
    assert refused(draw, models, *asked) == said


def test_what_cannot_be_edited(models, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("L", (8, 8)).save(picture)
    assert "there is no picture to edit" in refused(edit, models, 1, 0, 1, "ard", None, 1)
    assert "no student is chosen" in refused(edit, models, 1, 0, 1, "teacher", str(picture), 1)
    assert "the source step is 3: give a whole number from 1 to 2" in refused(
        edit, models, 1, 0, 1, "ard", str(picture), 3
    )


class OfCaptions:
    """Stands for the models of a run that is told captions, of which `draw` asks no more before it draws."""

    class first:
        class pipe:
            prompts = object()

    every = ()


def test_captions_that_cannot_be_drawn():
    said = refused(draw, OfCaptions, "ab " * 3334, 0, 1, ["ard"])
    assert said == f"the caption has 10,001 characters: give at most {MOST_CHARACTERS:,}."
    assert refused(draw, OfCaptions, " \n ", 0, 1, ["ard"]) == "the caption is empty: say what to draw, in words."


class OfWords:
    """Stands for a student that is told captions of 6 tokens at most, and for the models of a demo of it alone."""

    steps = calls = 2
    image_shape, id2label = (8, 8, 1), types.MappingProxyType({})

    def __init__(self):
        captions = ConfigDict({"length": 6, "cleaning": "none"})
        self.first = self.pipe = self
        self.config, self.prompts = ConfigDict({"captions": captions}), Prompts("wordllama", captions, 256)
        self.every = self.editors = [Model("ard", pathlib.Path("ard"), steps=2)]

    def find(self, name):
        return self.every[0]

    def open(self, name):
        return self

    def noise(self, seed, count):
        return np.zeros((count, 8, 8, 1))

    def draw(self, told, noise):
        yield 2
        return Drawn(np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 2, 8, 8, 1), np.uint8))

    def edit(self, *asked, **how):
        return types.SimpleNamespace(images=np.zeros((1, 8, 8, 1)), trajectory=np.zeros((1, 2, 8, 8, 1)))


@pytest.mark.parametrize(
    ("caption", "note"),
    [
        ("a red heart", ""),
        ("a red heart and a blue circle and a fox", " The caption has over 6 tokens and was cut there."),
    ],
)
def test_a_caption_that_is_cut_is_said_at_the_end(tmp_path, caption, note):
    pytest.importorskip("wordllama")
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    models = OfWords()
    for seen in (draw(models, caption, 0, 1, ["ard"]), edit(models, caption, 0, 1, "ard", tmp_path / "picture.png", 1)):
        *before, last = [html.status(drawing) for drawing in seen]
        assert before and all("<progress" in markup and "tokens" not in markup for markup in before)
        assert last == f'<p class="ard-done" role="status">Done.{note}</p>'


def test_pictures_that_cannot_be_opened(models, tmp_path):
    def written(image, name="picture.png"):
        image.save(tmp_path / name)
        return tmp_path / name

    large = written(Image.new("1", (MOST_PIXELS // 5000 + 1, 5000)))
    bomb = written(Image.new("1", (20_000, 10_000)), "bomb.png")
    thin = written(Image.new("L", (600, 10)), "thin.png")
    (tmp_path / "words.png").write_text("words")
    for path in (large, bomb):
        assert refused(open_picture, models, path) == "the picture is larger than 50 megapixels: shrink it first."
    assert "is 600×10, too narrow" in refused(open_picture, models, thin)
    assert "cannot be read (UnidentifiedImageError)" in refused(open_picture, models, tmp_path / "words.png")


def test_no_program_is_run_for_what_calls_itself_a_picture(models, tmp_path, monkeypatch):
    """Pillow goes by what is in a file, and hands a PostScript to Ghostscript, which has no limit of time or memory."""
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # which an earlier look may have found missing
    picture = tmp_path / "picture.png"
    picture.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    assert refused(open_picture, models, picture) == (
        "the picture cannot be read (UnidentifiedImageError): give a PNG, JPEG, WebP or GIF."
    )
    assert "cannot be read (UnidentifiedImageError): give the path of a picture" in refused(read_image, picture, 8, 1)
    assert not (tmp_path / "ran").exists()


def test_a_picture_is_cut_shrunk_and_laid_on_white(models, tmp_path):
    image = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (24, 0, 40, 32))
    image.save(tmp_path / "picture.png")
    shown = open_picture(models, tmp_path / "picture.png")
    assert shown.shape == (8, 8, 1) and shown[:, 0].min() > 240 and shown[:, 4].max() < 15


# ------------------------------------------------------------------------------------------------------ as HTML


def pictures(markup: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', markup)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_the_moment_that_is_shown(drawing):
    """The teacher at its second step of 5 is the student at its second of 3."""
    markup = html.results(drawing, 2)
    assert re.findall(r'class="ard-where">([^<]+)', markup) == ["step 2 of 5", "step 2 of 3"]
    shown, (teacher, ard) = pictures(markup), (row.drawn.trajectory[..., 0] for row in drawing.rows)
    assert len(shown) == 2 + 2 * 5 + 2 + 2 * 3
    np.testing.assert_array_equal(shown[:2], teacher[:, 1])
    np.testing.assert_array_equal(shown[2:7], teacher[0])
    np.testing.assert_array_equal(shown[12:14], ard[:, 1])
    assert re.findall(r'<img class="now"[^>]+title="([^"]+)"', markup) == ["step 2"] * 4
    end = pictures(html.results(drawing))
    np.testing.assert_array_equal(end[:2], drawing.rows[0].drawn.images[..., 0])


@pytest.mark.parametrize(
    ("position", "longest", "steps", "step"),
    [(1, 24, 4, 1), (6, 24, 4, 1), (7, 24, 4, 2), (24, 24, 4, 4), (0, 5, 5, 1)],
)
def test_the_same_moment_of_a_shorter_trajectory(position, longest, steps, step):
    assert step_at(position, longest, steps) == step


def test_words_are_escaped(drawing):
    caption = '<script>alert("x")</script>'
    markup = (
        html.results(type(drawing)(caption, drawing.rows)) + html.message(caption, True) + html.progress(caption, 0)
    )
    assert "<script" not in markup and markup.count("&lt;script&gt;alert(") > 4 and 'alert("' not in markup


def test_nothing_yet_is_empty():
    assert html.results(None) == "" and html.results(None, 3) == ""


# ------------------------------------------------------------------------------------------------- the command


def test_without_gradio(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = sentence(run("demo", "--workdir", tmp_path), "demo")
    assert said == "ard_jax demo: the demo needs gradio, which is not installed: pip install '.[demo]'."


def test_flags_that_cannot_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "gradio", object())
    assert "--port is 0: give a number from 1 to 65535" in sentence(run("demo", "--port", "0"), "demo")
    assert "there is no folder" in sentence(run("demo", "--workdir", tmp_path / "x"), "demo")
    assert "did you mean --pipeline" in sentence(run("demo", "--pipelines", "x"), "demo")


def test_help_says_what_it_is():
    assert "--pipeline FOLDER" in run("demo", "--help").out
