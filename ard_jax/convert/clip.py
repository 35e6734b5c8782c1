"""CLIP in transformers' or open_clip's names and config → our `CLIP`.

open_clip's arrays are brought under transformers' names first: it keeps queries, keys and values in one matrix, and the
two projections (in, out), where PyTorch's Linear weights are (out, in).
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ard_jax.convert.clip_config import fields_of_open_clip, fields_of_transformers
from ard_jax.convert.published import Places, stored_tree
from ard_jax.models import CLIP, parameter_shapes
from ard_jax.types import Params, PyTree
from ard_jax.weights.lazy import Stored, Tensors, joined, shapes_of
from ard_jax.weights.names import check_names

PATCHES = "vision_model.embeddings.patch_embedding.weight"  # a convolution there
# Ours: transformers', outside the blocks.
ARRAYS: dict[tuple[str, ...], str] = {
    ("logit_scale",): "logit_scale",
    ("image_encoder", "class_embed"): "vision_model.embeddings.class_embedding",
    ("image_encoder", "patch_embed", "kernel"): PATCHES,
    ("image_encoder", "positions"): "vision_model.embeddings.position_embedding.weight",
    ("image_encoder", "projection", "kernel"): "visual_projection.weight",
    ("text_encoder", "token_embed", "embedding"): "text_model.embeddings.token_embedding.weight",
    ("text_encoder", "positions"): "text_model.embeddings.position_embedding.weight",
    ("text_encoder", "projection", "kernel"): "text_projection.weight",
}
NORMS = {
    ("image_encoder", "first_norm"): "vision_model.pre_layrnorm",  # sic
    ("image_encoder", "final_norm"): "vision_model.post_layernorm",
    ("text_encoder", "final_norm"): "text_model.final_layer_norm",
}
BLOCKS = {"image_encoder": "vision_model.encoder.layers", "text_encoder": "text_model.encoder.layers"}
BLOCK = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.out_proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
BLOCK_NORMS = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"}
# Counters that older files have among their arrays.
POSITION_IDS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")

# Parts of transformers' names: open_clip's.
OPEN_CLIP = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_projection.weight": "text_projection",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.q_proj.": ".attn.in_proj_",
    ".self_attn.k_proj.": ".attn.in_proj_",
    ".self_attn.v_proj.": ".attn.in_proj_",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
TURNED = ("visual.proj", "text_projection")  # (in, out) in open_clip
# The causal mask of older files, and what OpenAI's own have beside their arrays.
OPEN_CLIP_CONSTANTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


def clip_from_transformers(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], **fields: Any
) -> tuple[CLIP, Params]:
    """Builds the CLIP that a `CLIPModel` of transformers is, such as OpenAI's, LAION's and PickScore's.

    Args:
        state_dict: transformers' names to NumPy arrays or PyTorch tensors.
        config: what its config.json says; keys that are left out have transformers' defaults.
        fields: further fields of the model, such as `dtype`.

    Returns:
        The model and its parameters; types are kept.

    Raises:
        UserError: the config describes something that `CLIP` here is not, or the names or shapes are not those that it
            describes.
    """
    model = CLIP(**fields_of_transformers(config), **fields)
    tensors = _arrays(state_dict)
    names = "the names and shapes of transformers' CLIPModel"
    check_names(shapes_of(tensors), transformers_shapes(model), "its config describes", names, optional=POSITION_IDS)
    return model, _parameters(tensors, model)


def clip_from_open_clip(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], **fields: Any
) -> tuple[CLIP, Params]:
    """Builds the CLIP that open_clip's `CLIP` is, such as LAION's and HPSv2's; OpenAI's own files have its names too.

    Args:
        state_dict: open_clip's names to NumPy arrays or PyTorch tensors.
        config: open_clip's own of the model, such as its ViT-H-14.json, or the open_clip_config.json that it lies in.
        fields: further fields of the model, such as `dtype`.

    Returns:
        The model and its parameters; types are kept.

    Raises:
        UserError: as `clip_from_transformers`.
    """
    model = CLIP(**fields_of_open_clip(config), **fields)
    tensors = _arrays(state_dict)
    names = "the names and shapes of open_clip's CLIP"
    check_names(
        shapes_of(tensors), open_clip_shapes(model), "its config describes", names, optional=OPEN_CLIP_CONSTANTS
    )
    stored = {name: _from_open_clip(tensors, name) for name in transformers_shapes(model)}
    return model, _parameters(Tensors(stored), model)


def transformers_shapes(model: CLIP) -> dict[str, tuple[int, ...]]:
    """transformers' names and shapes of a model."""
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, model.channels), "float32")
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    ours = parameter_shapes(model, image, token, token)
    shapes: dict[str, tuple[int, ...]] = {}
    for keys, names in _places(model).items():
        leaf: Any = functools.reduce(lambda tree, key: tree[key], keys, ours)
        shape = leaf.shape if isinstance(names, str) else leaf.shape[1:]
        shape = shape[::-1] if keys[-1] == "kernel" else shape
        shapes |= dict.fromkeys([names] if isinstance(names, str) else names, shape)
    return shapes | {PATCHES: (model.vision.width, model.channels, model.patch_size, model.patch_size)}


