"""The pieces of a diffusion transformer, in the order in which an image meets them.

Hidden states are (rows, token, width): a row is one image for the teacher and one block of one trajectory for the
student. The modulation is one vector a row, never one a token: that is what makes the student's time embedding of a
whole block cost the same as the teacher's of a whole image (docs/METHOD.md section 4).
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ard_jax.errors import UserError
from ard_jax.models.partition import name_axes
from ard_jax.types import PyTree

name_axes(
    patch_embed=("patch", "embed"),
    modulation=("embed", "mlp"),
    qkv=("embed", "heads"),
    attention_out=("heads", "embed"),
    mlp_in=("embed", "mlp"),
    mlp_out=("mlp", "embed"),
    linear=("embed", "patch"),
)

Dtype = jax.typing.DTypeLike
xavier = nn.initializers.xavier_uniform()


class Dense(nn.Dense):
    """`nn.Dense` as one 2-D matrix product.

    XLA's CPU backend runs products of 4-D and 3-D activations, and above all their gradients, two to three times
    slower than the same numbers as a matrix; on TPU and GPU the reshape is free.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """(rows, height, width, channel) → (rows, token, patch_size² · channel), tokens row by row.

    Raises:
        UserError: height or width is not a multiple of `patch_size`.
    """
    height, width = images.shape[1:3]
    if height % patch_size or width % patch_size:
        raise UserError(
            f"images of {height}×{width} cannot be cut into patches of {patch_size}×{patch_size}: "
            f"choose a patch size that divides both sides."
        )
    return rearrange(images, "r (h p) (w q) c -> r (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens: jax.Array, patch_size: int, height: int, width: int) -> jax.Array:
    """(rows, token, patch_size² · channel) → (rows, height, width, channel)."""
    return rearrange(
        tokens, "r (h w) (p q c) -> r (h p) (w q) c", p=patch_size, q=patch_size, h=height // patch_size
    )  # fmt: skip


@functools.cache
def position_table(
    rows: int, columns: int, width: int, base: int | None = None, interpolation: float = 1.0
) -> np.ndarray:
    """Fixed 2-D sin-cos positions (DiT, models.py), float32 (rows · columns, width).

    The first half of the width encodes the column, the second half the row, each as [sin, cos]. Rounded to float32
    because published checkpoints store it so. With a `base`, the positions of each side are those of a grid of that
    many, over `interpolation` (PixArt, PixArtMS.py), in float32 as there.
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width / 4.0))

    def encode(positions):
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    def positions(count):
        if base is None:
            return np.arange(count)
        return np.arange(count, dtype=np.float32) / np.float32(count / base) / np.float32(interpolation)

    row, column = np.meshgrid(positions(rows), positions(columns), indexing="ij")
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


def sinusoids(t: jax.Array, size: int = 256, max_period: float = 10_000.0, frequency_shift: float = 0.0) -> jax.Array:
    """Sinusoidal features of a time (DiT, models.py): (rows,) → (rows, size), cosines first, then sines.

    Feature i of each half turns with frequency max_period^(−i / (size/2 − frequency_shift)).
    """
    half = size // 2
    dtype = jnp.promote_types(t.dtype, jnp.float32)
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=dtype) / (half - frequency_shift))
    angles = t.astype(dtype)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedder(nn.Module):
    """Network time (rows,) → (rows, width): sinusoids, Dense, SiLU, Dense."""

    width: int
    init_std: float = 0.02
    dtype: Dtype | None = None
    frequency_shift: float = 0.0

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.init_std)
        features = sinusoids(t, frequency_shift=self.frequency_shift)
        x = Dense(self.width, kernel_init=init, dtype=self.dtype, name="mlp_in")(features)
        return Dense(self.width, kernel_init=init, dtype=self.dtype, name="mlp_out")(nn.silu(x))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Adaptive layer norm's affine part: x (rows, token, width), shift and scale (rows, width)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def layer_norm(x: jax.Array, dtype: Dtype | None, eps: float = 1e-6) -> jax.Array:
    """Layer norm without affine parameters; its statistics are at least float32 whatever `dtype` is."""
    norm = nn.LayerNorm(use_bias=False, use_scale=False, epsilon=eps, dtype=dtype, use_fast_variance=False, parent=None)
    return norm.apply({}, x)  # type: ignore[return-value]  # Flax returns a pair only if `mutable`


# A function (q, k, v, memory) → (output, memory), all of q, k, v and output (rows, token, heads, head width).
# Memory is what one layer keeps between the calls of a cached sampler, None where nothing is kept.
Attend = Callable[[jax.Array, jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]]


class DiTBlock(nn.Module):
    """One adaLN-Zero transformer block (DiT, section 3.2).

    Attributes:
        num_heads: attention heads.
        mlp_ratio: width of the MLP over width of the block.
        dtype: compute type; None takes it from the inputs and parameters.
        mlp_norm_eps: eps of the layer norm before the MLP.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dtype: Dtype | None = None
    mlp_norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, context: PyTree, memory: PyTree, attend: Attend) -> tuple[jax.Array, PyTree]:
        """x (rows, token, width), of the context its `rows` (rows, width) → x of the same shape, and the memory."""
        width = x.shape[-1]
        zeros = nn.initializers.zeros
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=xavier)
        modulation = dense(6 * width, kernel_init=zeros, name="modulation")(context.rows)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)

        h = modulate(layer_norm(x, self.dtype), shift_a, scale_a)
        qkv = dense(3 * width, name="qkv")(h)
        q, k, v = rearrange(qkv, "r t (n h d) -> n r t h d", n=3, h=self.num_heads)
        h, memory = attend(q, k, v, memory)
        h = dense(width, name="attention_out")(h.reshape(x.shape))
        x = x + gate_a[:, None] * h

        h = modulate(layer_norm(x, self.dtype, self.mlp_norm_eps), shift_m, scale_m)
        h = dense(round(width * self.mlp_ratio), name="mlp_in")(h)
        h = dense(width, name="mlp_out")(nn.gelu(h, approximate=True))
        return x + gate_m[:, None] * h, memory


class FinalLayer(nn.Module):
    """adaLN by the context's `rows`, then a linear map to patches: (rows, token, width) → (rows, token, features)."""

    features: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: PyTree) -> jax.Array:
        zeros = nn.initializers.zeros
        modulation = Dense(2 * x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="modulation")(context.rows)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        h = modulate(layer_norm(x, self.dtype), shift, scale)
        return Dense(self.features, kernel_init=zeros, dtype=self.dtype, name="linear")(h)
