"""The export stage: each form opens where it is meant to, with the same images, and says what it is."""

import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from PIL import Image
from pipeline_fixtures import copy, done, files, run, sentence

from ard_jax import ARDPipeline
from ard_jax.build import make_student, make_teacher
from ard_jax.config import default_config, plain
from ard_jax.convert import standalone, vae_to_diffusers
from ard_jax.convert.card import Facts, choose_license
from ard_jax.convert.card import results as card_results
from ard_jax.convert.published import parameters
from ard_jax.convert.vae import vae_shapes
from ard_jax.files import file_sha256, read_json, tree_sha256, write_json
from ard_jax.methods import finetuned_config
from ard_jax.models import AutoencoderKL, init_from_teacher, network_shapes
from ard_jax.report.words import distance
from ard_jax.results import Measured, Results
from ard_jax.training.checkpoints import make_manager
from ard_jax.weights.tensors import open_tensors, read_tensors, write_tensors
from ard_jax.workdir import network_settings, recorded_config


def export(workdir, model="ard", form="pipeline", *arguments):
    return run("export", "--workdir", workdir, "--model", model, "--format", form, *arguments)


def exported(workdir, model="ard", form="pipeline", *arguments) -> pathlib.Path:
    """The folder of an export that must succeed."""
    outcome = export(workdir, model, form, *arguments)
    assert outcome.status == 0, outcome.err
    return pathlib.Path(re.fullmatch(r"done: ([^:\n]+): .*\n", outcome.out)[1])


def refused(workdir, model="ard", form="pipeline", *arguments) -> str:
    """The sentence that an export ends in, with nothing written."""
    before = files(workdir)
    said = sentence(export(workdir, model, form, *arguments), "export")
    assert [name for name in files(workdir) if not name.startswith("compile_cache")] == before
    return said


@pytest.fixture
def workdir(pipeline, tmp_path):
    """The teacher and the student of configs/smoke.py, with their samples and what was measured."""
    return copy(pipeline, tmp_path / "run", "teacher", "distill", "sample", "evaluate")


# --------------------------------------------------------------------------------- models of latents, with a VAE


def latent_config():
    """A teacher of 1000 classes that diffusers can run, and a student of it."""
    config = default_config()
    with config.unlocked():
        config.data.update(image_size=8, dir="/home/someone/images")
        config.model.update(hidden_size=16, depth=2, num_heads=2, frequency_shift=1.0, mlp_norm_eps=1e-5)
        config.diffusion.update(steps=5, guided_channels=0, spacing="leading")
        config.student.update(points=(2, 0), history_layers=1)
    return config


def random_like(shapes, seed, scale):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(scale * generator.standard_normal(leaf.shape)), shapes)


def write_finished(folder, config, params):
    """A model's finished folder, as after a conversion: with the averaged weights alone."""
    with make_manager(folder / "checkpoints", keep=1) as manager:
        manager.save(1, args=ocp.args.Composite(ema=ocp.args.StandardSave(params)))
    write_json(folder / "config.json", plain(config))
    write_json(folder / "done.json", {"sha256": {"ema": tree_sha256(params)}})


