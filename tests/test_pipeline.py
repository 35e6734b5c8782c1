"""ARDPipeline: the same images as the stages and as diffusers, what it refuses, and its folders."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from ml_collections import ConfigDict
from PIL import Image
from pipeline_fixtures import ROOT, copy, files

import ard_jax.pipeline.files
from ard_jax import ARDPipeline
from ard_jax.build import make_process, make_solve, make_student
from ard_jax.convert import vae_to_diffusers
from ard_jax.data import center_crop
from ard_jax.errors import UserError
from ard_jax.files import read_json, write_json
from ard_jax.models import AutoencoderKL, network_shapes, parameter_shapes
from ard_jax.models.vae import to_images, to_latents
from ard_jax.pipeline.inputs import resolve_labels
from ard_jax.pipeline.prompts import Prompts
from ard_jax.sampling import draw_noise, sample_student, sample_teacher, sampling_key
from ard_jax.weights.tensors import write_tensors
from configs import smoke as smoke_config

LABELS = [3, 1, 4, 1]  # as many in nearly every test, since another number would have to be compiled
SMALL = {"block_out_channels": (2, 4), "norm_num_groups": 2, "layers_per_block": 1, "mid_block_add_attention": False}
NAMES = dict(
    enumerate(
        [
            "tench, Tinca tinca",
            "golden retriever",
            "crane",
            "crane",
            "missile",
            "projectile, missile",
            "6",
            "7",
            "8",
            "9",
        ]
    )
)


@pytest.fixture(scope="module")
def student(pipeline):
    return ARDPipeline.from_pretrained(pipeline / "distill" / "ard")


@pytest.fixture(scope="module")
def teacher(pipeline):
    return ARDPipeline.from_pretrained(pipeline / "teacher")


def small_config(**changes):
    """configs/smoke.py's, on latents of 4 channels, with changes such as student={"target": "xt"}."""
    config = smoke_config.get_config()
    with config.unlocked():
        config.data.update(space="latent", channels=4)
        for section, values in changes.items():
            config[section].update(values)
    return ard_jax.pipeline.files.describe_model(config, is_student=True)


def random_like(shapes, seed=0, scale=0.3):
    """Parameters strong enough for everything to matter: no gate is zero."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(scale * generator.standard_normal(leaf.shape)), shapes)


def small_pipeline(vae=True, **changes):
    """A random student of latents, with a random VAE of 16×16 pixels."""
    config = small_config(**changes)
    model = make_student(config)
    shapes = network_shapes(model)
    if not vae:
        return ARDPipeline(random_like(shapes), config)
    autoencoder = AutoencoderKL(**SMALL, scaling_factor=0.5)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), "float32")
    vae_params = random_like(parameter_shapes(autoencoder, image), seed=1, scale=0.6)
    return ARDPipeline(random_like(shapes), config, vae=autoencoder, vae_params=vae_params)


@pytest.fixture(scope="module")
def latent_student():
    return small_pipeline()


def refused(function, *arguments, **settings) -> str:
    """The one sentence that a call ends in."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **settings)
    said = str(caught.value)
    assert "\n" not in said and said.endswith("."), said
    return said


def noise_of(seed, count=4):
    """Noise of images 0, 1, …, as the stage `sample` draws it."""
    return jax.jit(lambda: draw_noise(sampling_key(seed), np.arange(count), (8, 8, 1)))()


# ------------------------------------------------------------------------------------------------ what it makes


@pytest.mark.parametrize("name", ["ard", "teacher"])
def test_images_are_those_of_the_sample_stage(pipeline, student, teacher, name):
    pipe = teacher if name == "teacher" else student
    with np.load(pipeline / "sample" / name / "samples.npz") as file:
        images, labels = file["arr_0"][:24], file["labels"][:24]
    made = pipe(list(labels), seed=1)
    assert [image.mode for image in made.images] == ["L"] * 24
    np.testing.assert_array_equal(np.stack(made.images)[..., None], images)
    np.testing.assert_array_equal(made.labels, labels)


def test_noise_is_that_of_the_sample_stage_bit_for_bit(student):
    expected = noise_of(7)
    assert student(LABELS, seed=7, output_type="latent").images.tobytes() == (
        student(LABELS, latents=expected, output_type="latent").images.tobytes()
    )


