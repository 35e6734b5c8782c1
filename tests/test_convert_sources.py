"""What a file or folder is recognised as, what it leaves open, and what is refused."""

import argparse
import builtins
import json
import logging
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
from convert_fixtures import (
    WEIGHTS,
    assert_equal_trees,
    assert_same,
    sparse,
    state_dict,
    teacher,
    write_dit_pipeline,
    write_json,
    write_vae,
)
from pixart_fixtures import random_like, small_pixart, write_pixart
from safetensors.numpy import save_file

from ard_jax.build import make_process, make_student, make_teacher
from ard_jax.checks import validate
from ard_jax.convert import from_torch, pixart_to_published, sources, to_torch
from ard_jax.convert.families.base import Hints, Source
from ard_jax.convert.families.folders import folder_license
from ard_jax.convert.published import parameters
from ard_jax.convert.sources import open_source
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, DiT, PixArt, network_shapes, size_fields
from ard_jax.weights.tensors import read_tensors, write_tensors

HEADS = {"num_heads": 2}


def write(path: pathlib.Path, tensors, metadata=None) -> pathlib.Path:
    write_tensors(path, tensors, metadata)
    return path


def opened(path, **hints):
    """A source whose config makes its own model and is a valid one."""
    source = open_source(path, Hints(**hints))
    if source.model is not None:
        validate(source.config)
        make = make_student if isinstance(source.model, ARDStudent) else make_teacher
        assert make(source.config).with_backbone(dtype=None) == source.model.with_backbone(dtype=None)
    return source


def refused(path, **hints):
    with pytest.raises(UserError) as error:
        open_source(path, Hints(**hints))
    said = str(error.value)
    assert "\n" not in said and said.endswith("."), said
    return said


# ------------------------------------------------------------------------------------------------ published files


def test_a_published_state_dict(tmp_path):
    given = teacher()
    source = opened(write(tmp_path / "DiT-tiny.safetensors", given), **HEADS)
    assert source.what == "DiT teacher, a state dict with the published names"
    assert type(source.model) is DiT and source.model.backbone.num_heads == 2 and source.model.backbone.image_size == 4
    assert_same(source.tensors, given)
    config = source.config
    data, diffusion = config.data, config.diffusion
    assert (data.space, data.image_size, data.channels, data.num_classes) == ("latent", 4, 4, 5)
    assert (diffusion.process, diffusion.guided_channels, diffusion.spacing) == ("vp", 3, "linspace")
    assert config.student.history_layers == 2 and config.sample.models == ("teacher",)
    assert (source.license, source.vae, source.labels) == (None, None, ())
    assert (
        opened(write(tmp_path / "DiT-pixels.safetensors", teacher(channels=3, out=6)), **HEADS).config.data.space
        == "pixel"
    )


def test_sit_counts_time_from_the_noise(tmp_path):
    path = write(tmp_path / "SiT-XL-2-256x256.safetensors", teacher())
    for source in (
        opened(path, **HEADS),
        opened(write(tmp_path / "x.safetensors", teacher()), objective="velocity", **HEADS),
    ):
        process = make_process(source.config)
        assert (source.config.diffusion.process, process.reversed, process.time_scale) == ("flow", True, 1.0)
        assert (process.noise_time, process.data_time) == (0.0, 1.0)
        assert source.what.startswith("SiT teacher")


def test_what_nothing_tells_is_asked_for(tmp_path):
    path = write(tmp_path / "x.safetensors", teacher())
    assert "width 8 and depth 2, which is no published size: give --num-heads" in refused(path)
    assert "predicts noise, as DiT does, or velocity, as SiT does: give --objective noise or" in refused(path, **HEADS)
    assert opened(path, objective="noise", **HEADS).config.diffusion.process == "vp"
    path = write(tmp_path / "y.safetensors", state_dict(heads=3))
    assert "this student of 3 steps stops: give --points, 3 falling" in refused(path, history_layers=1, **HEADS)
    assert opened(path, history_layers=1, points=(12, 7, 0), **HEADS).config.student.points == (12, 7, 0)


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-B/4", "DiT-L/8", "DiT-XL/2"])
def test_heads_of_published_sizes(tmp_path, name):
    """Told by width and depth; the arrays are a hole in the file."""
    model = DiT(**size_fields(name), image_size=32)
    assert open_source(sparse(tmp_path / "DiT.safetensors", model)).model == model


