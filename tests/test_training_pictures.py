"""Pictures of what a training has learned so far: drawn as they should be, each step once, and nothing else changes."""

import os

import jax
import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import copy, done, finish, process, smoke
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from test_training import at_step, fit, quick_peak, terminate  # noqa: F401 (fixtures)
from test_training_loggers import logged, mlflow_files, needs, offline_wandb  # noqa: F401 (fixtures)

from ard_jax.build import make_solve
from ard_jax.data import to_uint8
from ard_jax.errors import Preempted
from ard_jax.files import read_json, tree_sha256
from ard_jax.parallel import make_mesh
from ard_jax.sampling import draw_noise, sample_student, sample_teacher, sampling_key
from ard_jax.training.pictures import Pictures, pictures_in
from ard_jax.workdir import load_student, load_teacher
from configs import smoke as smoke_config

DRAWN = [0, 4, 8, 12]  # by a training of `test_training` that draws every 4 steps


class Drawn:
    """A drawing of a small model: its first weight as a grey level; the steps that it was asked for."""

    def __init__(self):
        self.calls = 0

    def __call__(self, params):
        self.calls += 1
        return np.full((2, 3, 3), shade(params), np.uint8)


def shade(params):
    return np.uint8(100 * abs(float(params["w"][0])))


def shades(directory):
    return {step: int(np.asarray(Image.open(path))[0, 0, 0]) for step, path in pictures_in(directory).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, state, drawing) of a training that was never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ard_jax.training.loop.peak_flops", lambda: 1e12)
        directory, draw = tmp_path_factory.mktemp("whole"), Drawn()
        return directory, fit(directory, pictures=Pictures(draw, 4), loggers=("tensorboard",)).state, draw


def test_the_first_step_every_so_many_and_the_last_are_drawn(whole, tmp_path):
    directory, state, draw = whole
    assert list(shades(directory)) == DRAWN and draw.calls == len(DRAWN)
    assert shades(directory)[0] == 0 and shades(directory)[12] == shade(state.ema) > 0
    fit(tmp_path, pictures=Pictures(Drawn(), 5))
    assert list(shades(tmp_path)) == [0, 5, 10, 12]


def test_drawing_changes_nothing_of_what_is_trained(whole, tmp_path):
    directory, state, _ = whole
    alone = fit(tmp_path).state
    assert tree_sha256(alone._asdict()) == tree_sha256(state._asdict())
    assert not pictures_in(tmp_path)


def run_in_three(directory, at_step, names=()):  # noqa: F811
    """Saved and stopped after step 5; broken off in 11, when 8 is drawn and 6 was saved last; then to the end."""

    def fail():
        raise RuntimeError("the power is gone")

    draw = Drawn()
    for step, act, ends in ((5, terminate, Preempted), (11, fail, RuntimeError)):
        at_step(step, act)
        with pytest.raises(ends):
            fit(directory, pictures=Pictures(draw, 4), loggers=names, checkpoint_every=6)
        at_step(step, lambda: None)
    assert list(shades(directory)) == [0, 4, 8]
    fit(directory, pictures=Pictures(draw, 4), loggers=names, checkpoint_every=6)
    return draw


def test_a_training_in_three_draws_what_one_draws(whole, tmp_path, at_step):  # noqa: F811
    draw = run_in_three(tmp_path, at_step)
    assert shades(tmp_path) == shades(whole[0]) and draw.calls == len(DRAWN) + 1  # 8 was made again
    assert not list(tmp_path.rglob("*.partial*"))


def test_pictures_beyond_the_checkpoint_are_removed_at_once(tmp_path, at_step):  # noqa: F811
    def look():
        seen.append(list(shades(tmp_path)))
        terminate()

    seen = []
    (tmp_path / "progress").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "progress" / "8.png")
    at_step(1, look)
    with pytest.raises(Preempted):
        fit(tmp_path, pictures=Pictures(Drawn(), 4))
    assert seen == [[0]]


def test_tensorboard_has_the_pictures(whole):
    directory, _, _ = whole
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0}).Reload()
    found = {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors("samples")}
    assert list(found) == DRAWN and {(int(width), int(height)) for width, height, _ in found.values()} == {(3, 2)}