def test_output_types_show_the_same_images(student):
    latent, array, pictures = (student(LABELS, output_type=kind).images for kind in ("latent", "np", "pil"))
    assert latent.shape == array.shape == (4, 8, 8, 1) and latent.dtype == array.dtype == np.float32
    np.testing.assert_allclose(array, np.clip((latent + 1) / 2, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(np.stack(pictures), np.rint(array[..., 0] * 255))


def test_images_of_a_label_lie_side_by_side_and_differ(student):
    made = student([3, 8], num_images_per_label=2, output_type="np")
    assert made.labels.tolist() == [3, 3, 8, 8]
    np.testing.assert_array_equal(made.images, student([3, 3, 8, 8], output_type="np").images)
    assert np.abs(made.images[0] - made.images[1]).max() > 0.1


def test_the_trajectory_of_a_student_is_its_predictions(student):
    made = student(LABELS, output_type="latent", return_trajectory=True)
    noise = noise_of(0)
    expected = jax.jit(lambda: sample_student(student.model, student.params, noise, jnp.asarray(LABELS)))()
    np.testing.assert_allclose(made.trajectory, expected, atol=1e-5)
    assert made.trajectory.shape == (4, 3, 8, 8, 1)
    assert np.abs(made.trajectory[:, 0] - made.trajectory[:, 2]).max() > 0.01
    np.testing.assert_array_equal(made.images, made.trajectory[:, -1])
    assert student(LABELS, output_type="latent").trajectory is None


def test_a_trajectory_is_of_the_same_type_as_the_images(student):
    array = student(LABELS, output_type="np", return_trajectory=True)
    pictures = student(LABELS, output_type="pil", return_trajectory=True)
    levels = [[np.asarray(step) for step in row] for row in pictures.trajectory]
    np.testing.assert_array_equal(levels, np.rint(array.trajectory[..., 0] * 255))
    np.testing.assert_array_equal(np.stack(pictures.images), np.rint(array.images[..., 0] * 255))


def test_the_trajectory_of_a_teacher_is_its_x0_predictions(teacher):
    made = teacher(LABELS, output_type="latent", return_trajectory=True)
    assert made.trajectory.shape == (4, 5, 8, 8, 1)
    np.testing.assert_allclose(made.trajectory, solve(teacher).x0, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(made.images, solve(teacher).xt[:, -1], rtol=1e-5, atol=1e-5)


@functools.cache
def solve(pipe, **changes):
    how = make_solve(pipe.config)
    guidance = {
        name.split("_")[1]: changes.pop(name) for name in ("guidance_scale", "guided_channels") if name in changes
    }
    how = dataclasses.replace(how, **changes, guidance=dataclasses.replace(how.guidance, **guidance))
    noise = noise_of(0)
    run = jax.jit(lambda params, noise, labels: sample_teacher(pipe.model, params, noise, labels, how))
    return run(pipe.params, noise, jnp.asarray(LABELS))


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({"num_inference_steps": 3, "guidance_scale": 4, "solver": "heun"}, {"steps": 3, "guidance_scale": 4.0}),
        ({"guidance_scale": 1, "solver": "dpm++2m"}, {"guidance_scale": 1.0}),
    ],
)
def test_a_teacher_runs_with_any_settings(teacher, asked, meant):
    images = teacher(LABELS, output_type="latent", **asked).images
    np.testing.assert_allclose(images, solve(teacher, solver=asked["solver"], **meant).xt[:, -1], rtol=1e-5, atol=1e-5)
    assert np.abs(images - solve(teacher).xt[:, -1]).max() > 1e-2


def test_batches_of_one_size_give_the_same_images(student, compilations):
    labels = [i % 10 for i in range(11)]
    whole = student(labels, output_type="np", return_trajectory=True)
    student(LABELS, output_type="np", return_trajectory=True)
    compilations.count = 0
    split = student(labels, output_type="np", return_trajectory=True, batch_size=4)
    assert compilations.count == 0  # every batch is of 4 images, the last 3 fill one up
    np.testing.assert_allclose(split.images, whole.images, atol=1e-6)
    np.testing.assert_allclose(split.trajectory, whole.trajectory, atol=1e-6)
    assert split.images.shape == (11, 8, 8, 1) and split.labels.tolist() == labels


def test_later_calls_of_the_same_shape_do_not_compile(pipeline, compilations):
    pipe = ARDPipeline.from_pretrained(pipeline / "teacher")
    compilations.count = 0
    first = pipe(LABELS, output_type="np").images
    assert compilations.count >= 2  # the noise and the network
    compilations.count = 0
    others = [
        pipe(LABELS, seed=1, output_type="np"),
        pipe([9, 8, 7, 6], output_type="np"),
        pipe(LABELS, num_inference_steps=5, solver="ddim", output_type="pil"),  # what the config says already
    ]
    assert compilations.count == 0
    assert np.abs(others[0].images - first).max() > 0.1 and np.abs(others[1].images - first).max() > 0.1
    pipe(LABELS, num_inference_steps=4)
    assert compilations.count == 1


def test_the_program_can_be_exported_for_any_batch(student, teacher):
    batch = export.symbolic_shape("batch")
    inputs = jax.ShapeDtypeStruct((*batch, 8, 8, 1), "float32"), jax.ShapeDtypeStruct(batch, "int32")
    for pipe, steps in ((student, 3), (teacher, 5)):
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pipe.params)
        exported = export.export(jax.jit(pipe.generate_function(trajectory=True)))(shapes, None, *inputs)
        assert [leaf.shape for leaf in exported.out_avals] == [(*batch, 8, 8, 1), (*batch, steps, 8, 8, 1)]


