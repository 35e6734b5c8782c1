"""PixArt's weights, of the authors and of diffusers' `PixArtTransformer2DModel` ↔ our `PixArt`.

Either comes with diffusers' config, since no shape tells how positions are scaled. diffusers' names lead by way of the
authors': its q, k and v are apart, as are the caption's k and v; and `scale_shift_table` is the final layer's.
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from ard_jax.convert.diffusers_config import OLD_CLASS, TABLE, UNUSED, read_config, written_sizes
from ard_jax.convert.published import KINDS, NULL_CAPTION, expected_shapes, parameters, to_torch
from ard_jax.errors import UserError
from ard_jax.models import Network, PixArt
from ard_jax.types import Params
from ard_jax.weights.lazy import Tensors, joined, shapes_of
from ard_jax.weights.names import check_names

CLASS = "PixArtTransformer2DModel"
# Settings of diffusers' that we have no others for; a config that leaves one out means this.
ONLY = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_type": "default",
}
DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 128,
    "patch_size": 2,
    "caption_channels": 4096,
}
# Authors' names: diffusers', whose rows follow one another in the authors' array.
OUTSIDE = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
}
BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
MODULATION = "scale_shift_table"


def pixart_from_published(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], **fields: Any
) -> tuple[PixArt, Params]:
    """Builds the teacher that a state dict of the authors' is.

    Args:
        state_dict: the authors' names to NumPy arrays. Their position table and empty caption may be there: the first
            must be the fixed one, the second is no parameter.
        config: what diffusers' config.json says of the same network.
        fields: further fields of the model, such as `dtype`.

    Returns:
        The model, whose `null_mask` is the authors' "caption" unless `fields` say another, and its parameters; types
        are kept.

    Raises:
        UserError: the config asks for what our PixArt does not do, or the names or shapes are not those it describes.
    """
    model = pixart_model(config, **{"null_mask": "caption", **fields})
    return model, parameters(state_dict, model)


def pixart_to_published(
    model: Network, params: Params, null_caption: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The inverse of `pixart_from_published`: the authors' state dict, types kept.

    Args:
        model, params: a PixArt, or a student of one.
        null_caption: the empty caption (token, channel), which the authors' file has beside the parameters.

    Raises:
        UserError: the model's `image_size` is None.
    """
    state_dict = to_torch(model, params)
    return state_dict if null_caption is None else state_dict | {NULL_CAPTION: np.asarray(null_caption)}


def pixart_from_diffusers(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], **fields: Any
) -> tuple[PixArt, Params]:
    """Builds the teacher that a diffusers transformer is.

    Args:
        state_dict: diffusers' names to NumPy arrays.
        config: what its config.json says.
        fields: further fields of the model, such as `dtype`.

    Returns:
        The model, whose `null_mask` is diffusers' "own" unless `fields` say another, and its parameters; types are
        kept.

    Raises:
        UserError: the config asks for what our PixArt does not do, or the names or shapes are not those it describes.
    """
    model = pixart_model(config, **fields)
    return model, parameters(published_names(state_dict, model), model)


def pixart_to_diffusers(model: Network, params: Params) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The inverse of `pixart_from_diffusers`: a state dict, types kept, and the whole config.

    Raises:
        UserError: it is a student, its MLP is not four times as wide as its tokens, or its `image_size` is None.
    """
    sizes = written_sizes(model, "PixArt")
    model = cast(PixArt, model)
    published = to_torch(model, params)
    found: dict[str, np.ndarray] = {}
    for name, theirs in _diffusers_names(model).items():
        found |= zip(theirs, np.split(published[name], len(theirs)), strict=True)
    return found, {
        "_class_name": CLASS,
        **ONLY,
        **sizes,
        "caption_channels": model.caption_width,
        "cross_attention_dim": model.hidden_size,
        "interpolation_scale": model.interpolation,
        "use_additional_conditions": model.size_conditioning,
        "num_embeds_ada_norm": 1000,
        **UNUSED,
    }


def pixart_model(config: Mapping[str, Any], **fields: Any) -> PixArt:
    """The model that a transformer's config.json describes; see `pixart_from_diffusers`.

    `interpolation_scale` may be null there, which means what it does in diffusers: the side over 64, at least 1. So may
    `use_additional_conditions`, which then means that the side is 128.

    Raises:
        UserError: it describes one that our PixArt cannot be.
    """
    config = {"attention_type": "default"} | dict(config)  # which older ones do not say
    given, sizes = read_config(config, (CLASS, OLD_CLASS), ONLY, DEFAULTS)
    width, size = sizes["hidden_size"], sizes["image_size"]
    if config.get("cross_attention_dim", width) not in (width, None):
        raise UserError(
            f"the transformer's cross_attention_dim is {config['cross_attention_dim']}, but its captions are projected "
            f"to {width}, the width of its tokens: give the config that the weights came with."
        )
    scale, told_size = config.get("interpolation_scale"), config.get("use_additional_conditions")
    sizes |= {
        "caption_width": given["caption_channels"],
        "interpolation": float(max(size // 64, 1) if scale is None else scale),
        "size_conditioning": size == 128 if told_size is None else bool(told_size),
    }
    return PixArt(**{**sizes, **fields})


def published_names(state_dict: Mapping[str, np.ndarray], model: PixArt) -> Tensors:
    """A transformer's arrays by the authors' names, unread, with the fixed positions that older files have.

    Raises:
        UserError: the names or shapes are not those of `model`.
    """
    check_names(
        shapes_of(state_dict),
        _diffusers_shapes(model),
        "its config describes",
        "the names and shapes of diffusers' PixArt",
        optional=(TABLE,),
    )
    names = _diffusers_names(model) | ({"pos_embed": [TABLE]} if TABLE in state_dict else {})
    return Tensors({name: joined(state_dict, theirs) for name, theirs in names.items()})


def _diffusers_names(model: PixArt) -> dict[str, list[str]]:
    """The authors' names: diffusers' names of the arrays whose rows it has, one after the other."""
    expected = expected_shapes(model)
    names = {
        f"{name}.{kind}": [f"{part}.{kind}" for part in theirs]
        for name, theirs in OUTSIDE.items()
        for kind in KINDS.values()
    }
    names[f"final_layer.{MODULATION}"] = [MODULATION]
    for layer in range(model.depth):
        ours, block = f"blocks.{layer}", f"transformer_blocks.{layer}"
        names[f"{ours}.{MODULATION}"] = [f"{block}.{MODULATION}"]
        for name, theirs in BLOCK.items():
            for kind in KINDS.values():
                names[f"{ours}.{name}.{kind}"] = [f"{block}.{part}.{kind}" for part in theirs]
    return {name: theirs for name, theirs in names.items() if name in expected}


def _diffusers_shapes(model: PixArt) -> dict[str, tuple[int, ...] | None]:
    """diffusers' names and shapes of a model."""
    published = expected_shapes(model)
    shapes: dict[str, tuple[int, ...] | None] = {}
    for name, theirs in _diffusers_names(model).items():
        shape = published[name]
        assert shape is not None  # which is so of constants alone
        rows, *rest = shape
        shapes |= dict.fromkeys(theirs, (rows // len(theirs), *rest))
    return shapes