def test_a_student(tmp_path):
    given = state_dict(heads=4, depth=7)
    path = write(tmp_path / "x.safetensors", given)
    source = opened(path, name="mine", **HEADS)
    assert source.what.startswith("ARD student") and type(source.model) is ARDStudent
    student = source.config.student
    assert (student.name, student.points, student.history_layers, student.mask, student.heads) == (
        "mine", (15, 10, 5, 0), 6, "causal", "separate",
    )  # fmt: skip
    assert source.config.sample.models == ("mine",) and source.config.diffusion.process == "vp"
    source = opened(path, mask="window", history_layers=2, **HEADS)
    assert (source.model.mask, source.model.history_layers, source.config.student.name) == ("window", 2, "ard")
    two = opened(write(tmp_path / "two.safetensors", state_dict(heads=2)), history_layers=0, **HEADS)
    assert two.config.student.points == (10, 0) and set(two.config.trajectories.points) == {15, 10, 5, 0}
    assert "history_layers is 6, but the model has 2 layers" in refused(tmp_path / "two.safetensors", **HEADS)


def test_points_make_a_student_of_one_final_layer(tmp_path):
    path = write(tmp_path / "x.safetensors", state_dict(heads=1))
    one = opened(path, points=(0,), history_layers=0, **HEADS)
    assert (one.model.steps, one.model.heads) == (1, "separate")
    two = opened(path, points=(10, 0), history_layers=0, **HEADS)
    assert (two.model.steps, two.model.heads) == (2, "shared")
    assert parameters(two.tensors, two.model)["final_layer"]["linear"]["kernel"].ndim == 2


@pytest.mark.parametrize(
    "hints, sentence",
    [
        ({"points": (10, 5, 0), "history_layers": 0}, "has 2 final layers, so its student makes 2 steps, not 3"),
        ({"weights": "ema"}, "--weights has no meaning here, since .* is no training checkpoint with ema and model"),
    ],
)
def test_flags_that_do_not_fit_a_student(tmp_path, hints, sentence):
    path = write(tmp_path / "x.safetensors", state_dict(heads=2))
    assert re.search(sentence, refused(path, **HEADS, **hints))


def test_flags_of_students_for_a_teacher(tmp_path):
    path = write(tmp_path / "DiT.safetensors", teacher())
    for hints in ({"mask": "window"}, {"history_layers": 1}):
        assert "has no meaning here, since" in refused(path, **HEADS, **hints)
        assert "has no meaning here, since" in refused(write_dit_pipeline(tmp_path / "pipeline"), **hints)


def test_wrong_architectures(tmp_path):
    given = teacher()
    del given["blocks.1.attn.proj.bias"]
    path = write(tmp_path / "DiT.safetensors", given | {"blocks.1.attn.q_norm.weight": np.ones(4, np.float32)})
    assert "missing: blocks.1.attn.proj.bias; unexpected: blocks.1.attn.q_norm.weight" in refused(path, **HEADS)
    path = write(tmp_path / "unet.safetensors", {"conv_in.weight": np.ones(3, np.float32)})
    assert "has no 'x_embedder.proj.weight', so it is not a DiT's" in refused(path)


def test_half_precision_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ard_jax")
    given = teacher(dtype=np.float16)
    given["pos_embed"] = given["pos_embed"].astype(np.float16)
    source = opened(write(tmp_path / "DiT.safetensors", given), **HEADS)
    params = parameters(source.tensors, source.model)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'DiT.safetensors'} holds float16 weights, which become float32 here."
    ]
    expected = from_torch({name: array.astype(np.float32) for name, array in given.items()}, num_heads=2)[1]
    assert_equal_trees(params, expected)