# ------------------------------------------------------------------------------------------------------- latents


def test_latents_are_decoded_by_the_vae(latent_student):
    pipe = latent_student
    latents = pipe(LABELS, output_type="latent").images
    array, pictures = (pipe(LABELS, output_type=kind, return_trajectory=True) for kind in ("np", "pil"))
    decoded = jax.jit(lambda z: to_images(pipe.vae, pipe.vae_params, z))(latents)
    assert latents.shape == (4, 8, 8, 4)
    assert array.images.shape == (4, 16, 16, 3) and array.trajectory.shape == (4, 3, 16, 16, 3)
    np.testing.assert_allclose(array.images, np.clip((decoded + 1) / 2, 0, 1), atol=1e-5)
    np.testing.assert_array_equal(array.images, array.trajectory[:, -1])
    assert np.abs(decoded).max() > 1 and array.images.min() == 0  # what leaves [-1, 1] is clipped
    assert pictures.images[0].mode == "RGB" and pictures.images[0].size == (16, 16)


def test_without_a_vae_latents_can_be_made_but_no_pictures():
    pipe = small_pipeline(vae=False)
    assert pipe(LABELS, output_type="latent").images.shape == (4, 8, 8, 4)
    assert "has no VAE and cannot make pictures" in refused(pipe, LABELS)
    picture = Image.new("RGB", (16, 16))
    assert "has no VAE and cannot edit images" in refused(pipe.edit, picture, 1, 3, output_type="latent")


