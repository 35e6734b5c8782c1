"""The encoder of T5 v1.1 (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202).

No biases, no scale of the logits, root-mean-square norms before each layer, a gated tanh-GELU, and positions that are
nothing but a bias of the logits by distance, one table for all layers. In float16 it overflows, so it is refused.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.errors import UserError
from ard_jax.models.layers import Dense, Dtype
from ard_jax.models.partition import constrain, name_axes

name_axes(
    token_embed=("vocabulary", "embed"),
    position_bias=(None, None),  # 32 distances by heads: a few thousand numbers
    query=("embed", "heads"),
    key=("embed", "heads"),
    value=("embed", "heads"),
    mlp_gate=("embed", "mlp"),
)


@functools.cache
def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Which bias a query (row) has for a key (column): int32 (length, length).

    Half of the buckets are for keys after the query. Of each half, half are single distances, and the others grow by a
    factor up to `max_distance`, after which all share the last. In float32, as in transformers.
    """
    positions = np.arange(length)
    distance = positions[None] - positions[:, None]
    half, ahead = buckets // 2, distance > 0
    distance, exact = np.abs(distance), buckets // 4
    grown = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    grown = grown / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + grown.astype(np.int32), half - 1)
    return (ahead * half + np.where(distance < exact, distance, far)).astype(np.int32)


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · scale over the last axis; the mean is at least float32, whatever x is."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class T5Block(nn.Module):
    """Self-attention and a gated MLP, each after a norm and added to what it read."""

    num_heads: int
    head_width: int
    mlp_width: int
    eps: float
    dtype: Dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        """x (batch, token, width), bias of the logits (batch or 1, heads, query, key)."""
        x = constrain(x, "batch", None, None)
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype)
        at_least_float32 = jnp.promote_types(x.dtype, jnp.float32)

        h = RMSNorm(self.eps, name="attention_norm")(x)
        inner = self.num_heads * self.head_width
        q, k, v = (
            dense(inner, name=name)(h).reshape(*h.shape[:2], self.num_heads, -1).swapaxes(1, 2)
            for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=at_least_float32) + bias
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        h = jnp.einsum("bhqk,bhkd->bhqd", weights, v).swapaxes(1, 2).reshape(*h.shape[:2], inner)
        x = x + dense(x.shape[-1], name="attention_out")(h)

        h = RMSNorm(self.eps, name="mlp_norm")(x)
        gate = nn.gelu(dense(self.mlp_width, name="mlp_gate")(h), approximate=True)
        h = gate * dense(self.mlp_width, name="mlp_in")(h)
        return x + dense(x.shape[-1], name="mlp_out")(h), None


class T5Encoder(nn.Module):
    """T5 v1.1's encoder: token ids and their mask → vectors.

    Attributes:
        vocabulary: number of token ids.
        width: of a vector.
        depth: number of blocks.
        num_heads, head_width: attention heads, and the width of one.
        mlp_width: of the gated MLP.
        buckets, max_distance: of the positions, see `distance_buckets`.
        eps: of the norms.
        dtype: compute type, bfloat16 or wider; None takes it from the parameters.
    """

    vocabulary: int = 32_128
    width: int = 4096
    depth: int = 24
    num_heads: int = 64
    head_width: int = 64
    mlp_width: int = 10_240
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: Dtype | None = None

    def __post_init__(self):
        if self.dtype is not None and jnp.dtype(self.dtype) == jnp.float16:
            raise UserError("dtype is float16, in which T5 overflows: choose bfloat16 or float32.")
        super().__post_init__()

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes.

        Args:
            ids: token ids, int (batch, token).
            mask: which of them are the text's own, (batch, token), bool or 0 and 1.

        Returns:
            (batch, token, width). Padding only sees the text's own; of the empty text, whose own is one token, it is
            one and the same vector.
        """
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="token_embed")
        x = embed(ids)
        length = ids.shape[1]
        at_least_float32 = jnp.promote_types(x.dtype, jnp.float32)
        table = self.param("position_bias", nn.initializers.normal(0.02), (self.buckets, self.num_heads))
        bias = table.astype(at_least_float32)[distance_buckets(length, self.buckets, self.max_distance)]
        hidden = jnp.finfo(at_least_float32).min / 2  # finite, so that a row that is all padding is no NaN
        bias = jnp.where((mask != 0)[:, None, None], bias.transpose(2, 0, 1)[None], hidden)
        blocks = nn.scan(
            T5Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        block = blocks(self.num_heads, self.head_width, self.mlp_width, self.eps, self.dtype, name="blocks")
        x, _ = block(x, bias)
        return RMSNorm(self.eps, name="final_norm")(x)