def test_prefixes_of_wrappers(tmp_path):
    given = teacher()
    wrapped = {f"_orig_mod.module.{name}": array for name, array in given.items()}
    assert_same(opened(write(tmp_path / "DiT.safetensors", wrapped), **HEADS).tensors, given)


def test_licences_of_the_published_files(tmp_path):
    expected = {
        "DiT-XL-2-256x256": "CC-BY-NC-4.0",
        "DiT-XL-2-512x512": "CC-BY-NC-4.0",
        "SiT-XL-2-256": "MIT",
        "DiT-my": None,
    }
    for name, license in expected.items():
        path = write(tmp_path / f"{name}.safetensors", teacher())
        assert opened(path, **HEADS).license == license
        assert opened(path, license="apache-2.0", **HEADS).license == "apache-2.0"


# -------------------------------------------------------------------------------------------- training checkpoints


def write_pt(path, content):
    import torch

    def tensors(value):
        return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else tensors(v) if isinstance(v, dict) else v
                for k, v in value.items()}  # fmt: skip

    torch.save(tensors(content), path)
    return path


def under(prefix, tensors):
    return {prefix + name: array for name, array in tensors.items()}


CONTAINERS = {  # what people publish, by a plain network and an averaged one; and what is said of it
    "model_ema": (lambda one, ema: {"model": one, "model_ema": ema}, "the model_ema of a training checkpoint"),
    "ema_model": (lambda one, ema: {"model": one, "ema_model": ema}, "the ema_model of"),
    "state_dict_ema": (lambda one, ema: {"state_dict": one, "state_dict_ema": ema}, "the state_dict_ema of"),
    "state_dict": (lambda one, ema: {"state_dict": ema}, "the state_dict of"),
    "Lightning": (lambda one, ema: {"state_dict": under("model.", ema), "epoch": 1}, "the state_dict of"),
    "Lightning with an average": (
        lambda one, ema: {"state_dict": under("model.", one) | under("model_ema.", ema), "epoch": 1},
        "the model_ema of",
    ),
    "AveragedModel": (
        lambda one, ema: {"n_averaged": np.array(5), **under("module.", ema)},
        "the average of a training checkpoint with the published names (left out: n_averaged)",
    ),
    "ema-pytorch": (
        lambda one, ema: {"initted": np.array(True), **under("online_model.", one), **under("ema_model.", ema)},
        "the ema_model of",
    ),
    "REPA": (
        lambda one, ema: {"model": one, "ema": ema | {"projectors.0.weight": np.zeros((3, 8), np.float32)}},
        "the ema of a training checkpoint with the published names (left out: projectors)",
    ),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONTAINERS)
def test_averaged_weights_are_found_in_what_people_publish(tmp_path, name):
    make, said = CONTAINERS[name]
    ema, one = teacher(), {key: array + 1 for key, array in teacher().items()}
    source = opened(write_pt(tmp_path / "DiT.pt", make(one, ema)), **HEADS)
    assert said in source.what
    assert_same(source.tensors, ema)


@pytest.mark.oracle
def test_an_average_of_another_name_is_asked_for(tmp_path):
    path = write_pt(tmp_path / "DiT.pt", {"model": teacher(), "my_ema_weights": teacher()})
    assert "'my_ema_weights', which may be an average of its weights" in refused(path, **HEADS)
    assert "the model of" in opened(path, weights="model", **HEADS).what