def test_editing_encodes_to_the_mean(latent_student):
    pipe = latent_student
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    made = pipe.edit(picture, 1, LABELS, output_type="latent", return_trajectory=True)
    pixels = np.asarray(picture, np.float32)[None] / 127.5 - 1
    source = jax.jit(lambda x: to_latents(pipe.vae, pipe.vae_params, x))(pixels)
    np.testing.assert_allclose(made.trajectory[:, 0], np.broadcast_to(source, (4, 8, 8, 4)), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- editing


def test_an_edit_goes_on_from_the_source(student):
    """Against the training forward of its own prediction with the image in place of the second."""
    source = student(LABELS, output_type="np").images[0]
    made = student.edit(source, 2, LABELS, seed=2, output_type="latent", return_trajectory=True)
    noise, labels = noise_of(2), jnp.asarray(LABELS)
    own = student(LABELS, seed=2, output_type="latent", return_trajectory=True).trajectory
    points = np.stack([noise, own[:, 0], np.stack([2 * source - 1] * 4)], axis=1)
    last = jax.jit(lambda: student.model.apply({"params": student.params}, points, labels)[:, -1])()
    np.testing.assert_allclose(made.trajectory, np.stack([points[:, 1], points[:, 2], last], axis=1), atol=1e-5)
    np.testing.assert_array_equal(made.images, made.trajectory[:, -1])
    assert np.abs(made.images - own[:, -1]).max() > 1e-2 and np.abs(own[:, 1] - points[:, 2]).max() > 0.1


def test_a_later_source_leaves_more_of_the_predictions_before_it(student):
    source = student(LABELS, output_type="np").images[0]
    early, late = (student.edit(source, s, LABELS, output_type="latent", return_trajectory=True) for s in (1, 2))
    own = student(LABELS, output_type="latent", return_trajectory=True).trajectory
    np.testing.assert_allclose(late.trajectory[:, 0], own[:, 0], atol=1e-6)
    for made, step in ((early, 0), (late, 1)):
        np.testing.assert_allclose(made.trajectory[:, step], np.stack([2 * source - 1] * 4), atol=1e-6)


def test_a_noisy_point_is_the_image_with_the_trajectorys_noise(student):
    """Points 3 and 1 of a grid of 5 steps are what the solver arrives at after 2 and 4 of them."""
    config = student.config.copy_and_resolve_references()
    config.student.target = "xt"
    pipe = ARDPipeline(student.params, config)
    picture = np.random.default_rng(0).random((8, 8, 1), np.float32)
    noise = np.asarray(noise_of(0))
    grid = make_process(config).grid(5)
    for step, node in ((1, 2), (2, 4)):
        made = pipe.edit(picture, step, LABELS, output_type="latent", return_trajectory=True)
        expected = grid.alpha[node] * (2 * picture - 1) + grid.sigma[node] * noise
        np.testing.assert_allclose(made.trajectory[:, step - 1], expected, atol=1e-5)


def test_every_kind_of_image_can_be_edited(student, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    picture = Image.fromarray(levels)
    picture.save(tmp_path / "picture.png")
    kinds = [picture, picture.convert("RGB"), tmp_path / "picture.png", str(tmp_path / "picture.png"), levels]
    kinds += [levels[..., None], levels / 255, np.float32(levels[..., None]) / 255]
    first, *others = [student.edit(kind, 1, LABELS, output_type="np").images for kind in kinds]
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)
    darker = student.edit(levels // 2, 1, LABELS, output_type="np").images
    assert np.abs(darker - first).max() > 1e-2


def test_what_cannot_be_edited(student, teacher, tmp_path):
    square = np.zeros((8, 8), np.uint8)
    assert "is 16×8 pixels, but this model works on 8×8: crop it with ard_jax.data.center_crop(image, 8)" in refused(
        student.edit, Image.new("L", (16, 8)), 1, 3
    )
    assert student.edit(center_crop(Image.new("L", (16, 8)), 8), 1, LABELS).images[0].size == (8, 8)
    assert "is 12×12 pixels" in refused(student.edit, np.zeros((12, 12, 1)), 1, 3)
    values = np.linspace(0, 255, 64).reshape(8, 8)
    assert "values from 0 to 255: floats must lie in [0, 1]" in refused(student.edit, values, 1, 3)
    assert "has 3 channels" in refused(student.edit, np.zeros((8, 8, 3)), 1, 3)
    assert "array of int64 (8, 8, 1)" in refused(student.edit, square.astype(np.int64), 1, 3)
    assert "none.png cannot be read" in refused(student.edit, tmp_path / "none.png", 1, 3)
    assert "source_step is 0: give a whole number from 1 to 2" in refused(student.edit, square, 0, 3)
    assert "source_step is 3: give" in refused(student.edit, square, 3, 3)
    assert "source_step is 1.0: give" in refused(student.edit, square, 1.0, 3)
    assert "a teacher cannot edit images" in refused(teacher.edit, square, 1, 3)
    assert "from 0 to 9" in refused(student.edit, square, 1, 10)
    one = small_pipeline(student={"points": (0,), "history_layers": 0})
    assert "a student of 1 step cannot edit images" in refused(one.edit, np.zeros((16, 16, 3)), 1, 3)


# -------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ("golden retriever", [1]),
        ("Golden  Retriever", [1]),
        (["tinca tinca", "tench", 4, "tench, Tinca tinca"], [0, 0, 4, 0]),
        ("missile", [4]),  # the whole entry comes before a name among others
        (np.array([5, 0]), [5, 0]),
        (np.int32(2), [2]),
        (3, [3]),
    ],
)
def test_labels_resolve(given, numbers):
    labels = resolve_labels(given, NAMES, 6)
    assert labels.tolist() == numbers and labels.dtype == np.int32


def test_labels_that_do_not(student):
    assert "no class named 'golden retreiver': did you mean 'golden retriever'" in refused(
        resolve_labels, "golden retreiver", NAMES, 6
    )
    assert "no class named 'xyzzy': the pipeline's id2label lists the names" in refused(
        resolve_labels, "xyzzy", NAMES, 6
    )
    assert "'crane' stands for several classes: choose 2 (crane) or 3 (crane) by number" in refused(
        resolve_labels, "crane", NAMES, 6
    )
    assert "class label 10 is out of range: choose one from 0 to 9" in refused(student, [3, 10])
    assert "class label -1 is out of range" in refused(student, -1)
    assert "class label 1.5 is neither a whole number nor a name" in refused(student, [1.5])
    assert "class_labels is empty" in refused(student, [])
    nameless = ARDPipeline(student.params, student.config)
    assert "'three' cannot be looked up, since this pipeline has no names" in refused(nameless, "three")