def write_latents(workdir, config):
    """A workdir with a converted teacher, a student of it and a VAE."""
    shapes = network_shapes(make_teacher(config))
    write_finished(workdir / "teacher", config, random_like(shapes, 0, 0.2))
    student = jax.eval_shape(lambda params: init_from_teacher(params, make_student(config)), shapes)
    write_finished(workdir / "distill" / "ard", config, random_like(student, 1, 0.2))
    source = {"source": "/home/someone/DiT-XL-2-256x256.pt", "sha256": "0" * 64, "license": "CC-BY-NC-4.0"}
    write_json(workdir / "teacher" / "source.json", source)
    write_json(workdir / "teacher" / "labels.json", [f"class {number}, number {number}" for number in range(1000)])
    vae = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1)
    state_dict, described = vae_to_diffusers(vae, random_like(vae_shapes(vae), 2, 0.3))
    write_tensors(workdir / "vae" / "diffusion_pytorch_model.safetensors", state_dict)
    write_json(workdir / "vae" / "config.json", described)
    return workdir


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Not to be written to but under export/."""
    return write_latents(tmp_path_factory.mktemp("latents"), latent_config())


# ------------------------------------------------------------------------------------------------------ stablehlo

# Runs in a process without ard_jax: for each folder, the images of a seed in several batches, and those of its README.
ALONE = """
import json, os, pathlib, re, sys
import numpy
for folder, sizes in json.loads(sys.argv[1]).items():
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.modules.pop("run", None)
    code = re.findall("```python\\n(.*?)```", pathlib.Path("README.md").read_text(), re.DOTALL)
    exec(code[0])
    made = {str(size): generate(run.draw_noise(folder, 7, size), [3, 1, 4, 1, 5][:size]) for size in sizes}
    numpy.savez(sys.argv[2] + pathlib.Path(folder).name, readme=images, **made)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def alone(sizes, out):
    """Images by batch size, and "readme", of exported folders {folder: batch sizes} in a process without ard_jax."""
    given = json.dumps({str(folder): wanted for folder, wanted in sizes.items()})
    ended = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, given, f"{out}/"], cwd=out, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    modules = ended.stdout.split()
    assert "jax" in modules and "numpy" in modules
    assert not {"ard_jax", "flax", "optax", "ml_collections", "tensorflow", "PIL"} & set(modules)
    made = {}
    for folder in sizes:
        with np.load(out / f"{folder.name}.npz") as arrays:
            made[folder.name] = folder, dict(arrays)
    return made


@pytest.fixture(scope="module")
def made(pipeline, latents, tmp_path_factory):
    """Three exports, and what one process alone made with them: name → (folder, images by batch size)."""
    out = tmp_path_factory.mktemp("stablehlo")
    batches = "--batch-sizes", "4,2", "--dtype", "bfloat16", "--platforms", "cpu"
    exports = {
        "student": (latents, "ard", [2, 5], ()),
        "teacher": (pipeline, "teacher", [2, 5], ("--platforms", "cpu,tpu")),
        "batches": (pipeline, "ard", [2, 3], batches),
    }
    return alone(
        {
            exported(workdir, model, "stablehlo", "--output", out / name, *arguments): sizes
            for name, (workdir, model, sizes, arguments) in exports.items()
        },
        out,
    )


def check_images(folder, made, sizes=(2, 5), dtype="float32"):
    """They are, bit for bit, those of the pipeline of a workdir's folder."""
    pipe = ARDPipeline.from_pretrained(folder, dtype)
    for size in sizes:
        expected = pipe([3, 1, 4, 1, 5][:size], seed=7, output_type="np").images
        assert expected.std() > 0.05
        np.testing.assert_array_equal(made[str(size)], expected)
    np.testing.assert_array_equal(made["readme"], pipe([0, 1], seed=0, output_type="np").images)


def test_stablehlo_of_a_student_of_latents(made, latents):
    folder, images = made["student"]
    check_images(latents / "distill" / "ard", images)
    signature = read_json(folder / "signature.json")
    assert signature["platforms"] == ["cpu", "cuda", "tpu"] and signature["modules"] == {"any": "model.stablehlo"}
    assert signature["inputs"]["noise"]["shape"] == ["batch", 8, 8, 4]
    assert signature["output"] == {"shape": ["batch", 16, 16, 3], "dtype": "float32", "range": [0, 1]}
    assert signature["labels"]["207"] == "class 207, number 207"
    # the weights are in no module, and the half of the VAE that encodes is nowhere
    names = [array["name"] for array in signature["weights"]]
    weights = sum(np.prod(array["shape"]) * 4 for array in signature["weights"])
    assert "vae/decoder/conv_in/kernel" in names and not [name for name in names if "encoder" in name]
    assert (folder / "weights.npz").stat().st_size > weights > (folder / "model.stablehlo").stat().st_size
    for name, sha256 in signature["sha256"].items():
        assert file_sha256(folder / name) == sha256


def test_stablehlo_of_a_teacher(made, pipeline):
    folder, images = made["teacher"]
    check_images(pipeline / "teacher", images)
    assert read_json(folder / "signature.json")["platforms"] == ["cpu", "tpu"]