def test_shards_with_an_index_and_no_config(tmp_path):
    tensors, folder = teacher(), tmp_path / "DiT-XL"
    folder.mkdir()
    names = list(tensors)
    halves = {"a": names[: len(names) // 2], "b": names[len(names) // 2 :]}
    files = {half: f"model-{number:05d}-of-00002.safetensors" for number, half in enumerate(halves, start=1)}
    for half, file in files.items():
        write(folder / file, {name: tensors[name] for name in halves[half]})
    index = {"weight_map": {name: files[half] for half, inside in halves.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = opened(folder, **HEADS)
    assert_same(source.tensors, tensors)
    assert len(source.files) == 3


@pytest.mark.oracle
def test_a_training_checkpoint(tmp_path):
    ema, raw = teacher(), {name: array + 1 for name, array in teacher().items()}
    args = argparse.Namespace(model="DiT-XL/2", image_size=32, num_classes=5)
    path = write_pt(tmp_path / "0400000.pt", {"model": raw, "ema": ema, "opt": {"state": {}}, "args": args})
    source = opened(path, **HEADS)
    assert source.what == "DiT teacher, the ema of a training checkpoint with the published names"
    assert_same(source.tensors, ema)
    assert_same(open_source(path, Hints(weights="ema", **HEADS)).tensors, ema)
    assert (
        open_source(path, Hints(weights="model", **HEADS)).tensors["x_embedder.proj.bias"][0]
        == raw["x_embedder.proj.bias"][0]
    )
    assert refused(path, objective="velocity", **HEADS) == (
        f"--objective is velocity, but {path} says noise: leave --objective out."
    )
    path = write_pt(tmp_path / "raw.pt", {"model": raw, "args": {"model": "DiT-XL/2"}})
    assert "raw.pt has no 'ema': it has model, choose that with --weights" in refused(path, weights="ema", **HEADS)
    assert "the model of a training checkpoint" in opened(path, **HEADS).what


@pytest.mark.oracle
def test_a_published_pt(tmp_path):
    source = opened(write_pt(tmp_path / "DiT-XL-2-256x256.pt", teacher()), **HEADS)
    assert source.what == "DiT teacher, a state dict with the published names" and source.license == "CC-BY-NC-4.0"
    assert_same(source.tensors, teacher())


@pytest.mark.oracle
def test_students_of_the_ard_repository(tmp_path):
    """Their training records N as `stack`."""
    args = argparse.Namespace(model="DiT-XL/2", stack=3, ckpt_path=None)
    given = state_dict(heads=4, depth=5)
    source = opened(write_pt(tmp_path / "0300000.pt", {"model": given, "ema": given, "opt": {}, "args": args}), **HEADS)
    assert isinstance(source.model, ARDStudent) and source.model.history_layers == 3
    assert opened(tmp_path / "0300000.pt", history_layers=2, **HEADS).model.history_layers == 2


@pytest.mark.oracle
def test_sit_trainings(tmp_path):
    args = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}
    path = write_pt(tmp_path / "x.pt", {"ema": teacher(), "args": argparse.Namespace(**args)})
    assert opened(path, **HEADS).config.diffusion.process == "flow"
    changes = {"path_type": ("GVP", "path_type GVP, but only Linear"), "prediction": ("score", "prediction score, but")}
    for key, (value, said) in changes.items():
        write_pt(path, {"ema": teacher(), "args": argparse.Namespace(**args | {key: value})})
        assert said in refused(path, **HEADS)


def test_without_torch(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name == "torch":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "DiT.pt").write_bytes(b"")
    said = refused(tmp_path / "DiT.pt")
    assert "PyTorch's own format, which torch reads: pip install torch" in said and "or give safetensors" in said


# --------------------------------------------------------------------------------------------------------- folders


def test_a_dit_pipeline(tmp_path):
    folder = write_dit_pipeline(tmp_path, id2label={"0": "tench", "1": "goldfish, Carassius auratus", "4": "hen"})
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags:\n- dit\n---\n# A model\n")
    source = opened(folder)
    assert source.what == "a DiTPipeline of diffusers" and type(source.model) is DiT
    assert (
        source.model.backbone.num_heads,
        source.model.backbone.frequency_shift,
        source.model.backbone.mlp_norm_eps,
    ) == (2, 1.0, 1e-5)
    diffusion = source.config.diffusion
    assert (diffusion.process, diffusion.spacing, diffusion.guided_channels) == ("vp", "leading", 0)
    assert source.vae == folder / "vae" and source.license == "cc-by-nc-4.0"
    assert source.labels == ("tench", "goldfish, Carassius auratus", "class 2", "class 3", "hen")
    assert_same(source.tensors, teacher())
    model, params = from_torch(teacher(), num_heads=2)
    assert_equal_trees(parameters(source.tensors, source.model), params)
    assert opened(folder, frequency_shift=0.0).model.backbone.frequency_shift == 0.0


def test_a_scheduler_of_its_own(tmp_path, caplog):
    changes = {"num_train_timesteps": 500, "beta_start": 0.0002, "beta_end": 0.03, "timestep_spacing": "trailing"}
    diffusion = opened(write_dit_pipeline(tmp_path, **changes)).config.diffusion
    assert (diffusion.train_steps, diffusion.beta_start, diffusion.beta_end, diffusion.spacing) == (
        500, 0.0002, 0.03, "trailing",
    )  # fmt: skip
    caplog.clear()
    opened(write_dit_pipeline(tmp_path, clip_sample=True, steps_offset=1, set_alpha_to_one=False))
    said = (
        f"{tmp_path}/scheduler/scheduler_config.json samples with clip_sample True, steps_offset 1, set_alpha_to_one "
    )
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        said + "False; here it is DDIM without that."
    ]
    caplog.clear()
    opened(write_dit_pipeline(tmp_path, _class_name="DPMSolverMultistepScheduler"))
    assert "samples with DPMSolverMultistepScheduler; here it is DDIM" in caplog.text


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"beta_schedule": "scaled_linear"}, "has beta_schedule 'scaled_linear', but only 'linear' can be converted"),
        ({"prediction_type": "v_prediction"}, "has prediction_type 'v_prediction', but only 'epsilon' can be"),
        ({"trained_betas": [0.1]}, r"has trained_betas \[0.1\], but only None can be converted"),
        ({"rescale_betas_zero_snr": True}, "has rescale_betas_zero_snr True, but only False can be"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "a FlowMatchEulerDiscreteScheduler, which is no",
        ),
    ],
)
def test_schedulers_that_mean_another_network(tmp_path, change, sentence):
    assert re.search(sentence, refused(write_dit_pipeline(tmp_path, **change)))