def test_prompts_that_are_cut_are_said(caplog):
    pytest.importorskip("wordllama")
    prompts = Prompts("wordllama", ConfigDict({"length": 6, "cleaning": "none"}), 256)
    texts = ["a red heart", "a red heart and a blue circle and a fox"]
    prompts.resolve(texts[0], {"negative_prompt": "green"}, is_guided=True, is_student=False)
    assert not caplog.messages
    _, caption = prompts.resolve([*texts, texts[1]], {}, is_guided=False, is_student=True)
    assert caption.mask.sum(axis=1).max() == 6
    prompts.resolve(texts[0], {"negative_prompt": texts[1]}, is_guided=True, is_student=False)
    assert caplog.messages == [f"{count} prompts have over 6 tokens and are cut." for count in ("2 of 3", "1 of 1")]
    assert {(record.name, record.levelname) for record in caplog.records} == {("ard_jax", "WARNING")}


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_inference_steps": 4}, "num_inference_steps is 4, but this student was trained for 3 steps"),
        ({"guidance_scale": 2.0}, "guidance_scale is a teacher's setting, and this is a student"),
        ({"solver": "ddim"}, "solver is a teacher's setting"),
        ({"guided_channels": 0}, "guided_channels is a teacher's setting"),
        ({"output_type": "pt"}, "output_type is 'pt': choose one of pil, np, latent"),
        ({"num_images_per_label": 0}, "num_images_per_label is 0: give a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size is 0: give a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5: give"),
        ({"seed": -1}, "seed is -1: give a whole number from 0 to 2147483647"),
        (
            {"latents": np.zeros((4, 1, 8, 8))},
            "(4, 1, 8, 8), but these labels need floats (4, 8, 8, 1)",
        ),
        ({"latents": np.zeros((4, 8, 8, 1), int)}, "array of int64"),
    ],
)
def test_what_a_student_refuses(student, compilations, asked, said):
    assert said in refused(student, LABELS, **asked)
    assert compilations.count == 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0: give a whole number of at least 1"),
        ({"num_inference_steps": 1001}, "steps is 1001, but the process has 1000 timesteps"),
        ({"guidance_scale": -1}, "guidance_scale is -1: give a number of at least 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guided_channels": -1}, "guided_channels is -1: give a whole number of at least 0"),
        ({"solver": "euler"}, "solver is 'euler', which does not exist: choose one of ddim, heun, dpm++2m"),
    ],
)
def test_what_a_teacher_refuses(teacher, compilations, asked, said):
    assert said in refused(teacher, LABELS, **asked)
    assert compilations.count == 0


def test_a_student_takes_its_own_number_of_steps(student):
    made = student(LABELS, output_type="latent", num_inference_steps=3)
    np.testing.assert_array_equal(made.images, student(LABELS, output_type="latent").images)


def test_a_model_that_has_diverged_makes_no_pictures(student):
    noise = np.full((4, 8, 8, 1), np.nan)
    assert "pixels are NaN" in refused(student, LABELS, latents=noise)


# --------------------------------------------------------------------------------------------------------- folders


def same(first, second):
    """Whether two trees of parameters are equal bit for bit, types too."""

    def equal(a, b):
        return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()

    return jax.tree.all(jax.tree.map(equal, first, second))


@pytest.mark.parametrize("name", ["distill/ard", "teacher"])
def test_a_saved_pipeline_is_the_same(pipeline, tmp_path, name, request):
    opened = request.getfixturevalue("teacher" if name == "teacher" else "student")
    config = opened.config.copy_and_resolve_references()
    if opened.is_student:
        config.student.name = "another"
    pipe = ARDPipeline(opened.params, config, id2label=NAMES, card="# A card\n")
    pipe.save_pretrained(tmp_path / "saved")
    again = ARDPipeline.from_pretrained(tmp_path / "saved")
    assert same(pipe.params, again.params) and again.config == pipe.config and again.is_student == pipe.is_student
    assert again.id2label == NAMES and again.card == "# A card\n" and again.vae is None
    np.testing.assert_array_equal(again(LABELS, output_type="np").images, opened(LABELS, output_type="np").images)
    part = "teacher" if name == "teacher" else "student"
    written = ["README.md", "model_index.json", f"{part}/config.json", f"{part}/diffusion_pytorch_model.safetensors"]
    assert files(tmp_path) == [f"saved/{file}" for file in written]
    index = read_json(tmp_path / "saved" / "model_index.json")
    kind = "DiT" if part == "teacher" else "ARDStudent"
    assert (
        index["_class_name"] == "ARDPipeline"
        and index[part] == ["ard_jax", kind]
        and index["id2label"]["4"] == "missile"
    )


