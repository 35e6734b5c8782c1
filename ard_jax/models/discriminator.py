"""The discriminator: one small head on each chosen block of the frozen teacher (docs/METHOD.md section 6).

The heads are those of StyleGAN-T (Sauer et al. 2023, arXiv 2301.09515, appendix A), on the tokens of a diffusion
transformer. They are stacked: their parameters and their tokens carry a leading axis, one entry a head.

Three kernels of a head are divided by their largest singular value, which is estimated by power iteration (Miyato et
al. 2018, arXiv 1802.05957). The estimate lives in two vectors a kernel that no gradient moves, so they are no
parameters: `Vectors` go into pure functions and come out of them.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ard_jax.models.layers import Dense, Dtype
from ard_jax.models.partition import name_axes
from ard_jax.types import Params

name_axes(
    pointwise=("embed", "feature"),
    windowed=("window", "embed", "feature"),
    logit=("embed", "feature"),
    condition=("embed", "feature"),
    u=(None, None),
    v=(None, None),
)

WINDOW = 9  # tokens that the wide convolution sees
LOGIT_WIDTH = 64  # of the two vectors whose product is a logit
GROUP = 8  # samples that a batch norm takes its statistics over, at most if the batch allows
LEAK = 0.2
NORMALISED = ("pointwise", "windowed", "logit")  # layers whose kernels have a spectral norm of 1

# {"u": {layer: (head, out)}, "v": {layer: (head, inputs)}}: left and right singular vectors of each kernel
Vectors = dict[str, dict[str, jax.Array]]


def _torch_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
    """PyTorch's own initialisation of convolutions, U(±1/√inputs): small enough for spectral norm to enlarge."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class CircularConv(nn.Module):
    """Convolution along the tokens, whose last meets the first: (rows, token, width) → the same.

    It is `WINDOW` matrix products with their results shifted: on CPU, XLA's own convolution takes twice the time at
    width 64 and up to 60 times at 256 with its gradients, and a TPU would turn it into such products.
    """

    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        kernel = self.param("kernel", _torch_uniform, (WINDOW, width, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        matrix = x.reshape(-1, width)
        products = ((matrix @ kernel[place]).reshape(x.shape) for place in range(WINDOW))
        return sum(jnp.roll(product, WINDOW // 2 - place, 1) for place, product in enumerate(products)) + bias


def norm_groups(rows: int) -> int:
    """Into how many groups the batch norm splits a batch: as few as divide it into groups of at most `GROUP`."""
    return next(groups for groups in range(math.ceil(rows / GROUP), rows + 1) if rows % groups == 0)


class GroupedBatchNorm(nn.Module):
    """Batch norm over groups of consecutive samples, by the batch's own statistics always: (rows, token, width).

    The statistics are at least float32 whatever `dtype` is. They do not depend on how many devices share the batch.
    """

    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        grouped = x.reshape(norm_groups(len(x)), -1, x.shape[-1])
        grouped = grouped.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = grouped - jnp.mean(grouped, axis=1, keepdims=True)
        variance = jnp.mean(centred**2, axis=1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias
        return normal.reshape(x.shape).astype(self.dtype or x.dtype)


class Head(nn.Module):
    """Tokens (rows, token, width) and their condition (rows, condition width) → logits (rows, token)."""

    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        def dense(features, name):
            return Dense(features, kernel_init=_torch_uniform, dtype=self.dtype, name=name)

        def activate(x, name):
            return nn.leaky_relu(GroupedBatchNorm(self.dtype, name=name)(x), LEAK)

        x = activate(dense(x.shape[-1], "pointwise")(x), "pointwise_norm")
        wide = activate(CircularConv(self.dtype, name="windowed")(x), "windowed_norm")
        token = dense(LOGIT_WIDTH, "logit")((wide + x) / math.sqrt(2))
        wanted = dense(LOGIT_WIDTH, "condition")(condition)
        logits = jnp.einsum("rtf,rf->rt", token, wanted) / math.sqrt(LOGIT_WIDTH)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


class Discriminator(nn.Module):
    """A head for each block that it looks at.

    Attributes:
        heads: how many.
        dtype: compute type; None takes it from the inputs and parameters. Parameters are float32.
    """

    heads: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array, condition: jax.Array) -> jax.Array:
        """Judges.

        Args:
            tokens: of the teacher's blocks, (head, rows, token, width), see `Backbone.features`.
            condition: time and label embedding, (rows, condition width).

        Returns:
            Logits (head, rows, token), at least float32: above 0 for real.
        """
        stack = nn.vmap(
            Head, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, None), axis_size=self.heads
        )
        return stack(self.dtype, name="heads")(tokens, condition)


def _matrices(params: Params) -> dict[str, jax.Array]:
    """The kernels that are normalised, {layer: (head, inputs, out)}: a convolution's inputs are its whole window's."""
    kernels = {layer: params["heads"][layer]["kernel"] for layer in NORMALISED}
    return {layer: kernel.reshape(len(kernel), -1, kernel.shape[-1]) for layer, kernel in kernels.items()}


# a few matrices times vectors, which a TPU would otherwise round to bfloat16
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def random_vectors(params: Params, key: jax.Array) -> Vectors:
    """Unit vectors to start a `power_iteration` of a discriminator's parameters from."""
    shapes = {layer: matrix.shape for layer, matrix in _matrices(params).items()}
    keys = {layer: jax.random.split(jax.random.fold_in(key, place)) for place, layer in enumerate(shapes)}
    return {
        "u": {layer: _normalise(jax.random.normal(keys[layer][0], shape[::2])) for layer, shape in shapes.items()},
        "v": {layer: _normalise(jax.random.normal(keys[layer][1], shape[:2])) for layer, shape in shapes.items()},
    }


def _normalise(vectors: jax.Array) -> jax.Array:
    """Vectors (head, …) divided by their lengths."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def power_iteration(params: Params, vectors: Vectors, times: int = 1) -> Vectors:
    """Brings the vectors nearer to the kernels' first singular vectors: v ← Wᵀu, then u ← Wv, each of length 1.

    Args:
        params: a `Discriminator`'s.
        vectors: as they were. Fresh random ones need some 30 rounds before they serve: with unrelated vectors σ is near
            0 and may be negative.
        times: rounds.
    """
    kernels = jax.lax.stop_gradient(_matrices(params))

    def turn(_, vectors):
        v = {layer: _normalise(einsum("hio,ho->hi", kernels[layer], u)) for layer, u in vectors["u"].items()}
        return {"u": {layer: _normalise(einsum("hio,hi->ho", kernels[layer], v[layer])) for layer in v}, "v": v}

    return jax.lax.fori_loop(0, times, turn, vectors)


def spectral_norms(params: Params, vectors: Vectors) -> dict[str, jax.Array]:
    """σ = uᵀWv of every normalised kernel, {layer: (head,)}; its gradient goes through W alone."""
    u, v = (jax.lax.stop_gradient(vectors[side]) for side in ("u", "v"))
    return {
        layer: einsum("ho,ho->h", einsum("hio,hi->ho", matrix, v[layer]), u[layer])
        for layer, matrix in _matrices(params).items()
    }


def normalise_kernels(params: Params, vectors: Vectors) -> Params:
    """The parameters that a `Discriminator` is applied with: its kernels over their spectral norms."""
    heads = dict(params["heads"])
    for layer, sigma in spectral_norms(params, vectors).items():
        kernel = heads[layer]["kernel"]
        heads[layer] = heads[layer] | {"kernel": kernel / sigma.reshape(-1, *(1,) * (kernel.ndim - 1))}
    return {"heads": heads}