def test_half_precision_and_sharded_pipelines(tmp_path):
    assert_same(
        opened(write_dit_pipeline(tmp_path / "half", np.float16)).tensors,
        {
            name: array if name == "pos_embed" else array.astype(np.float16).astype(np.float32)
            for name, array in teacher().items()
        },
    )
    folder = write_dit_pipeline(tmp_path / "shards") / "transformer"
    whole = dict(open_source(folder).tensors)
    arrays, places = read_tensors(folder), {}
    (folder / WEIGHTS).unlink()
    for number, names in enumerate((list(arrays)[::2], list(arrays)[1::2])):
        shard = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        save_file({name: arrays[name] for name in names}, folder / shard)
        places |= dict.fromkeys(names, shard)
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": places})
    assert_same(opened(folder.parent).tensors, whole)
    (folder / shard).unlink()
    assert f"the shard '{shard}' that" in refused(folder.parent)


@pytest.mark.oracle
def test_a_pipeline_of_pickles(tmp_path):
    """As the published one on the hub is."""
    folder = write_dit_pipeline(tmp_path) / "transformer"
    write_pt(folder / "diffusion_pytorch_model.bin", read_tensors(folder))
    (folder / WEIGHTS).unlink()
    assert_same(opened(folder.parent).tensors, teacher())


def test_parts_of_pipelines(tmp_path):
    folder = write_dit_pipeline(tmp_path)
    source = opened(folder / "transformer")
    assert source.what == "a DiT transformer of diffusers" and source.vae is None
    assert (source.config.diffusion.guided_channels, source.config.diffusion.spacing) == (0, "linspace")
    alone = open_source(folder / "vae")
    assert alone.what == "an autoencoder of diffusers" and alone.vae == folder / "vae" and alone.model is None


