"""transformers' `T5EncoderModel` → our `T5Encoder`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.convert.published import Places, stored_tree
from ard_jax.errors import UserError
from ard_jax.models import parameter_shapes
from ard_jax.text.t5 import T5Encoder
from ard_jax.types import Params, PyTree
from ard_jax.weights.lazy import dtypes_of, shapes_of
from ard_jax.weights.names import check_names

# Ours: transformers', of a config; a config that leaves one out means the class's own default.
SIZES = {
    "vocabulary": ("vocab_size", 32_128),
    "width": ("d_model", 512),
    "depth": ("num_layers", 6),
    "num_heads": ("num_heads", 8),
    "head_width": ("d_kv", 64),
    "mlp_width": ("d_ff", 2048),
    "buckets": ("relative_attention_num_buckets", 32),
    "max_distance": ("relative_attention_max_distance", 128),
}
BLOCK = {
    "query": "0.SelfAttention.q",
    "key": "0.SelfAttention.k",
    "value": "0.SelfAttention.v",
    "attention_out": "0.SelfAttention.o",
    "mlp_gate": "1.DenseReluDense.wi_0",
    "mlp_in": "1.DenseReluDense.wi_1",
    "mlp_out": "1.DenseReluDense.wo",
}
NORMS = {"attention_norm": "0.layer_norm", "mlp_norm": "1.layer_norm"}
POSITIONS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
# What a whole T5 has beside its encoder, and the encoder's own copy of the embedding.
LEFT_OUT = ("decoder.", "lm_head.", "encoder.embed_tokens.")


def t5_from_transformers(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], **fields: Any
) -> tuple[T5Encoder, Params]:
    """Builds the encoder that a T5 of transformers has.

    Args:
        state_dict: transformers' names to NumPy arrays; those of a decoder are left out.
        config: what its config.json says.
        fields: further fields of the model, such as `dtype`.

    Returns:
        The model and its parameters; types are kept.

    Raises:
        UserError: the config describes no T5 v1.1, the names or shapes are not those that it describes, or the weights
            are float16.
    """
    model = t5_model(config, **fields)
    return model, jax.tree.map(lambda leaf: jnp.asarray(leaf.read()), stored_t5(state_dict, model))


def t5_model(config: Mapping[str, Any], **fields: Any) -> T5Encoder:
    """The encoder that a config.json of transformers describes.

    Raises:
        UserError: it describes no T5 v1.1.
    """
    kind = config.get("model_type", "t5")
    if kind != "t5":
        raise UserError(f"the text encoder is a {kind!r}, but only a T5 v1.1 can be used: give one.")
    act = config.get("feed_forward_proj", "relu")
    if act != "gated-gelu":
        raise UserError(
            f"the T5's feed_forward_proj is {act!r}, but only 'gated-gelu' can be used: give a T5 v1.1, not a first T5."
        )
    sizes = {ours: config.get(theirs, default) for ours, (theirs, default) in SIZES.items()}
    for ours, value in sizes.items():
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"the T5's {SIZES[ours][0]} is {value!r} in its config: give a config with a number there.")
    return T5Encoder(**{**sizes, "eps": config.get("layer_norm_epsilon", 1e-6), **fields})


def stored_t5(state_dict: Mapping[str, np.ndarray], model: T5Encoder) -> PyTree:
    """The parameters as `Stored`, so that they can be had one at a time.

    Raises:
        UserError: as `t5_from_transformers`.
    """
    half = [name for name, dtype in dtypes_of(state_dict).items() if dtype == np.float16]
    if half:
        raise UserError(
            f"the T5's weights are float16 ({half[0]} and others), in which it overflows: give bfloat16 or float32."
        )
    shapes, found = t5_shapes(model), shapes_of(state_dict)
    others = [name for name in found if name.startswith(LEFT_OUT) and name not in shapes]
    if "shared.weight" not in found and "encoder.embed_tokens.weight" in found:  # as some write an encoder alone
        copy = "encoder.embed_tokens.weight"
        shapes = {copy if name == "shared.weight" else name: shape for name, shape in shapes.items()}
        others.remove(copy)
    check_names(found, shapes, "its config describes", "the names and shapes of transformers' T5", optional=others)
    return stored_tree(state_dict, _places(model, next(iter(shapes))))


def t5_to_transformers(model: T5Encoder, params: Params) -> dict[str, np.ndarray]:
    """The inverse of `t5_from_transformers`, types kept."""
    found: dict[str, np.ndarray] = {}
    for keys, names in _places(model).items():
        leaf: Any = params
        for key in keys:
            leaf = leaf[key]
        arrays = [np.asarray(leaf)] if isinstance(names, str) else np.asarray(leaf)
        for name, array in zip([names] if isinstance(names, str) else names, arrays, strict=True):
            found[name] = np.ascontiguousarray(array.T if keys[-1] == "kernel" else array)
    return found


def t5_shapes(model: T5Encoder) -> dict[str, tuple[int, ...]]:
    """transformers' names and shapes of a model, the embedding first."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    ours: Any = parameter_shapes(model, token, token)
    shapes: dict[str, tuple[int, ...]] = {}
    for keys, names in _places(model).items():
        leaf = ours
        for key in keys:
            leaf = leaf[key]
        shape = leaf.shape if isinstance(names, str) else leaf.shape[1:]
        shape = shape[::-1] if keys[-1] == "kernel" else shape
        shapes |= dict.fromkeys([names] if isinstance(names, str) else names, shape)
    return shapes


def _places(model: T5Encoder, embedding: str = "shared.weight") -> Places:
    """Where each of our leaves lies in transformers' state dict."""

    def stacked(name):
        return [f"encoder.block.{layer}.layer.{name}.weight" for layer in range(model.depth)]

    places: Places = {("token_embed", "embedding"): embedding, ("position_bias",): POSITIONS}
    places |= {("blocks", ours, "kernel"): stacked(theirs) for ours, theirs in BLOCK.items()}
    places |= {("blocks", ours, "scale"): stacked(theirs) for ours, theirs in NORMS.items()}
    return places | {("final_norm", "scale"): "encoder.final_layer_norm.weight"}
