"""What the tests of conversions share: small state dicts with published names, and folders as diffusers writes them."""

import json
import math
import pathlib

import jax
import numpy as np

from ard_jax.convert import dit_to_diffusers, from_torch, vae_to_diffusers
from ard_jax.convert.published import expected_shapes
from ard_jax.models import AutoencoderKL, parameter_shapes
from ard_jax.models.layers import position_table
from ard_jax.weights.tensors import write_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}


def state_dict(width=8, channels=3, patch=2, depth=2, classes=5, hidden=20, out=6, heads=2, side=3, dtype=np.float32):
    """A state dict with the published names, random but for the position table."""
    rng = np.random.default_rng(0)
    shapes = {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
    }
    dense = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for layer in range(depth):
        dense |= {
            f"blocks.{layer}.attn.qkv": (3 * width, width),
            f"blocks.{layer}.attn.proj": (width, width),
            f"blocks.{layer}.mlp.fc1": (hidden, width),
            f"blocks.{layer}.mlp.fc2": (width, hidden),
            f"blocks.{layer}.adaLN_modulation.1": (6 * width, width),
        }
    for head in range(1, heads + 1):
        name = "final_layer" if head == 1 else f"final_layer{head}"
        dense |= {f"{name}.linear": (patch**2 * out, width), f"{name}.adaLN_modulation.1": (2 * width, width)}
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return {"pos_embed": position_table(side, side, width)[None]} | arrays


def teacher(**sizes):
    """A teacher of latents with the four-fold MLP that diffusers has."""
    return state_dict(**({"heads": 1, "channels": 4, "out": 8, "hidden": 32, "side": 2} | sizes))


def published_shapes(model):
    """Names and shapes at any size."""
    tokens = (model.backbone.image_size // model.backbone.patch_size) ** 2
    return expected_shapes(model) | {"pos_embed": (1, tokens, model.backbone.hidden_size)}


def sparse(path: pathlib.Path, model) -> pathlib.Path:
    """A .safetensors file of a model of any size that takes no room: its arrays are a hole in the file."""
    header, end = {}, 0
    for name, shape in published_shapes(model).items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def assert_same(found, expected):
    """Names, types, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def assert_equal_trees(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)


def write_json(path: pathlib.Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def tiny_vae():
    """An autoencoder of four latent channels, and random parameters."""
    model = AutoencoderKL(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4)
    shapes = parameter_shapes(model, jax.ShapeDtypeStruct((1, 2, 2, 3), "float32"))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def write_vae(folder: pathlib.Path, dtype=np.float32) -> pathlib.Path:
    weights, config = vae_to_diffusers(*tiny_vae())
    write_json(folder / "config.json", config)
    write_tensors(folder / WEIGHTS, {name: array.astype(dtype) for name, array in weights.items()})
    return folder


def write_dit_pipeline(folder: pathlib.Path, dtype=np.float32, id2label=None, **scheduler) -> pathlib.Path:
    """A `DiTPipeline` as diffusers saves one."""
    model, params = from_torch(teacher(), num_heads=2, frequency_shift=1.0, mlp_norm_eps=1e-5)
    weights, config = dit_to_diffusers(model, params)
    write_json(folder / "transformer" / "config.json", config)
    write_tensors(
        folder / "transformer" / WEIGHTS,
        {name: array.astype(dtype) for name, array in weights.items()},
        {"format": "pt"},
    )
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | scheduler)
    write_vae(folder / "vae", dtype)
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    write_json(folder / "model_index.json", index | ({"id2label": id2label} if id2label else {}))
    return folder