@pytest.mark.parametrize("kind", ["PixArtSigmaPipeline", "PixArtAlphaPipeline"])
def test_published_folders_call_every_transformer_by_one_old_name(tmp_path, kind):
    """Which it is says norm_type; what is younger than the folder is left out of its config or null."""
    dit = write_dit_pipeline(tmp_path / "dit") / "transformer"
    pixart = write_pixart(tmp_path / "pixart", kind, interpolation=1.0) / "transformer"
    expected = [open_source(folder) for path in (dit, pixart) for folder in (path.parent, path)]
    for path, norm in ((dit, "ada_norm_zero"), (pixart, "ada_norm_single")):
        described = json.loads((path / "config.json").read_text()) | {"_class_name": "Transformer2DModel"}
        described |= {"num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}
        assert described["norm_type"] == norm
        if path == pixart:
            del described["attention_type"]
            described |= {"use_additional_conditions": None, "caption_channels": 20}
            if kind == "PixArtAlphaPipeline":
                described |= {"interpolation_scale": None}
        write_json(path / "config.json", described)
    found = [open_source(folder) for path in (dit, pixart) for folder in (path.parent, path)]
    assert [type(source.model) for source in found] == [DiT, DiT, PixArt, PixArt]
    for new, old in zip(found, expected, strict=True):
        assert (new.what, new.model) == (old.what, old.model)
        assert_same(new.tensors, old.tensors)
    write_json(dit / "config.json", {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"})
    assert f"{dit} holds a Transformer2DModel: only a DiT, a PixArt transformer" in refused(dit)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_pixart_of_no_name_is_known_by_its_positions_in_any_precision(tmp_path, dtype):
    model = small_pixart(interpolation=2.0, null_mask="caption")
    published = pixart_to_published(model, random_like(network_shapes(model)))
    kept = {
        name: array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for name, array in published.items()
    }
    assert open_source(write(tmp_path / "mine.safetensors", kept), Hints(**HEADS)).model == model
    kept["pos_embed"] = kept["pos_embed"] * 1.01
    assert "nothing tells how this PixArt's positions" in refused(write(tmp_path / "x.safetensors", kept), **HEADS)


def test_a_folder_with_one_file(tmp_path):
    write(tmp_path / "DiT-XL-2-256x256.safetensors", teacher())
    (tmp_path / "LICENSE.txt").write_text("Do what you like.")
    assert opened(tmp_path, **HEADS).license == "see LICENSE.txt"


@pytest.mark.parametrize("is_student", [True, False])
def test_what_ard_jax_exported(tmp_path, is_student):
    """A pipeline's folder, its part, and safetensors whose metadata holds the config: all tell the same model."""
    given = state_dict(heads=2) if is_student else teacher()
    hints = {"history_layers": 1, "mask": "window", "points": (12, 0)} if is_student else {"objective": "velocity"}
    first = opened(write(tmp_path / "x.safetensors", given), **HEADS, **hints)
    sections = ("data", "model", "diffusion", *(("student",) if is_student else ()))
    kept = json.loads(json.dumps({name: first.config[name].to_dict() for name in sections}))
    file = write(tmp_path / "y.safetensors", to_torch(first.model, parameters(first.tensors, first.model)),
                 {"config": json.dumps(kept)})  # fmt: skip
    name = "student" if is_student else "teacher"
    folder = tmp_path / "pipeline"
    write_json(folder / name / "config.json", {"_class_name": "ARDStudent" if is_student else "DiT", "config": kept})
    write(folder / name / WEIGHTS, given)
    index = {"_class_name": "ARDPipeline", name: ["ard_jax", "x"], "vae": ["diffusers", "AutoencoderKL"]}
    write_json(folder / "model_index.json", index | {"id2label": {"0": "zero"}})
    write_vae(folder / "vae")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: my-licence\n---\n")
    for path in (file, folder, folder / name):
        source = opened(path)
        assert source.model.with_backbone(dtype=None) == first.model
        for section in ("data", "model", "diffusion", "student", "trajectories", "sample"):
            assert source.config[section].to_dict() == first.config[section].to_dict()
        assert_same(source.tensors, given)
    whole = open_source(folder)
    assert whole.labels[:2] == ("zero", "class 1") and whole.vae == folder / "vae" and whole.license == "my-licence"
    assert "--num-heads is 4, but" in refused(folder, num_heads=4)
    del index[name]
    write_json(folder / "model_index.json", index)
    assert "names neither a student nor a teacher" in refused(folder)


def test_broken_descriptions_of_ours(tmp_path):
    for text in ("{", "[]", '{"data": {}}', '{"data": {}, "model": {}, "diffusion": {}, "more": {}}',
                 '{"data": {}, "model": {"later": 1}, "diffusion": {}}'):  # fmt: skip
        path = write(tmp_path / "x.safetensors", teacher(), {"config": text})
        assert "describes no model of this version of ard_jax" in refused(path)


def test_folders_that_are_none_of_these(tmp_path):
    assert (
        f"{tmp_path} is no pipeline, since it has no model_index.json or config.json, and it holds 0 files"
        in refused(tmp_path)
    )
    write(tmp_path / "a.safetensors", teacher())
    write(tmp_path / "b.safetensors", teacher())
    assert "holds 2 files of weights: give a pipeline's folder, or the file that you mean" in refused(tmp_path)
    write_json(tmp_path / "config.json", {"_class_name": "UNet2DConditionModel"})
    assert (
        "holds a UNet2DConditionModel: only a DiT, a PixArt transformer, an ARD student or an AutoencoderKL"
        in refused(tmp_path)
    )
    write_json(tmp_path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    assert "only a DiTPipeline, PixArtSigmaPipeline, PixArtAlphaPipeline or ARDPipeline can be converted" in refused(
        tmp_path
    )
    (tmp_path / "model_index.json").write_text("{")
    assert "model_index.json is damaged" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt is no file of weights: give one of .safetensors, .bin" in refused(tmp_path / "notes.txt")


def test_a_new_family_is_a_row(tmp_path, monkeypatch):
    """It comes before those that would refuse what is its own, and is named where nothing is recognised."""

    def recognise(path, hints):
        return Source("a foreign one", (path,), license=hints.license) if path.name.startswith("foreign") else None

    row = sources.Family(recognise, pipelines=("ForeignPipeline",), parts=("a DiT", "a foreign network"))
    monkeypatch.setattr(sources, "FAMILIES", (row, *sources.FAMILIES))
    path = write(tmp_path / "foreign.safetensors", {"x": np.ones(3, np.float32)})
    assert open_source(path, Hints(license="mit")) == Source("a foreign one", (path,), license="mit")
    assert open_source(tmp_path).what == "a foreign one"
    write_json(tmp_path / "config.json", {"_class_name": "UNet"})
    said = "only a DiT, a foreign network, a PixArt transformer, an ARD student or an AutoencoderKL"
    assert said in refused(tmp_path)
    write_json(tmp_path / "model_index.json", {})
    assert "holds a None: only a ForeignPipeline, DiTPipeline, PixArtSigmaPipeline, PixArtAlpha" in refused(tmp_path)


@pytest.mark.parametrize("part", ["transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json"])
def test_pipelines_that_are_not_whole(tmp_path, part):
    folder = write_dit_pipeline(tmp_path)
    (folder / part).unlink()
    assert f"{folder / part} is missing, so {(folder / part).parent} is not whole: fetch it again" in refused(folder)


@pytest.mark.parametrize("id2label", [[1], {"zero": "0"}, "names"])
def test_class_names_that_are_none(tmp_path, id2label):
    assert "has an id2label that gives no names by number" in refused(write_dit_pipeline(tmp_path, id2label=id2label))


@pytest.mark.parametrize(
    "card, license",
    [
        ("---\nlicense: mit\n---", "mit"),
        ("---\ntags:\n- a\nlicense: 'cc-by-4.0'\n---\nlicense: no", "cc-by-4.0"),
        ("---\nlicense: other\n---", "other"),
        ("license: mit", None),
        ("---\nlicense:\n---", None),
    ],
)
def test_licences_of_folders(tmp_path, card, license):
    (tmp_path / "README.md").write_text(card)
    assert folder_license(tmp_path) == license
    (tmp_path / "LICENSE").write_text("x")
    assert folder_license(tmp_path) == (license or "see LICENSE")