def test_stablehlo_in_batches_and_in_bfloat16(made, pipeline):
    folder, images = made["batches"]
    check_images(pipeline / "distill" / "ard", images, [2], "bfloat16")
    assert images["3"].shape == (3, 8, 8, 1)  # filled up to 4, and cut
    np.testing.assert_allclose(images["3"][:2], images["2"], rtol=0, atol=0.02)
    signature = read_json(folder / "signature.json")
    assert list(signature["modules"]) == ["2", "4"]
    assert {array["dtype"] for array in signature["weights"]} == {"bfloat16"}
    numbers = sum(np.prod(array["shape"]) for array in signature["weights"])
    assert 2 * numbers < (folder / "weights.npz").stat().st_size < 3 * numbers


@pytest.mark.slow
def test_stablehlo_with_every_optimisation(latents, tmp_path, monkeypatch):
    """As users run it: both sides compiled with XLA's defaults, in processes of their own."""
    folder = exported(latents, "ard", "stablehlo", "--output", tmp_path / "out")
    monkeypatch.delenv("XLA_FLAGS")
    _, made = alone({folder: [2]}, tmp_path)["out"]
    code = (
        "import sys, numpy; from ard_jax import ARDPipeline; pipe = ARDPipeline.from_pretrained(sys.argv[1]);"
        "numpy.save(sys.argv[2], pipe([3, 1], seed=7, output_type='np').images)"
    )
    command = [sys.executable, "-c", code, latents / "distill" / "ard", tmp_path / "expected.npy"]
    subprocess.run(command, cwd=pathlib.Path(__file__).parent.parent, check=True)
    np.testing.assert_array_equal(made["2"], np.load(tmp_path / "expected.npy"))


