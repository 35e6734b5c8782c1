"""Stable Diffusion's autoencoder in diffusers' names and config ↔ ours.

Our modules carry diffusers' names, so a rule renames them and no table does. PyTorch's convolutions are
(out, in, height, width), ours (height, width, in, out); its Linear weights are (out, in), ours (in, out).
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.errors import UserError
from ard_jax.files import read_json
from ard_jax.models import AutoencoderKL, parameter_shapes
from ard_jax.types import Params
from ard_jax.weights.lazy import shapes_of
from ard_jax.weights.names import check_names
from ard_jax.weights.tensors import open_tensors, to_float32

# Settings that are fields of ours by the same name, and what diffusers takes where a config leaves them out.
FIELDS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "sample_size": 32,
    "force_upcast": True,
}
# Attention's names in files of before 2023, such as sd-vae-ft-mse's.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # number of axes: ours in PyTorch's order


def open_vae(folder: str | os.PathLike) -> tuple[AutoencoderKL, Params]:
    """The model and float32 parameters of a folder that diffusers wrote: config.json beside the weights.

    Raises:
        UserError: a file is missing or broken, or what `vae_from_diffusers` raises.
    """
    path = pathlib.Path(folder) / "config.json"
    remedy = "give the folder of a VAE as diffusers writes it"
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}.")
    config = read_json(path, dict[str, Any], remedy)
    return vae_from_diffusers(to_float32(open_tensors(folder), folder), config)


def vae_from_diffusers(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], **fields: Any
) -> tuple[AutoencoderKL, Params]:
    """Builds the autoencoder that a diffusers `AutoencoderKL` is.

    Args:
        state_dict: names to NumPy arrays; the attention's old names will do.
        config: what its config.json says.
        fields: further fields of the model, such as `dtype`.

    Returns:
        The model and its parameters; types are kept.

    Raises:
        UserError: the config asks for something that `AutoencoderKL` here does not do, or the names or shapes are not
            those that it describes.
    """
    model = AutoencoderKL(**_fields_of(config), **fields)
    shapes = vae_shapes(model)
    expected = published_shapes(shapes)
    found = {_current_name(name): shape for name, shape in shapes_of(state_dict).items()}
    check_names(found, expected, "its config describes", "the names and shapes of diffusers' AutoencoderKL")
    names = {_current_name(name): name for name in state_dict}

    def read(path, leaf):
        return jnp.asarray(state_dict[names[_published_name(path)]].transpose(np.argsort(AXES[leaf.ndim])))

    return model, jax.tree_util.tree_map_with_path(read, shapes)


def vae_to_diffusers(model: AutoencoderKL, params: Params) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The inverse of `vae_from_diffusers`: a state dict with today's names, types kept, and the whole config."""
    state_dict = {
        _published_name(path): np.ascontiguousarray(np.asarray(leaf).transpose(AXES[leaf.ndim]))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return state_dict, diffusers_config(model)


def vae_shapes(model: AutoencoderKL) -> Params:
    """Shapes of a model's parameters, which do not depend on the size of its images."""
    side = model.downscale
    return parameter_shapes(model, jax.ShapeDtypeStruct((1, side, side, model.in_channels), "float32"))


def published_shapes(shapes: Params) -> dict[str, tuple[int, ...]]:
    """What a state dict holds: names and shapes in PyTorch's order."""
    return {
        _published_name(path): tuple(leaf.shape[axis] for axis in AXES[leaf.ndim])
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


def diffusers_config(model: AutoencoderKL) -> dict[str, Any]:
    """What diffusers' config.json says of a model."""
    fields = {name: getattr(model, name) for name in FIELDS}
    settings = {"_class_name": "AutoencoderKL"} | fields | _only_values(len(model.block_out_channels))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `AutoencoderKL` by a diffusers config.

    Raises:
        UserError: it is another class's, or has a setting or a value that is unknown here.
    """
    class_name = config.get("_class_name", "AutoencoderKL")
    if class_name != "AutoencoderKL":
        raise UserError(f"the config is of class {class_name!r}, but only an AutoencoderKL can be converted: give one.")
    fields = FIELDS | {key: config[key] for key in FIELDS if key in config}
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    only = _only_values(len(fields["block_out_channels"]))
    for key, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in only and value != only[key] and (key, value) != ("act_fn", "swish"):
            raise UserError(
                f"the config has {key} {value!r}, but only {only[key]!r} can be converted: use another VAE."
            )
        if key not in only and key not in FIELDS and not key.startswith("_"):
            raise UserError(f"the config has {key} {value!r}, which is unknown here: give one of an AutoencoderKL.")
    return fields


def _only_values(resolutions: int) -> dict[str, Any]:
    """Settings of diffusers that have one value here ("swish" is its other name of "silu")."""
    return {
        "act_fn": "silu",
        "down_block_types": ("DownEncoderBlock2D",) * resolutions,
        "up_block_types": ("UpDecoderBlock2D",) * resolutions,
        "latents_mean": None,
        "latents_std": None,
    }


def _current_name(name: str) -> str:
    """A name of whichever age → today's."""
    return re.sub(r"(\.attentions\.\d+\.)(\w+)", lambda found: found[1] + OLD_NAMES.get(found[2], found[2]), name)


def _published_name(path: tuple[jax.tree_util.DictKey, ...]) -> str:
    """A parameter's path in the tree → its name in a state dict."""
    *modules, leaf = (entry.key for entry in path)
    return ".".join([re.sub(r"_(\d+)$", r".\1", module) for module in modules] + [LEAVES[leaf]])