def test_a_saved_vae_is_the_same(latent_student, tmp_path):
    latent_student.save_pretrained(tmp_path / "saved")
    again = ARDPipeline.from_pretrained(str(tmp_path / "saved"))
    assert same(again.vae_params, latent_student.vae_params) and again.vae == latent_student.vae
    assert same(again.params, latent_student.params)
    images, expected = (pipe(LABELS, output_type="np", return_trajectory=True) for pipe in (again, latent_student))
    np.testing.assert_array_equal(images.trajectory, expected.trajectory)
    assert "from_pretrained" in (tmp_path / "saved" / "README.md").read_text()


@pytest.mark.slow
def test_bfloat16_is_half_the_memory(latent_student, tmp_path):
    latent_student.save_pretrained(tmp_path / "saved")
    half = ARDPipeline.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    leaves = jax.tree.leaves((half.params, half.vae_params))
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
    assert half.model.backbone.dtype == half.vae.dtype == jnp.bfloat16 and half.config.model.dtype == "bfloat16"
    latents, expected = (pipe(LABELS, output_type="latent").images for pipe in (half, latent_student))
    assert latents.dtype == np.float32 and 0 < np.abs(latents - expected).mean() < 0.05 * np.abs(expected).mean()
    half.save_pretrained(tmp_path / "half")
    again = ARDPipeline.from_pretrained(tmp_path / "half", dtype=jnp.bfloat16)
    assert same(again.params, half.params) and same(again.vae_params, half.vae_params)
    wide = ARDPipeline.from_pretrained(tmp_path / "half", dtype="float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves((wide.params, wide.vae_params))} == {"float32"}
    assert wide.model.backbone.dtype == jnp.float32
    assert "dtype is 'float16': choose float32 or bfloat16" in refused(
        ARDPipeline.from_pretrained, tmp_path / "saved", dtype="float16"
    )


def test_a_workdir_of_latents_brings_its_vae_and_names(pipeline, tmp_path):
    """A teacher whose config is changed to say latents of 1 channel, and a VAE of such beside it."""
    workdir = copy(pipeline, tmp_path, "teacher", "distill")
    for folder in (workdir / "teacher", workdir / "distill" / "ard"):
        config = read_json(folder / "config.json")
        config["data"]["space"] = "latent"
        write_json(folder / "config.json", config)
    write_json(workdir / "teacher" / "labels.json", ["nought", "one"])
    assert ARDPipeline.from_pretrained(workdir / "teacher").vae is None
    autoencoder = AutoencoderKL(**SMALL, latent_channels=1)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), "float32")
    vae_params = random_like(parameter_shapes(autoencoder, image))
    state_dict, settings = vae_to_diffusers(autoencoder, vae_params)
    write_tensors(workdir / "vae" / "diffusion_pytorch_model.safetensors", state_dict)
    write_json(workdir / "vae" / "config.json", settings)
    for name in ("teacher", "distill/ard"):
        pipe = ARDPipeline.from_pretrained(workdir / name)
        assert pipe.vae == autoencoder and same(pipe.vae_params, vae_params)
        assert pipe.id2label == {0: "nought", 1: "one"} and pipe.image_shape == (16, 16, 3)
        assert pipe.config.data.dir == "" and pipe.is_student == (name != "teacher")
    write_json(workdir / "distill" / "ard" / "labels.json", ["its", "own"])  # as converted students have
    assert ARDPipeline.from_pretrained(workdir / "distill" / "ard").id2label == {0: "its", 1: "own"}


def test_an_earlier_pipeline_is_replaced_and_nothing_else_is(student, tmp_path):
    folder = tmp_path / "saved"
    student.save_pretrained(folder)
    ARDPipeline(student.params, student.config, id2label=NAMES).save_pretrained(folder)
    assert ARDPipeline.from_pretrained(folder).id2label == NAMES
    (folder / "mine.txt").write_text("kept")
    assert "has more in it than an earlier pipeline of ours (mine.txt)" in refused(student.save_pretrained, folder)
    other = tmp_path / "other"
    other.mkdir()
    student.save_pretrained(other)  # an empty folder is as good as none
    shutil.rmtree(other / "student")
    write_json(other / "model_index.json", {"_class_name": "DiTPipeline"})
    assert "is no earlier pipeline of ours" in refused(student.save_pretrained, other)
    assert "is a file" in refused(student.save_pretrained, other / "model_index.json")
    assert (folder / "mine.txt").read_text() == "kept" and sorted(path.name for path in tmp_path.iterdir()) == [
        "other", "saved"
    ]  # fmt: skip