def test_run_py_writes_pictures_and_refuses_in_words(workdir, tmp_path, monkeypatch, capsys):
    write_json(workdir / "teacher" / "labels.json", ["zero", "Great One", *map(str, range(2, 10))])
    folder = exported(workdir, "ard", "stablehlo", "--batch-sizes", "2")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path / "made.png"), *arguments])
        runpy.run_path(str(folder / "run.py"), run_name="__main__")
        return capsys.readouterr().out

    assert call("--labels", "great one", "3", "--seed", "7") == f"2 images: {tmp_path / 'made.png'}\n"
    expected = ARDPipeline.from_pretrained(workdir / "distill" / "ard")(["Great One", 3], seed=7).images
    with Image.open(tmp_path / "made.png") as picture:
        np.testing.assert_array_equal(picture, np.concatenate(expected, axis=1))
    for labels, said in {
        ("10",): "labels are [10]: give class numbers from 0 to 9.",
        ("1", "two"): "no class is named 'two': signature.json lists the names, if there are any.",
        ("1", "2", "3"): "3 images are too many at once: this folder has batches of 2.",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            call("--labels", *labels)
        assert capsys.readouterr().err.endswith(f"error: {said}\n")
    generate = standalone.load(folder)
    with pytest.raises(ValueError, match=r"noise is \(2, 8, 8, 4\), but 2 labels need \(2, 8, 8, 1\)"):
        generate(np.zeros((2, 8, 8, 4)), [1, 2])
    with pytest.raises(ValueError, match=r"labels are \[0.5\]: give class numbers"):
        generate(np.zeros((1, 8, 8, 1)), [0.5])


# ------------------------------------------------------------------------------------- pipelines and safetensors


@pytest.mark.parametrize("model", ["teacher", "ard"])
def test_a_pipeline_makes_the_same_images(latents, model):
    folder = exported(latents, model, "pipeline")
    pipe = ARDPipeline.from_pretrained(folder)
    original = ARDPipeline.from_pretrained(latents / ("teacher" if model == "teacher" else "distill/ard"))
    settings = {"class_labels": [207, 3], "seed": 1, "output_type": "np"}
    np.testing.assert_array_equal(pipe(**settings).images, original(**settings).images)
    assert pipe.id2label[207] == "class 207, number 207"
    assert pipe.card == (folder / "README.md").read_text()


def test_weights_of_the_last_step_and_in_bfloat16(workdir):
    plain_, last = (
        read_tensors(exported(workdir, "ard", "safetensors", *arguments)) for arguments in ((), ("--weights", "params"))
    )
    halved = read_tensors(exported(workdir, "ard", "safetensors", "--dtype", "bfloat16"))
    name = "blocks.1.mlp.fc1.weight"
    assert not np.array_equal(plain_[name], last[name])
    assert halved[name].dtype.name == "bfloat16"
    np.testing.assert_array_equal(halved[name], plain_[name].astype("bfloat16"))
    pipe = ARDPipeline.from_pretrained(exported(workdir, "ard", "pipeline", "--weights", "params"))
    assert done(workdir / "distill" / "ard")["sha256"]["params"] == tree_sha256(pipe.params)


@pytest.mark.parametrize("model", ["teacher", "ard"])
def test_safetensors_have_published_names_and_tell_the_rest(workdir, tmp_path, model):
    folder = exported(workdir, model, "safetensors", "--license", "Apache-2.0")
    original = workdir / ("teacher" if model == "teacher" else "distill/ard")
    pipe = ARDPipeline.from_pretrained(original)
    tensors = open_tensors(folder / f"{model}.safetensors")
    assert tree_sha256(parameters(tensors, pipe.model)) == done(original)["sha256"]["ema"]
    assert tensors.metadata["format"] == "pt" and tensors.metadata["num_heads"] == "2"
    config = json.loads(tensors.metadata["config"])
    assert config == plain(pipe.config) and ("student" in config) == (model == "ard")

    back = tmp_path / "back"  # as the printed line says, and without a flag
    outcome = run("convert", "--source", folder, "--workdir", back)
    assert outcome.status == 0, outcome.err
    converted = back / original.relative_to(workdir)
    assert done(converted)["sha256"]["ema"] == done(original)["sha256"]["ema"]
    assert network_settings(recorded_config(converted)) == network_settings(recorded_config(original))
    assert ARDPipeline.from_pretrained(converted).id2label == pipe.id2label == {n: str(n) for n in range(10)}
    front, _ = read_card(exported(back, model, "pipeline"))
    assert front["license"] == "apache-2.0"


# ------------------------------------------------------------------------------------------------------ diffusers


@pytest.mark.oracle
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_diffusers_samples_as_we_do(tmp_path, spacing, monkeypatch):
    import diffusers
    import torch

    config = latent_config()
    config.diffusion.spacing = spacing
    workdir = write_latents(tmp_path, config)
    outcome = export(workdir, "teacher", "diffusers")
    assert outcome.status == 0 and "diffusers" not in outcome.err, outcome.err  # nothing differs, so nothing is said
    folder = workdir / "export" / "teacher" / "diffusers"
    assert outcome.out == f'done: {folder}: open it with DiTPipeline.from_pretrained("{folder}").\n'
    for part, kind in {"transformer": diffusers.DiTTransformer2DModel, "vae": diffusers.AutoencoderKL}.items():
        _, found = kind.from_pretrained(folder, subfolder=part, output_loading_info=True)
        assert not any(found.values()), found

    pipe = diffusers.DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.get_label_ids(["class 207", "number 3"]) == [207, 3]
    noise = np.random.default_rng(5).standard_normal((2, 8, 8, 4), np.float32)
    given = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())
    monkeypatch.setattr(diffusers.pipelines.dit.pipeline_dit, "randn_tensor", lambda *_, **__: given)
    theirs = pipe([207, 3], guidance_scale=1.5, num_inference_steps=5, output_type="np").images
    for place in (workdir / "teacher", folder):
        ours = ARDPipeline.from_pretrained(place)
        images = ours([207, 3], latents=noise, num_inference_steps=5, guidance_scale=1.5, output_type="np").images
        assert images.std() > 0.1
        np.testing.assert_allclose(theirs, images, rtol=0, atol=1e-5)

    monkeypatch.chdir(folder)
    scope = {}
    exec(python_of(folder), scope)
    assert scope["pipe"].scheduler.num_inference_steps == 5
    assert [image.size for image in scope["images"]] == [(16, 16)] * 2


def test_what_is_different_in_diffusers_is_said(tmp_path):
    config = latent_config()
    config.data.num_classes = 7
    config.diffusion.update(spacing="linspace", solver="heun")
    workdir = write_latents(tmp_path, config)
    outcome = export(workdir, "teacher", "diffusers")
    assert outcome.status == 0, outcome.err
    card = (workdir / "export" / "teacher" / "diffusers" / "README.md").read_text()
    for said in (
        "diffusers' DDIM cannot walk the teacher's timesteps (spacing linspace), and takes others there (leading)",
        "The teacher's solver is heun; diffusers' folder has DDIM.",
        "this teacher has 7 classes: guidance does not work there, so use guidance_scale=1.",
    ):
        assert said in outcome.err and said in card
    assert "guidance_scale=1.0, num_inference_steps=5" in card
    scheduler = read_json(workdir / "export" / "teacher" / "diffusers" / "scheduler" / "scheduler_config.json")
    assert scheduler["timestep_spacing"] == "leading" and scheduler["clip_sample"] is False


