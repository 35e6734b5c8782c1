"""A whole run in the latents of an autoencoder: images in at the front, images out at the end."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import copy, done, files, sentence, smoke

from ard_jax.convert import vae_to_diffusers
from ard_jax.data import to_uint8
from ard_jax.files import read_json, read_npz, write_json
from ard_jax.models import AutoencoderKL
from ard_jax.models.vae import to_images
from ard_jax.parallel import make_mesh
from ard_jax.picture_grid import image_grid
from ard_jax.sampling import draw_noise, sample_student, sampling_key
from ard_jax.stages import sample
from ard_jax.weights.tensors import write_tensors
from ard_jax.workdir import load_student

STAGES = ("encode", "teacher", "trajectories", "distill", "sample", "evaluate", "report")


def write_vae(folder, channels=1, latent_channels=2, widths=(8, 8)):
    """A random autoencoder in diffusers' format; by default of grey images, a latent pixel for 2×2 of theirs."""
    model = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
    )
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, channels), np.float32))["params"]
    tensors, config = vae_to_diffusers(model, params)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    write_json(folder / "config.json", config)
    return model, params


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory):
    """(workdir, overrides, autoencoder, its parameters) of a whole run."""
    workdir = tmp_path_factory.mktemp("latents")
    vae = write_vae(workdir / "vae")
    overrides = (
        "data.source=tfds", f"data.dir={workdir / 'latents' / '1.0.0'}", "data.space=latent", "data.image_size=4",
        "data.channels=2", "encode.source=digits", "encode.image_size=8", "encode.horizontal_flip=False",
        "encode.shard_size=600", "vae.batch_size=5", "run.sample_every=20",
    )  # fmt: skip
    for stage in STAGES:
        outcome = smoke(stage, workdir, *overrides)
        assert outcome.status == 0, outcome.err
    return workdir, overrides, *vae