def test_a_pipeline_is_saved_whole_or_not_at_all(student, tmp_path, monkeypatch):
    student.save_pretrained(tmp_path / "saved")
    before = {file: (tmp_path / file).read_bytes() for file in files(tmp_path)}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ard_jax.pipeline.files, "default_card", full)  # the weights are written by then
    for name in ("saved", "new"):
        with pytest.raises(OSError, match="No space"):
            student.save_pretrained(tmp_path / name)
    assert {file: (tmp_path / file).read_bytes() for file in files(tmp_path)} == before


def broken_index(folder):
    (folder / "model_index.json").write_text("{")


def no_part(folder):
    write_json(folder / "model_index.json", {"_class_name": "ARDPipeline"})


def another_kind(folder):
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})


def no_config(folder):
    (folder / "student" / "config.json").unlink()


def newer_config(folder):
    described = read_json(folder / "student" / "config.json")
    described["config"]["model"]["rope"] = True
    write_json(folder / "student" / "config.json", described)


def no_section(folder):
    described = read_json(folder / "student" / "config.json")
    del described["config"]["student"]
    write_json(folder / "student" / "config.json", described)


def no_weights(folder):
    (folder / "student" / "diffusion_pytorch_model.safetensors").unlink()


def truncated_weights(folder):
    path = folder / "student" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def another_size(folder):
    described = read_json(folder / "student" / "config.json")
    described["config"]["model"]["depth"] = 3
    write_json(folder / "student" / "config.json", described)


def no_vae(folder):
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"vae": ["diffusers", "AutoencoderKL"]})


def no_index(folder):
    (folder / "model_index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (broken_index, "model_index.json is damaged"),
        (no_part, "names neither a student nor a teacher"),
        (
            another_kind,
            "holds a StableDiffusionPipeline: only a DiTPipeline, PixArtSigmaPipeline, PixArtAlphaPipeline or ARD",
        ),
        (no_config, "student/config.json is missing, so"),
        (newer_config, "describes no model of this version of ard_jax"),
        (no_section, "does not fit the architecture that its config describes"),
        (no_weights, "holds no weights"),
        (truncated_weights, "truncated or corrupt"),
        (another_size, "missing: blocks.2.adaLN_modulation.1.weight"),
        (no_vae, "vae/config.json is missing"),
        (no_index, "is no pipeline: name one with a model_index.json, or a finished one"),
    ],
)
def test_a_broken_folder_is_refused(student, tmp_path, damage, said):
    student.save_pretrained(tmp_path / "saved")
    damage(tmp_path / "saved")
    assert said in refused(ARDPipeline.from_pretrained, tmp_path / "saved")


def test_settings_that_came_later_have_their_defaults(student, tmp_path):
    student.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "student" / "config.json"
    described = read_json(path)
    del described["config"]["model"]["mlp_norm_eps"]
    write_json(path, described)
    assert ARDPipeline.from_pretrained(tmp_path / "saved").model.backbone.mlp_norm_eps == 1e-6


def test_a_folder_that_is_no_pipeline(pipeline, tmp_path):
    said = refused(ARDPipeline.from_pretrained, pipeline)
    assert f"is no pipeline: name {pipeline}/teacher or {pipeline}/distill/ard." in said
    assert f"name {pipeline}/distill/ard." in refused(ARDPipeline.from_pretrained, pipeline / "distill")
    workdir = copy(pipeline, tmp_path, "teacher")
    (workdir / "teacher" / "done.json").unlink()
    assert "has no done.json: run the stage 'teacher' to its end" in refused(
        ARDPipeline.from_pretrained, workdir / "teacher"
    )
    assert "there is no folder /none/of/these" in refused(ARDPipeline.from_pretrained, "/none/of/these")
    assert "config.json is a file" in refused(ARDPipeline.from_pretrained, pipeline / "teacher" / "config.json")


def test_a_repository_is_downloaded(student, tmp_path, monkeypatch):
    student.save_pretrained(tmp_path / "saved")
    asked = []

    def fetch(source, revision):
        asked.append((source, revision))
        if source == "hf:ORG/none":
            raise UserError("hf:ORG/none cannot be downloaded (no net): see that there is a net.")
        return tmp_path / "saved"

    monkeypatch.setattr(ard_jax.pipeline.files, "fetch_source", fetch)
    monkeypatch.chdir(tmp_path)
    for source in ("ORG/NAME", "hf:ORG/NAME"):
        assert same(ARDPipeline.from_pretrained(source).params, student.params)
    ARDPipeline.from_pretrained("ORG/NAME", revision="v1")
    assert asked == [("hf:ORG/NAME", None), ("hf:ORG/NAME", None), ("hf:ORG/NAME", "v1")]
    said = refused(ARDPipeline.from_pretrained, "ORG/none")
    assert (
        said == "there is no folder ORG/none, and hf:ORG/none cannot be downloaded (no net): see that there is a net."
    )