def test_models_that_diffusers_cannot_run(latents, workdir, tmp_path):
    assert "diffusers has no ARD students: choose --format pipeline" in refused(latents, "ard", "diffusers")
    assert "but this teacher makes pixels" in refused(workdir, "teacher", "diffusers")
    config = latent_config()
    config.diffusion.process = "flow"
    flow = write_latents(tmp_path / "flow", config)
    assert "but this teacher predicts velocities" in refused(flow, "teacher", "diffusers")
    bare = copy(latents, tmp_path / "bare", "teacher", "distill")
    for model, form in (("teacher", "diffusers"), ("teacher", "stablehlo"), ("ard", "stablehlo")):
        assert f"there is no VAE in {bare / 'vae'}" in refused(bare, model, form)


# ------------------------------------------------------------------------------------------------------- the card


def read_card(folder) -> tuple[dict, str]:
    """Front matter and the rest."""
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def python_of(folder) -> str:
    """The lines that a card says work in its folder."""
    return re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]


def test_the_card_of_a_student_trained_here(workdir, monkeypatch):
    folder = exported(workdir, "ard", "pipeline")
    front, body = read_card(folder)
    assert front["license"] == "other" and front["license_name"] == "unknown"
    assert front["library_name"] == "ard_jax" and front["pipeline_tag"] == "unconditional-image-generation"
    assert {"dit", "autoregressive-distillation", "arxiv:2504.11295"} < set(front["tags"])
    assert "makes images of 10 classes, 8×8×1, in 3 steps of one network call each. It was distilled from" in body
    results = read_json(workdir / "evaluate" / "results.json")
    for name in ("teacher", "ard"):
        facts = results["models"][name]
        psnr = f"{facts['psnr']:.2f}" if name == "ard" else ""
        calls = {"teacher": 10, "ard": 3}[name]
        fd = distance(facts["fd"])
        row = f"| {name} | {fd} | {facts['precision']:.3f} | {facts['recall']:.3f} | {psnr} | {calls} |"
        assert row in body
    assert results["features"] in body
    assert "20 steps of batch 8, adamw, learning rate 0.0015 (cosine)" in body
    assert "Unknown: nobody said under which licence" in body and "2504.11295" in body
    assert "The teacher was trained with ard_jax." in body
    assert done(workdir / "distill" / "ard")["sha256"]["ema"] in body

    monkeypatch.chdir(folder)  # the card's lines work there
    scope = {}
    exec(python_of(folder), scope)
    assert len(scope["images"]) == 8 and scope["images"][0].size == (8, 8)


def test_results_of_other_weights_are_left_out(workdir):
    _, body = read_card(exported(workdir, "ard", "pipeline", "--weights", "params"))
    assert "These weights have not been measured" in body and "not averaged" in body
    measured_as(workdir, "ard", ema_sha256="0")  # though the samples are of the weights as they are now
    outcome = export(workdir, "ard", "pipeline")
    assert "The results of ard in" in outcome.err
    assert "results.json are of older weights, and are left out of the card" in outcome.err
    _, body = read_card(workdir / "export" / "ard" / "pipeline")
    assert "These weights have not been measured" in body


def measured_as(workdir, name, **changed):
    """Changes what results.json says of a model."""
    path = workdir / "evaluate" / "results.json"
    found = read_json(path)
    found["models"][name] |= changed
    write_json(path, found)


def test_results_of_an_older_teacher_are_left_out(workdir):
    """Its student's stay; where the teacher is gone, nothing says that its own are older."""
    measured_as(workdir, "teacher", ema_sha256="0")
    outcome = export(workdir, "ard", "pipeline")
    assert "The results of teacher in" in outcome.err
    _, body = read_card(workdir / "export" / "ard" / "pipeline")
    assert "| ard | " in body and "| teacher | " not in body
    shutil.rmtree(workdir / "teacher")
    _, body = read_card(exported(workdir, "ard", "pipeline"))
    assert "| ard | " in body and "| teacher | " in body


