"""CLIP (Radford et al. 2021, arXiv 2103.00020): images and texts → vectors of one space.

The reference is transformers' `CLIPModel`. It is an instrument of measurement, not a part of a training: all its matrix
products are in the full precision of their type, so that a TPU or GPU gives the scores that a CPU gives.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ard_jax.errors import UserError
from ard_jax.models.backbone import check_channels
from ard_jax.models.layers import Dense, Dtype, patchify
from ard_jax.models.partition import constrain, name_axes

name_axes(
    token_embed=("vocabulary", "embed"),
    positions=("token", "embed"),
    query=("embed", "heads"),
    key=("embed", "heads"),
    value=("embed", "heads"),
    projection=("embed", "projection"),
)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · σ(1.702 x), the GELU that OpenAI's weights were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


# By transformers' names; weights of one are worthless with the other, and nothing in them tells which it is.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(nn.gelu, approximate=False),
}
PRECISION = jax.lax.Precision.HIGHEST
FIRST_LOGIT_SCALE = math.log(1 / 0.07)  # before training (section 2.5)


@dataclasses.dataclass(frozen=True)
class Tower:
    """The sizes of one of the two transformers.

    Attributes:
        width: of a token.
        depth: number of blocks.
        num_heads: attention heads; must divide `width`.
        mlp_width: of the MLP.
        activation: of the MLP, a name in `ACTIVATIONS`.
        eps: of the layer norms.

    Raises:
        UserError: `width` is no multiple of `num_heads`, or there is no such activation.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self):
        if self.num_heads < 1 or self.width % self.num_heads:
            raise UserError(
                f"width {self.width} with {self.num_heads} heads does not work: "
                f"it must be a multiple of the number of heads."
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"activation is {self.activation!r}, which no CLIP has: choose one of {', '.join(ACTIVATIONS)}."
            )


# Name: vision tower, text tower (Radford et al. 2021, table 20; OpenCLIP's model configs), projection. A tower's MLP is
# four times its width, but in bigG's vision tower.
SIZES = {
    "ViT-B/32": ((768, 12, 12, 3072), (512, 12, 8, 2048), 512),
    "ViT-L/14": ((1024, 24, 16, 4096), (768, 12, 12, 3072), 768),
    "ViT-H/14": ((1280, 32, 16, 5120), (1024, 24, 16, 4096), 1024),
    "ViT-bigG/14": ((1664, 48, 16, 8192), (1280, 32, 20, 5120), 1280),
}


def clip_fields(name: str, activation: str) -> dict[str, Any]:
    """Fields of a published size, such as "ViT-L/14": OpenAI's with "quick_gelu", LAION's with "gelu".

    Raises:
        UserError: no such size, or no such activation.
    """
    if name not in SIZES:
        raise UserError(f"name is {name!r}, which is not a published CLIP: choose one of {', '.join(SIZES)}.")
    vision, text, projection = SIZES[name]
    return {
        "vision": Tower(*vision, activation),
        "text": Tower(*text, activation),
        "projection": projection,
        "patch_size": int(name.partition("/")[2]),
    }