# ------------------------------------------------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random DiTPipeline, strong enough for every setting to matter, and its folder.

    A weak schedule keeps what a network of random weights makes of noise at a size of ten or so.
    """
    import diffusers
    import torch

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    ).eval()
    first, second = (block.norm1.emb for block in transformer.transformer_blocks)
    second.load_state_dict(first.state_dict())  # as published: one embedder, copied
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, sample_size=16, **kinds).eval()
    with torch.no_grad():
        for module in (transformer, vae):
            for name, parameter in module.named_parameters():
                parameter.mul_(1 if parameter.ndim == 1 or "embed" in name else 1.5)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_end=0.004)
    pipe = diffusers.DiTPipeline(transformer, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("dit")
    pipe.save_pretrained(folder)
    names = {str(number): f"class {number}, number {number}" for number in range(1000)}
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"id2label": names})  # as the published folders have it
    return pipe, folder


@pytest.mark.oracle
def test_a_dit_pipeline_makes_the_same_images(theirs):
    """DDIM, 10 steps, guidance 4.0 of all four channels, from the same noise: latents and images within 1e-4."""
    import torch

    pipe, folder = theirs
    latents, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda z: latents.append(z * pipe.vae.config.scaling_factor) or decode(z)
    settings = {"num_inference_steps": 10, "guidance_scale": 4.0}
    labels = [207, 360, 999]
    images = pipe(labels, generator=torch.manual_seed(3), output_type="np", **settings).images
    noise = torch.randn((3, 4, 8, 8), generator=torch.manual_seed(3)).permute(0, 2, 3, 1)
    ours = ARDPipeline.from_pretrained(folder)
    names = [f"number {label}" for label in labels]
    made = {kind: ours(names, latents=noise, output_type=kind, **settings) for kind in ("latent", "np")}
    assert made["np"].labels.tolist() == labels
    expected = latents[0].permute(0, 2, 3, 1).numpy()
    assert expected.std() > 3 and images.std() > 0.1 and made["np"].images.shape == images.shape == (3, 16, 16, 3)
    np.testing.assert_allclose(made["latent"].images, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(made["np"].images, images, rtol=0, atol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("vae", "vae/config.json is missing"),
        ("transformer", "transformer/config.json is missing"),
        ("scheduler", "scheduler/scheduler_config.json is missing"),
        ("vae/diffusion_pytorch_model.safetensors", "vae holds no weights"),
    ],
)
def test_a_dit_pipeline_that_is_not_whole(theirs, tmp_path, missing, said):
    folder = shutil.copytree(theirs[1], tmp_path / "dit")
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    assert said in refused(ARDPipeline.from_pretrained, folder)


# ---------------------------------------------------------------------------------------------------------- import


def test_the_package_is_imported_without_jax():
    code = "import sys, ard_jax; print(sorted({'jax', 'numpy'} & set(sys.modules)), 'ARDPipeline' in ard_jax.__all__)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == "[] True\n"
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        ard_jax.Pipeline  # noqa: B018


@pytest.mark.slow
def test_devices_share_a_batch(pipeline, student):
    """Three images on two devices: the batch is filled up to four, and they are those of one device."""
    code = f"""
import jax, numpy as np
from ard_jax import ARDPipeline
pipe = ARDPipeline.from_pretrained({str(pipeline / "distill" / "ard")!r})
made = pipe([3, 1, 4], output_type="np", return_trajectory=True)
source = pipe.edit(made.images[0], 1, [3, 1, 4], output_type="np")
print(len(jax.devices()), made.trajectory.shape, all(leaf.is_fully_replicated for leaf in jax.tree.leaves(pipe.params)))
print(made.images.tolist() + source.images.tolist())
"""
    flags = f"--xla_force_host_platform_device_count=2 {os.environ['XLA_FLAGS']}"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts, images = done.stdout.splitlines()
    assert facts == "2 (3, 3, 8, 8, 1) True"
    made = student([3, 1, 4], output_type="np")
    edited = student.edit(made.images[0], 1, [3, 1, 4], output_type="np")
    np.testing.assert_allclose(json.loads(images), [*made.images, *edited.images], atol=1e-6)