def test_results_need_no_samples(workdir):
    """As with evaluate.draw, which keeps none."""
    shutil.rmtree(workdir / "sample")
    _, body = read_card(exported(workdir, "ard", "pipeline"))
    assert "| ard | " in body and "| teacher | " in body


@pytest.mark.parametrize("fd", [(0.137, 0.141), (0.9, 1.234), (23.456, 1234.5)])
def test_distances_are_written_as_in_reports(fd):
    models = {name: Measured(fd=value) for name, value in zip(("teacher", "ard"), fd, strict=True)}
    table = results_section(Results(models=models, samples=8, real_images=9)).splitlines()
    assert [line.split(" | ")[1] for line in table[2:4]] == [distance(value) for value in fd]
    assert "of 8 samples to 9 real images; like" in table[-1]


def test_a_reference_may_not_tell_how_many_images_it_is_of():
    assert "of 8 samples to a reference; like" in results_section(Results(models={"ard": Measured()}, samples=8))


def results_section(results):
    """What the card of a student says of results."""
    nothing = dict.fromkeys(("form", "config", "part", "sha256", "parameters", "images", "source", "license"))
    return card_results(Facts("ard", is_student=True, converted=False, results=results, **nothing))


@pytest.mark.parametrize("start", ["", "ard"])
def test_the_card_of_a_fine_tuned_student_states_the_fine_tune(workdir, start):
    """Under the name that was asked for, or that its hash has in the workdir."""
    folder = workdir / "distill" / "ard_adversarial"
    shutil.copytree(workdir / "distill" / "ard", folder)
    before = recorded_config(folder)
    config = finetuned_config(before, before)
    config.finetune.update(start=start, steps=1000, batch_size=4, layers=(0, 1), weight=5.0, warmup=300)
    config.finetune.optimizer.update(learning_rate=0.25, ema=0.5)
    config.finetune.discriminator_optimizer.update(name="rmsprop", learning_rate=0.125)
    sha256 = done(workdir / "distill" / "ard")["sha256"]["ema"]
    write_json(folder / "config.json", plain(config) | {"inputs": {"start": sha256}})
    _, body = read_card(exported(workdir, "ard_adversarial", "pipeline"))
    assert "and then fine-tuned against a discriminator on that teacher's features." in body
    assert f"| fine-tuned from | `ard`, SHA-256 of the arrays `{sha256}` |" in body
    words = "1,000 steps of batch 4, adamw, learning rate 0.25 (constant), running average 0.5, seed 0"
    assert f"| fine-tune | {words} |" in body and "| training |" not in body
    heads = "heads on blocks 0, 1 of the teacher, weight 5 after 300 steps, rmsprop, learning rate 0.125 (constant)"
    assert f"| discriminator | {heads} |" in body


def test_the_licence_of_the_teachers_weights_is_passed_on(latents, workdir):
    for model in ("teacher", "ard"):
        front, body = read_card(exported(latents, model, "safetensors"))
        assert front["license"] == "cc-by-nc-4.0" and "license_name" not in front
        assert f"come from `DiT-XL-2-256x256.pt`, SHA-256 `{'0' * 64}`" in body and "someone" not in body
        assert "| training |" not in body or model == "ard"
    assert "images of 1000 classes, 16×16×3" in body
    for name in files(latents / "export"):  # nor is any other path of this machine
        assert b"someone" not in (latents / "export" / name).read_bytes()
    said = refused(latents, "ard", "pipeline", "--license", "mit")
    assert "'mit', but these weights come from DiT-XL-2-256x256.pt under 'CC-BY-NC-4.0', which is passed on" in said
    assert read_card(exported(latents, "ard", "pipeline", "--license", "CC-BY-NC-4.0"))[0]["license"] == "cc-by-nc-4.0"
    assert read_card(exported(workdir, "ard", "pipeline", "--license", "Apache-2.0"))[0]["license"] == "apache-2.0"
    shutil.rmtree(workdir / "teacher")
    _, body = read_card(exported(workdir, "ard", "pipeline"))
    assert "Where its teacher comes from is not known" in body and "trained with ard_jax" not in body
    for unknown in ("other", "unknown", None):
        assert choose_license({"license": unknown}, "") == ""
    assert "is no licence's identifier" in refused(workdir, "ard", "pipeline", "--license", "my own: see below")