def _norm(eps: float, dtype: Dtype | None, name: str | None = None) -> nn.LayerNorm:
    """Layer norm whose statistics are at least float32 whatever `dtype` is."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class Block(nn.Module):
    """Self-attention and an MLP, each after a layer norm and added to what it read."""

    tower: Tower
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, None]:
        """x (batch, token, width), bias of the logits (batch, 1, query, key) or None → x of the same shape."""
        x = constrain(x, "batch", None, None)
        tower = self.tower
        dense = functools.partial(Dense, dtype=self.dtype, precision=PRECISION)
        at_least_float32 = jnp.promote_types(x.dtype, jnp.float32)

        h = _norm(tower.eps, self.dtype, "attention_norm")(x)
        q, k, v = (
            dense(tower.width, name=name)(h).reshape(*h.shape[:2], tower.num_heads, -1).swapaxes(1, 2)
            for name in ("query", "key", "value")
        )
        q = q * q.shape[-1] ** -0.5
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=at_least_float32, precision=PRECISION)
        weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1).astype(v.dtype)
        h = jnp.einsum("bhqk,bhkd->bhqd", weights, v, precision=PRECISION).swapaxes(1, 2).reshape(x.shape)
        x = x + dense(tower.width, name="attention_out")(h)

        h = _norm(tower.eps, self.dtype, "mlp_norm")(x)
        h = ACTIVATIONS[tower.activation](dense(tower.mlp_width, name="mlp_in")(h))
        return x + dense(tower.width, name="mlp_out")(h), None


class _Encoder(nn.Module):
    """What the two encoders share.

    Attributes:
        tower: sizes.
        projection: width of the vectors that come out.
        dtype: compute type.
    """

    tower: Tower
    projection: int
    dtype: Dtype | None = None

    def run(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        """All blocks, stacked: (batch, token, width) → the same."""
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.tower.depth,
        )
        x, _ = blocks(self.tower, self.dtype, name="blocks")(x, bias)
        return x

    def place(self, x: jax.Array, count: int) -> jax.Array:
        """x (batch, token, width) with its learned positions, of which there are `count`."""
        table = self.param("positions", nn.initializers.normal(0.01), (count, self.tower.width))
        return x + table[: x.shape[1]].astype(x.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """(batch, width), of the token that stands for all → (batch, projection)."""
        x = _norm(self.tower.eps, self.dtype, "final_norm")(x)
        return Dense(self.projection, use_bias=False, dtype=self.dtype, precision=PRECISION, name="projection")(x)


class ImageEncoder(_Encoder):
    """Images (batch, height, width, channel) → (batch, projection), by a class token before the patches."""

    patch_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        # rows and columns that fill no patch are left out, as by the convolution of the reference
        height, width = (side // self.patch_size * self.patch_size for side in images.shape[1:3])
        patches = patchify(images[:, :height, :width], self.patch_size)
        embed = Dense(self.tower.width, use_bias=False, dtype=self.dtype, precision=PRECISION, name="patch_embed")
        x = embed(patches)
        first = self.param("class_embed", nn.initializers.normal(self.tower.width**-0.5), (self.tower.width,))
        first = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1)
        x = _norm(self.tower.eps, self.dtype, "first_norm")(self.place(x, x.shape[1]))
        return self.project(self.run(x, None)[:, 0])


class TextEncoder(_Encoder):
    """Token ids and their mask (batch, token) → (batch, projection), by the end of the text."""

    vocabulary: int = 49_408
    length: int = 77
    end: int | None = None

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.tower.width, dtype=self.dtype, name="token_embed")(ids)
        x = self.place(x, self.length)
        tokens = jnp.arange(x.shape[1])
        seen = (tokens <= tokens[:, None]) & (mask != 0)[:, None, None]
        hidden = jnp.finfo(jnp.promote_types(x.dtype, jnp.float32)).min / 2  # finite, so that no row of padding is NaN
        x = self.run(x, jnp.where(seen, 0, hidden))
        place = jnp.argmax(ids if self.end is None else ids == self.end, axis=-1)  # the first, of several
        # before the norm, which is each token's own
        return self.project(jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0])


class CLIP(nn.Module):
    """CLIP; the defaults are OpenAI's ViT-B/32, see `clip_fields` for others.

    Attributes:
        vision, text: sizes of the towers.
        projection: width of the vectors.
        image_size: side of the images, in pixels.
        patch_size: side of a patch.
        channels: of the images.
        vocabulary: number of token ids.
        length: most tokens of a text.
        end: id of the token whose first place in a text stands for it; None for the highest id that is there, which is
            the end's in CLIP's own vocabulary (transformers does so where `eos_token_id` is 2).
        dtype: compute type; None takes it from the inputs and parameters.
    """

    vision: Tower = Tower(*SIZES["ViT-B/32"][0])
    text: Tower = Tower(*SIZES["ViT-B/32"][1])
    projection: int = 512
    image_size: int = 224
    patch_size: int = 32
    channels: int = 3
    vocabulary: int = 49_408
    length: int = 77
    end: int | None = None
    dtype: Dtype | None = None

    def __post_init__(self):
        if self.patch_size > self.image_size:
            raise UserError(
                f"patch_size is {self.patch_size}, more than the {self.image_size} pixels of an image's side: "
                f"choose a smaller one."
            )
        super().__post_init__()

    def setup(self):
        self.image_encoder = ImageEncoder(self.vision, self.projection, self.dtype, self.patch_size)
        self.text_encoder = TextEncoder(self.text, self.projection, self.dtype, self.vocabulary, self.length, self.end)
        # ln of what cosines are multiplied by; nothing here reads it, but PickScore is a multiple of its exponential
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(FIRST_LOGIT_SCALE), ())

    def __call__(self, images: jax.Array, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both vectors, see `encode_image` and `encode_text`; `init` makes all parameters through it."""
        return self.encode_image(images), self.encode_text(ids, mask)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Images (batch, height, width, channel), normalised → their vectors (batch, projection), of any length.

        Raises:
            UserError: the sides are not `image_size`, or the channels not the model's.
        """
        check_channels(images, self.channels)
        if images.shape[1:3] != (self.image_size, self.image_size):
            height, width = images.shape[1:3]
            raise UserError(
                f"images of {height}×{width} were given to a CLIP of {self.image_size}×{self.image_size}: "
                f"resize them, as evaluation.images_for_clip does."
            )
        return self.image_encoder(images)

    def encode_text(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Texts → their vectors (batch, projection), of any length.

        Args:
            ids: token ids, int (batch, token), the end's among them.
            mask: which of them are the text's own, (batch, token), bool or 0 and 1. What follows the end never counts,
                whatever the mask says of it.

        Raises:
            UserError: there are more tokens than `length`, or the mask has another shape.
        """
        if ids.shape[1] > self.length:
            raise UserError(
                f"texts of {ids.shape[1]} tokens were given to a CLIP of {self.length}: "
                f"cut them, as text.tokens_for_clip does."
            )
        if ids.shape != mask.shape:
            raise UserError(
                f"the ids have shape {ids.shape} and their mask {mask.shape}, but both must be (batch, token)."
            )
        return self.text_encoder(ids, mask)