def open_clip_shapes(model: CLIP) -> dict[str, tuple[int, ...]]:
    """open_clip's names and shapes of a model."""
    shapes = {}
    for name, shape in transformers_shapes(model).items():
        theirs, third = _open_clip_name(name)
        if third is not None:
            shape = (3 * shape[0], *shape[1:])
        shapes[theirs] = shape[::-1] if theirs in TURNED else shape
    return shapes


def _open_clip_name(name: str) -> tuple[str, int | None]:
    """transformers' name → open_clip's, and which third of its rows it is."""
    part = re.search(r"\.self_attn\.([qkv])_proj\.", name)
    for theirs, ours in OPEN_CLIP.items():
        name = name.replace(theirs, ours)
    return name, "qkv".index(part[1]) if part else None


def _from_open_clip(tensors: Mapping[str, np.ndarray], name: str) -> Stored:
    """The array that transformers has under a name, out of open_clip's; nothing is read until it is asked for."""
    theirs, third = _open_clip_name(name)
    stored = joined(tensors, [theirs])
    if theirs in TURNED:
        return Stored(stored.shape[::-1], stored.dtype, lambda: stored.read().T)
    if third is None:
        return stored
    rows = stored.shape[0] // 3
    return Stored((rows, *stored.shape[1:]), stored.dtype, lambda: stored.read()[third * rows : (third + 1) * rows])


def _parameters(tensors: Mapping[str, np.ndarray], model: CLIP) -> Params:
    """Arrays with transformers' names and the right shapes → the parameters, read one at a time."""
    stored = {name: joined(tensors, [name]) for name in transformers_shapes(model)}
    convolution = stored[PATCHES]
    # (out, in, row, column) → (out, patch) with a patch's numbers in the order (row, column, in)
    flat = convolution.shape[0], model.patch_size**2 * model.channels
    stored[PATCHES] = Stored(
        flat, convolution.dtype, lambda: np.asarray(convolution.read()).transpose(0, 2, 3, 1).reshape(flat)
    )
    tree: PyTree = stored_tree(Tensors(stored), _places(model))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.read()), tree)


def _places(model: CLIP) -> Places:
    """Where each of our leaves lies in transformers' state dict."""
    places: Places = dict(ARRAYS)
    for keys, norm in NORMS.items():
        places |= {(*keys, "scale"): f"{norm}.weight", (*keys, "bias"): f"{norm}.bias"}
    for encoder, blocks in BLOCKS.items():
        depth = (model.vision if encoder == "image_encoder" else model.text).depth
        for weight, modules in (("kernel", BLOCK), ("scale", BLOCK_NORMS)):
            for ours, theirs in modules.items():
                for leaf, kind in ((weight, "weight"), ("bias", "bias")):
                    names = [f"{blocks}.{layer}.{theirs}.{kind}" for layer in range(depth)]
                    places[encoder, "blocks", ours, leaf] = names
    return places


def _arrays(state_dict: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
    """A state dict's tensors as NumPy arrays, without a copy of those that are in the host's memory."""
    return state_dict if isinstance(state_dict, Tensors) else {n: _array(tensor) for n, tensor in state_dict.items()}


def _array(tensor: Any) -> np.ndarray:
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    import torch  # is there, since this is one of its tensors

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not know by itself
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