# ----------------------------------------------------------------------------------------------- folders and flags


def test_a_folder_is_replaced_and_names_its_files(workdir, tmp_path):
    folder = exported(workdir, "ard", "pipeline", "--output", tmp_path / "out")
    assert folder == tmp_path / "out"
    first = done(folder)
    assert sorted(first["sha256"]) == [name for name in files(folder) if name != "done.json"]
    assert all(file_sha256(folder / name) == sha256 for name, sha256 in first["sha256"].items())
    (folder / "student" / "config.json").write_text("altered")
    exported(workdir, "ard", "pipeline", "--output", tmp_path / "out")
    assert done(folder)["sha256"] == first["sha256"]
    exported(workdir, "ard", "safetensors", "--output", tmp_path / "out")
    assert files(folder) == ["README.md", "ard.safetensors", "done.json"]
    assert files(tmp_path) == [name for name in files(tmp_path) if ".partial" not in name]


def test_what_no_export_wrote_is_never_deleted(workdir, tmp_path):
    output = tmp_path / "out"
    output.write_text("mine")
    assert "is a file, but an export is a folder" in refused(workdir, "ard", "pipeline", "--output", output)
    output.unlink()
    (output / "notes").mkdir(parents=True)
    (output / "notes" / "mine.txt").write_text("mine")
    assert "holds what no export wrote (notes/mine.txt)" in refused(workdir, "ard", "pipeline", "--output", output)
    (output / "notes" / "mine.txt").unlink()
    exported(workdir, "ard", "pipeline", "--output", output)
    (output / "mine.txt").write_text("mine")
    said = refused(workdir, "ard", "pipeline", "--output", output)
    assert f"{output} holds what no export wrote (mine.txt): choose another --output, or take it out." in said
    assert "holds what no export wrote" in refused(workdir, "ard", "pipeline", "--output", workdir / "teacher")


def test_nothing_half_written_is_left(workdir, monkeypatch):
    folder = exported(workdir, "ard", "stablehlo", "--platforms", "cpu")
    before = done(folder)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("ard_jax.convert.stablehlo.write_weights", full)
    outcome = export(workdir, "ard", "stablehlo", "--platforms", "tpu")
    assert outcome.status == 2 and "is full" in outcome.err
    assert done(folder) == before and files(folder.parent) == [f"stablehlo/{name}" for name in files(folder)]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("arrd", "pipeline"), "has no model 'arrd': it has teacher, ard."),
        (("ard", "onnx"), "argument --format: invalid choice: 'onnx'"),
        (("ard", "stablehlo", "--platforms", "cpu,metal"), "--platforms has 'metal': choose some of cpu, cuda, tpu."),
        (("ard", "stablehlo", "--batch-sizes", "0"), "--batch-sizes is '0': give symbolic, or whole numbers of at le"),
        (("ard", "stablehlo", "--batch-sizes", "4,-1"), "--batch-sizes is '4,-1': give symbolic"),
        (("ard", "stablehlo", "--batch-sizes", "2.5"), "--batch-sizes is '2.5': give symbolic"),
        (("ard", "pipeline", "--batch-sizes", "2"), "--batch-sizes is for --format stablehlo: leave it out."),
        (("ard", "pipeline", "--platforms", "cpu"), "--platforms is for --format stablehlo: leave it out."),
        (("ard", "pipeline", "--dtype", "float16"), "argument --dtype: invalid choice: 'float16'"),
        (("ard", "pipeline", "--weights", "best"), "argument --weights: invalid choice: 'best'"),
        (("ard", "pipeline", "--licence", "mit"), "there is no flag --licence: did you mean --license."),
    ],
)
def test_words_that_cannot_be_used(pipeline, arguments, said):
    assert said in refused(pipeline, *arguments)


def test_models_that_are_not_there_or_not_finished(workdir, latents, tmp_path):
    assert "has no model 'ard': it has none, so train or convert one there first." in refused(tmp_path / "nowhere")
    (workdir / "distill" / "ard" / "done.json").unlink()
    assert "not finished: run the stage 'distill' to its end, or name a --checkpoint." in refused(workdir)
    said = refused(latents, "ard", "pipeline", "--weights", "params")
    assert "was converted and has just one set of weights, the ones called ema" in said