@needs("wandb")
def test_wandb_has_every_picture_once(offline_wandb, at_step, tmp_path):  # noqa: F811
    from wandb.proto.wandb_internal_pb2 import Record

    run_in_three(tmp_path, at_step, ("wandb",))
    steps = []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        histories = [record.history for record in map(Record.FromString, logged(path)) if record.HasField("history")]
        rows = [{"".join(item.nested_key[:1]) or item.key: item.value_json for item in one.item} for one in histories]
        steps += [int(row["_step"]) for row in rows if "samples" in row]
    assert steps == DRAWN


@needs("mlflow")
def test_mlflow_has_every_picture_once(mlflow_files, at_step, tmp_path):  # noqa: F811
    from mlflow.tracking import MlflowClient

    run_in_three(tmp_path, at_step, ("mlflow",))
    run = read_json(tmp_path / "loggers.json")["runs"]["mlflow"]
    names = [file.path for file in MlflowClient().list_artifacts(run, "images") if file.path.endswith(".png")]
    assert sorted(int(name.split("+step+")[1].split("+")[0]) for name in names) == DRAWN


# ------------------------------------------------------------------------------------------------- of real networks

LABELS = np.arange(16) * 10 // 16


def images_in(path):
    """(16, 8, 8): the pictures of a grid of 4 by 4, each enlarged 8 times, gutters of 2."""
    grid = np.asarray(Image.open(path))
    assert grid.shape == (4 * 64 + 3 * 2, 4 * 64 + 3 * 2, 3)
    corners = [(row * 66, column * 66) for row in range(4) for column in range(4)]
    return np.stack([grid[top : top + 64 : 8, left : left + 64 : 8, 0] for top, left in corners])


def noise():
    return draw_noise(sampling_key(1), np.arange(16), (8, 8, 1))


def close(images, expected):
    apart = np.abs(images.astype(int) - to_uint8(expected)[..., 0])
    return apart.max() <= 1 and images.std() > 5  # rounding at the edge of a grey level


def test_a_teacher_draws_as_it_learns_and_learns_the_same(pipeline, tmp_path):
    assert smoke("teacher", tmp_path, "run.sample_every=15").status == 0
    folder = tmp_path / "teacher"
    assert done(folder)["sha256"] == done(pipeline / "teacher")["sha256"]
    assert list(pictures_in(folder)) == [0, 15, 20]
    config = smoke_config.get_config()
    model, params, *_ = load_teacher(config, tmp_path, make_mesh())
    expected = jax.jit(lambda: sample_teacher(model, params, noise(), LABELS, make_solve(config)).xt[:, -1])()
    assert close(images_in(folder / "progress" / "20.png"), expected)
    assert (images_in(folder / "progress" / "0.png") != images_in(folder / "progress" / "20.png")).any()


def test_a_student_draws_as_it_learns_and_learns_the_same(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories")
    assert smoke("distill", workdir, "run.sample_every=20").status == 0
    folder = workdir / "distill" / "ard"
    assert done(folder)["sha256"] == done(pipeline / "distill" / "ard")["sha256"]
    assert list(pictures_in(folder)) == [0, 20]
    model, params, *_ = load_student(folder, make_mesh())
    expected = jax.jit(lambda: sample_student(model, params, noise(), LABELS)[:, -1])()
    assert close(images_in(folder / "progress" / "20.png"), expected)


@pytest.mark.slow
def test_parts_of_a_network_draw_what_it_draws_whole(pipeline, tmp_path):
    """Parameters split over two devices, heads over two others, more devices than a picture has rows for each."""
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories")
    many = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    meshes = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "run.sample_every=20", "distill.steps=20")
    ended = finish(process("distill", workdir, *meshes, XLA_FLAGS=many))
    assert ended.status == 0, ended.err
    model, params, *_ = load_student(workdir / "distill" / "ard", make_mesh())
    expected = jax.jit(lambda: sample_student(model, params, noise(), LABELS)[:, -1])()
    assert close(images_in(workdir / "distill" / "ard" / "progress" / "20.png"), expected)