@pytest.mark.slow
def test_samples_are_decoded(latent_run, tmp_path):
    workdir, overrides, model, params = latent_run
    with np.load(workdir / "sample" / "ard" / "samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["labels"]
    assert images.shape == (72, 8, 8, 1) and images.dtype == np.uint8
    assert (workdir / "sample" / "ard" / "grid.png").is_file()
    # without the VAE the stage writes what the network made, which decodes to those images
    (workdir / "vae").rename(tmp_path / "vae")
    assert "ard has been sampled already." in smoke("sample", workdir, *overrides).err
    shutil.rmtree(workdir / "sample")
    try:
        outcome = smoke("sample", workdir, *overrides)
        with np.load(workdir / "sample" / "ard" / "samples.npz", allow_pickle=False) as file:
            latents = file["latents"]
            assert "arr_0" not in file
            np.testing.assert_array_equal(file["labels"], labels)
        assert outcome.status == 0 and f"there is no VAE in {workdir / 'vae'}, so latents are written" in outcome.err
        assert "there is no VAE in" in sentence(smoke("evaluate", workdir, *overrides), "evaluate")
    finally:
        (tmp_path / "vae").rename(workdir / "vae")
    assert latents.shape == (72, 4, 4, 2) and latents.dtype == np.float32
    expected = to_uint8(jax.jit(lambda z: to_images(model, params, z))(latents))
    assert np.abs(images.astype(int) - expected).max() <= 1 and images.std() > 5  # a rounding to grey levels
    assert "holds latents, drawn without a VAE: run 'sample' again" in sentence(
        smoke("evaluate", workdir, *overrides), "evaluate"
    )
    assert smoke("sample", workdir, *overrides).status == 0
    with np.load(workdir / "sample" / "ard" / "samples.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], images)


@pytest.mark.slow
def test_what_was_begun_without_a_vae_is_drawn_anew_and_another_one_s_is_refused(latent_run, tmp_path, monkeypatch):
    source, overrides, *_ = latent_run
    workdir, alone = copy(source, tmp_path / "run", "teacher"), "sample.models=('teacher',)"
    write = sample.write_npz

    def interrupted(path, **arrays):
        write(path, **arrays)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "write_npz", interrupted)
    assert smoke("sample", workdir, *overrides, alone).status == 130
    monkeypatch.setattr(sample, "write_npz", write)
    assert files(workdir / "sample" / "teacher") == ["config.json", "parts/000000000.npz"]
    shutil.copytree(source / "vae", workdir / "vae")
    assert smoke("sample", workdir, *overrides, alone).status == 0
    found, known = (read_npz(run / "sample" / "teacher" / "samples.npz")["arr_0"] for run in (workdir, source))
    np.testing.assert_array_equal(found, known)
    write_vae(tmp_path / "other", widths=(8, 16))
    said = sentence(smoke("sample", workdir, *overrides, alone, f"vae.dir={tmp_path / 'other'}"), "sample")
    assert "sample/teacher holds samples of other settings (vae of hash" in said


@pytest.mark.slow
def test_images_are_measured_and_shown(latent_run):
    workdir, _, model, params = latent_run
    results = read_json(workdir / "report" / "results.json")
    assert results["real_images"] == 1797 and results["ard"]["fd"] > 0
    # the error of each step is the network's own, the decibels those of the images
    decibels = 10 * np.log10(4 / np.asarray(results["ard"]["mse_per_step"]))
    assert np.abs(decibels - results["ard"]["psnr_per_step"]).min() > 0.1
    with np.load(workdir / "evaluate" / "pictures.npz", allow_pickle=False) as pictures:
        assert {name: pictures[name].shape for name in ("noise", "teacher", "ard")} == {
            "noise": (4, 8, 8, 1), "teacher": (4, 3, 8, 8, 1), "ard": (4, 3, 8, 8, 1)
        }  # fmt: skip
    assert done(workdir / "latents")["records"] == 1797
    student, weights, *_ = load_student(workdir / "distill" / "ard", make_mesh())
    noise = draw_noise(sampling_key(1), np.arange(16), (4, 4, 2))

    @jax.jit
    def drawn():
        return to_images(model, params, sample_student(student, weights, noise, np.arange(16) * 10 // 16)[:, -1])

    shown = Image.open(workdir / "distill" / "ard" / "progress" / "20.png")
    expected = np.asarray(image_grid(to_uint8(drawn()), columns=4).convert("RGB"))
    assert np.abs(np.asarray(shown).astype(int) - expected).max() <= 1
    assert read_json(workdir / "teacher" / "labels.json") == [str(digit) for digit in range(10)]


@pytest.mark.slow
def test_a_vae_of_other_latents_is_refused_and_one_that_was_asked_for_is_not_done_without(latent_run, tmp_path):
    workdir, overrides, *_ = latent_run
    said = sentence(smoke("sample", workdir, *overrides, "vae.dir=nowhere"), "sample")
    assert "there is no autoencoder in nowhere (no config.json)" in said
    said = sentence(smoke("sample", workdir, *overrides, "data.channels=3"), "sample")
    assert "has latents of 2 channels, but data.channels is 3: set vae.dir to the one that" in said


@pytest.mark.slow
def test_a_fine_tune_reads_latents_as_real_data(latent_run, tmp_path):
    """Other latents of the same images change the student through the discriminator alone: at weight 0 they do not."""
    workdir, overrides, *_ = latent_run
    write_vae(tmp_path / "vae")
    assert smoke("encode", tmp_path, *overrides, "seed=3").status == 0
    student = {}
    for weight in (0.0, 1.0):
        for place, folder in (("here", workdir), ("there", tmp_path)):
            name = f"tuned_{place}_{weight:.0f}"
            settings = f"finetune.name={name}", f"finetune.weight={weight}", "finetune.steps=3", "finetune.warmup=0"
            data = f"data.dir={folder / 'latents' / '1.0.0'}"
            outcome = smoke("finetune", workdir, *overrides, data, *settings)
            assert outcome.status == 0, outcome.err
            student[place, weight] = done(workdir / "distill" / name)["sha256"]["params"]
    assert student["here", 0.0] == student["there", 0.0] != done(workdir / "distill" / "ard")["sha256"]["params"]
    assert student["here", 1.0] != student["there", 1.0]
    assert student["here", 1.0] != student["here", 0.0]
    assert smoke("sample", workdir, *overrides, "sample.models=('tuned_here_1',)").status == 0
    with np.load(workdir / "sample" / "tuned_here_1" / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (72, 8, 8, 1)
