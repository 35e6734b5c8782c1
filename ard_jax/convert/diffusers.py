"""diffusers' `DiTTransformer2DModel` ↔ our `DiT`, by way of the published names.

Three things differ beside the names. diffusers keeps a copy of the time and label embedders in every block; all must be
one and the same, since ours are shared. Its time's sinusoids are spaced by 1/(half − 1) where the published network,
whose weights it carries, was trained with 1/half (`frequency_shift` 1 and 0). Its layer norm before the MLP has an eps
of its own, `norm_eps`, 1e-5 by default.
"""

import logging
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from ard_jax.convert.diffusers_config import OLD_CLASS, TABLE, UNUSED, read_config, written_sizes
from ard_jax.convert.published import expected_shapes, parameters, to_torch
from ard_jax.errors import UserError
from ard_jax.models import DiT, Network
from ard_jax.models.layers import position_table
from ard_jax.types import Params
from ard_jax.weights.lazy import Stored, Tensors, dtypes_of, joined, shapes_of
from ard_jax.weights.names import check_names

log = logging.getLogger("ard_jax")

CLASS = "DiTTransformer2DModel"
# Settings of diffusers' that we have no others for; a config that leaves one out means this.
ONLY = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
KINDS = ("weight", "bias")
# Published name: diffusers', in every block and outside them. Attention's q, k and v are apart there.
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {  # under transformer_blocks.N.norm1.emb.
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}


def dit_from_diffusers(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], **fields: Any
) -> tuple[DiT, Params]:
    """Builds the teacher that a diffusers transformer is.

    Args:
        state_dict: diffusers' names to NumPy arrays.
        config: what its config.json says.
        fields: further fields of the model, such as `dtype`, or `frequency_shift=0.0` for the network as it was trained
            instead of as diffusers runs it.

    Returns:
        The model and its parameters; types are kept.

    Raises:
        UserError: the config asks for what our DiT does not do, the names or shapes are not those that it describes,
            or the blocks' embedders differ.
    """
    model = dit_model(config, **fields)
    return model, parameters(published_names(state_dict, model), model)


def dit_to_diffusers(model: Network, params: Params) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The inverse of `dit_from_diffusers`: a state dict, types kept, and the whole config.

    diffusers has one spacing of the time's sinusoids, so the log warns of a model that has another.

    Raises:
        UserError: it is a student, its MLP is not four times as wide as its tokens, or its `image_size` is None.
    """
    sizes = written_sizes(model, "DiT")
    model = cast(DiT, model)
    if model.frequency_shift != 1:
        log.warning(
            "diffusers spaces the time's sinusoids by 1/127, this model by 1/%g: its images differ a little there.",
            128 - model.frequency_shift,
        )
    published = to_torch(model, params)
    found: dict[str, np.ndarray] = {}
    for name, theirs in _diffusers_names(model).items():
        arrays = np.split(published[name], 3) if _is_qkv(name) else [published[name]] * len(theirs)
        found |= zip(theirs, arrays, strict=True)
    return found, {
        "_class_name": CLASS,
        **ONLY,
        **sizes,
        "num_embeds_ada_norm": model.num_classes,
        "norm_eps": model.mlp_norm_eps,
        **UNUSED,
    }


def dit_model(config: Mapping[str, Any], **fields: Any) -> DiT:
    """The model that a transformer's config.json describes; see `dit_from_diffusers`.

    Raises:
        UserError: it describes one that our DiT cannot be.
    """
    given, sizes = read_config(config, (CLASS, OLD_CLASS), ONLY, DEFAULTS)
    size = sizes["image_size"]
    scale = config.get("interpolation_scale") or (size // 64 if config.get("_class_name") == OLD_CLASS else 1)
    if scale > 1:
        raise UserError(
            f"the transformer's positions are scaled by {scale}, as {OLD_CLASS} does for sample_size {size}: "
            f"only DiTs with the published position table can be used."
        )
    sizes |= {
        "num_classes": given["num_embeds_ada_norm"],
        "mlp_norm_eps": given["norm_eps"],
        "frequency_shift": 1.0,
    }
    return DiT(**{**sizes, **fields})


def published_names(state_dict: Mapping[str, np.ndarray], model: DiT) -> Tensors:
    """A transformer's arrays by their published names, unread.

    Raises:
        UserError: the names or shapes are not those of `model`; the blocks' embedders differ, once one is read.
    """
    found, dtypes = shapes_of(state_dict), dtypes_of(state_dict)
    expected = _diffusers_shapes(model)
    optional = {TABLE: None} if TABLE in found else {}
    check_names(found, expected | optional, "its config describes", "the names and shapes of diffusers' DiT")

    def shared(names):
        return Stored(found[names[0]], dtypes[names[0]], lambda: _the_one(state_dict, names))

    stored = {
        name: joined(state_dict, theirs) if _is_qkv(name) else shared(theirs)
        for name, theirs in _diffusers_names(model).items()
    }
    stored["pos_embed"] = shared([TABLE]) if optional else _fixed_table(model)
    return Tensors(stored)


def _diffusers_names(model: DiT) -> dict[str, list[str]]:
    """Published names, the position table aside: diffusers' names of the same array.

    They are one, or a copy in each block, or the q, k and v that make up the published array if `_is_qkv` of its name.
    """
    names = {f"{name}.{kind}": [f"{theirs}.{kind}"] for name, theirs in OUTSIDE.items() for kind in KINDS}
    blocks = [f"transformer_blocks.{layer}" for layer in range(model.depth)]
    names |= {name: [f"{block}.norm1.emb.{theirs}" for block in blocks] for name, theirs in EMBEDDERS.items()}
    for layer, block in enumerate(blocks):
        for kind in KINDS:
            names |= {f"blocks.{layer}.{name}.{kind}": [f"{block}.{theirs}.{kind}"] for name, theirs in BLOCK.items()}
            names[f"blocks.{layer}.attn.qkv.{kind}"] = [f"{block}.{theirs}.{kind}" for theirs in QKV]
    return names


def _is_qkv(published_name: str) -> bool:
    return ".attn.qkv." in published_name


def _diffusers_shapes(model: DiT) -> dict[str, tuple[int, ...] | None]:
    """diffusers' names and shapes of a model."""
    published = expected_shapes(model)
    shapes: dict[str, tuple[int, ...] | None] = {}
    for name, theirs in _diffusers_names(model).items():
        shape = published[name]
        assert shape is not None  # of the position table alone
        rows, *rest = shape
        shapes |= dict.fromkeys(theirs, (rows // 3 if _is_qkv(name) else rows, *rest))
    return shapes


def _the_one(state_dict: Mapping[str, np.ndarray], names: list[str]) -> np.ndarray:
    """The array that all of the names hold; UserError if they hold different ones."""
    first = np.asarray(state_dict[names[0]])
    for name in names[1:]:
        if not np.array_equal(first, state_dict[name]):
            raise UserError(
                f"the transformer's {names[0]} and {name} differ: only DiTs whose blocks share their time and label "
                f"embedders, as the published ones do, can be converted."
            )
    return first


def _fixed_table(model: DiT) -> Stored:
    """The published position table, which diffusers computes itself."""
    assert model.image_size is not None  # `dit_model` sets it
    side = model.image_size // model.patch_size
    table = position_table(side, side, model.hidden_size)[None]
    return Stored(table.shape, table.dtype, lambda: table)
