"""PixArt-α and PixArt-Σ: diffusion transformers that are told a caption (arXiv 2310.00426 and 2403.04692).

One network with two sets of defaults. Time modulates all blocks by one projection (adaLN-single), to which each block
adds a table of its own; a caption's vectors are met by cross-attention. Keys and values of a caption are the same for
all times, and so for all blocks of a student: a sampler computes them once (`prepare`).
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ard_jax.errors import UserError
from ard_jax.models import layers
from ard_jax.models.attention import cross_attention
from ard_jax.models.backbone import Backbone, Context, check_channels
from ard_jax.models.layers import Attend, Dense, TimeEmbedder, layer_norm, modulate
from ard_jax.models.partition import name_axes
from ard_jax.types import Caption, PyTree

name_axes(
    cross_query=("embed", "heads"),
    cross_kv=("embed", "heads"),
    cross_out=("heads", "embed"),
    scale_shift_table=(None, None),  # a few vectors, added to a modulation that every device has whole
)

# Width, depth, heads and patch of the only published network.
XL = {"patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16, "mlp_ratio": 4.0, "caption_width": 4096}
# Name: side of its images in pixels, interpolation of positions, longest caption, whether it is told its images' size.
SIZES = {
    "PixArt-XL-2-256x256": (256, 1.0, 120, False),
    "PixArt-XL-2-512x512": (512, 1.0, 120, False),
    "PixArt-XL-2-1024-MS": (1024, 2.0, 120, True),
    "PixArt-Sigma-XL-2-256x256": (256, 0.5, 300, False),
    "PixArt-Sigma-XL-2-512-MS": (512, 1.0, 300, False),
    "PixArt-Sigma-XL-2-1024-MS": (1024, 2.0, 300, False),
    "PixArt-Sigma-XL-2-2K-MS": (2048, 4.0, 300, False),
}
LATENT_SIDE = 8  # pixels a latent, of the autoencoders of all of them
NULL_MASKS = ("own", "caption")


def size_fields(name: str) -> dict[str, int | float | bool]:
    """Fields of a published network, by the name of its folder such as "PixArt-Sigma-XL-2-1024-MS".

    Raises:
        UserError: no such network.
    """
    if name not in SIZES:
        raise UserError(
            f"name is {name!r}, which is not a published PixArt's: choose one of {', '.join(SIZES)}, or set the fields."
        )
    pixels, interpolation, length, told_size = SIZES[name]
    return XL | {
        "image_size": pixels // LATENT_SIDE,
        "interpolation": interpolation,
        "caption_length": length,
        "size_conditioning": told_size,
    }


class PreparedCaption(NamedTuple):
    """What a PixArt makes of a caption once for all times.

    Attributes:
        keys, values: of every layer, (batch, layer, token, heads, head width).
        lengths: how many tokens are the caption's own, (batch,); they come first.
        summary: of the caption as one vector, (batch, width).
        size: as in `Caption`.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    summary: jax.Array
    size: jax.Array | None = None


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to the caption and MLP; the first and last are modulated and gated.

    Attributes:
        width: of a token.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over width of the block.
        dtype: compute type; None takes it from the inputs and parameters.
        attention: a backend in `attention.BACKENDS`, for the caption; that of images is `attend`'s.
    """

    width: int
    num_heads: int
    mlp_ratio: float = 4.0
    dtype: layers.Dtype | None = None
    attention: str = "auto"

    def setup(self):
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=layers.xavier)
        self.qkv, self.attention_out = dense(3 * self.width), dense(self.width)
        self.cross_query, self.cross_kv = dense(self.width), dense(2 * self.width)
        self.cross_out = dense(self.width, kernel_init=nn.initializers.zeros)
        self.mlp_in, self.mlp_out = dense(round(self.width * self.mlp_ratio)), dense(self.width)

    def keys_and_values(self, caption: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of projected caption vectors (batch, token, width): each (batch, token, heads, head width)."""
        both = rearrange(self.cross_kv(caption), "b l (n h d) -> n b l h d", n=2, h=self.num_heads)
        return both[0], both[1]

    @nn.compact  # for the table alone: in `setup` it would be looked for before its layer is picked out of the stack
    def __call__(self, x: jax.Array, context: Context, memory: PyTree, attend: Attend) -> tuple[jax.Array, PyTree]:
        """x (row, token, width) → x of the same shape, and the memory; see `PixArt.context`."""
        table = self.param("scale_shift_table", nn.initializers.normal(self.width**-0.5), (6, self.width))
        modulation = table.astype(x.dtype) + context.rows["modulation"].astype(x.dtype)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation[:, i] for i in range(6))

        h = modulate(layer_norm(x, self.dtype), shift_a, scale_a)
        q, k, v = rearrange(self.qkv(h), "r t (n h d) -> n r t h d", n=3, h=self.num_heads)
        h, memory = attend(q, k, v, memory)
        x = x + gate_a[:, None] * self.attention_out(h.reshape(x.shape))

        caption = context.examples
        keys, values = context.layers or self.keys_and_values(caption["tokens"])
        q = rearrange(self.cross_query(x), "r t (h d) -> r t h d", h=self.num_heads)
        h = cross_attention(q, keys, values, caption["lengths"], self.attention)
        x = x + self.cross_out(h.reshape(x.shape))

        h = modulate(layer_norm(x, self.dtype), shift_m, scale_m)
        h = self.mlp_out(nn.gelu(self.mlp_in(h), approximate=True))
        return x + gate_m[:, None] * h, memory


class PixArtFinalLayer(nn.Module):
    """Shift and scale by a table and the time, then a linear map: (row, token, width) → (row, token, features)."""

    features: int
    dtype: layers.Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        width = x.shape[-1]
        table = self.param("scale_shift_table", nn.initializers.normal(width**-0.5), (2, width))
        modulation = table.astype(x.dtype) + context.rows["time"].astype(x.dtype)[:, None]
        h = modulate(layer_norm(x, self.dtype), modulation[:, 0], modulation[:, 1])
        return Dense(self.features, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="linear")(h)


class CaptionProjection(nn.Module):
    """A text encoder's vectors (batch, token, channel) → (batch, token, width): Dense, tanh-GELU, Dense."""

    width: int
    dtype: layers.Dtype | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        dense = functools.partial(Dense, self.width, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype)
        return dense(name="mlp_out")(nn.gelu(dense(name="mlp_in")(tokens), approximate=True))


class PixArt(Backbone):
    """PixArt: (images, times, captions) → predictions; a condition is a `Caption`.

    Attributes (beside those of `Backbone`; `image_size` is the side that positions are those of):
        num_heads: attention heads; must divide `hidden_size`.
        caption_width: channels of the text encoder's vectors.
        caption_length: tokens of the longest caption, which only says what shapes to expect: it takes any.
        mlp_ratio: width of the MLP over `hidden_size`.
        interpolation: positions are divided by it, see `layers.position_table`.
        size_conditioning: the network is told the images' height, width and their ratio (α at 1024 px).
        null_mask: what is not masked of the empty caption: its "own" tokens (diffusers), or as many as the caption in
            whose place it stands has (the authors).
        pixels: sides of an image over those of what the network sees, for the size that it is told.
    """

    image_size: int | None = 128
    num_heads: int = 16
    caption_width: int = 4096
    caption_length: int = 300
    mlp_ratio: float = 4.0
    interpolation: float = 2.0
    size_conditioning: bool = False
    null_mask: str = "own"
    pixels: int = LATENT_SIDE

    def __post_init__(self):
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(
                f"hidden_size {self.hidden_size} with {self.num_heads} heads does not work: "
                f"it must be a multiple of the number of heads and of 4."
            )
        if self.size_conditioning and self.hidden_size % 3:
            raise UserError(
                f"hidden_size {self.hidden_size} does not work with size_conditioning, which fills a third of it each "
                f"with height, width and their ratio: choose a multiple of 3."
            )
        if self.null_mask not in NULL_MASKS:
            raise UserError(f"null_mask is {self.null_mask!r}: choose one of {', '.join(NULL_MASKS)}.")
        if not self.interpolation > 0:
            raise UserError(f"interpolation is {self.interpolation}: give a number above 0.")
        super().__post_init__()

    def setup(self):
        normal = nn.initializers.normal(0.02)
        self.patch_embed = Dense(self.hidden_size, kernel_init=layers.xavier, dtype=self.dtype)
        self.time_embed = TimeEmbedder(self.hidden_size, dtype=self.dtype)
        if self.size_conditioning:
            self.size_embed = TimeEmbedder(self.hidden_size // 3, dtype=self.dtype)
            self.ratio_embed = TimeEmbedder(self.hidden_size // 3, dtype=self.dtype)
        self.modulation = Dense(6 * self.hidden_size, kernel_init=normal, dtype=self.dtype)
        self.caption_embed = CaptionProjection(self.hidden_size, self.dtype)
        block = self.rematerialised(PixArtBlock)
        self.blocks = block(self.hidden_size, self.num_heads, self.mlp_ratio, self.dtype, self.attention)
        out_channels = self.channels * (2 if self.learn_sigma else 1)
        self.final_layer = PixArtFinalLayer(self.patch_size**2 * out_channels, self.dtype)

    @property
    def condition_shapes(self) -> Caption:
        """A caption of the longest, beside the empty one."""
        return Caption(
            jax.ShapeDtypeStruct((self.caption_length, self.caption_width), jnp.float32),
            jax.ShapeDtypeStruct((self.caption_length,), jnp.bool_),
            jax.ShapeDtypeStruct((2, self.caption_width), jnp.float32),
        )

    def unconditional(self, condition: Caption) -> Caption:
        """The empty caption in its place, under the mask that `null_mask` says.

        Raises:
            UserError: the condition has no empty caption.
        """
        if condition.null is None:
            raise UserError(
                "guidance and caption dropout need the empty caption, and the condition has none: "
                "give Caption(tokens, mask, null)."
            )
        batch, length, _ = condition.tokens.shape
        null, given = condition.null[:, :length], condition.null.shape[1]
        padding = jnp.broadcast_to(null[:, -1:], (batch, max(length - given, 0), null.shape[-1]))
        tokens = jnp.concatenate([null, padding], axis=1).astype(condition.tokens.dtype)
        mask = condition.mask
        if self.null_mask == "own":
            own = jnp.arange(length) < max(given - 1, 1)
            mask = jnp.broadcast_to(own, mask.shape).astype(mask.dtype)
        return condition._replace(tokens=tokens, mask=mask)

    def embed(self, images: jax.Array) -> jax.Array:
        """(row, height, width, channel) → tokens (row, token, width) with their positions."""
        check_channels(images, self.channels)
        x = self.patch_embed(layers.patchify(images, self.patch_size))
        grid = images.shape[1] // self.patch_size, images.shape[2] // self.patch_size
        return x + self.positions(*grid).astype(x.dtype)

    def positions(self, rows: int, columns: int) -> np.ndarray:
        """Scaled to the grid of `image_size`, over `interpolation`."""
        base = self.image_size // self.patch_size if self.image_size else None
        return layers.position_table(rows, columns, self.hidden_size, base, self.interpolation)

    def with_size(self, condition: Caption | PreparedCaption, height: int, width: int) -> Caption | PreparedCaption:
        """With the images' sides in pixels where the network is told them and the condition does not say others."""
        if not self.size_conditioning or condition.size is not None:
            return condition
        size = jnp.asarray([[height * self.pixels, width * self.pixels]], jnp.float32)
        batch = condition[0].shape[0]
        return condition._replace(size=jnp.broadcast_to(size, (batch, 2)))

    def prepare(self, condition: Caption | PreparedCaption) -> PreparedCaption:
        """Keys and values of every layer, once for all times and all blocks of a student."""
        if isinstance(condition, PreparedCaption):
            return condition
        tokens, lengths = self._project(condition)

        def read(block, tokens, _):
            return tokens, block.keys_and_values(tokens)

        scan = nn.scan(
            read, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, out_axes=1,
            length=self.depth, unroll=self.depth if self.unroll else 1,
        )  # fmt: skip
        _, (keys, values) = scan(self.blocks, tokens, None)
        return PreparedCaption(keys, values, lengths, _mean(tokens, lengths), condition.size)

    def _project(self, condition: Caption) -> tuple[jax.Array, jax.Array]:
        """The vectors that the blocks read, (batch, token, width), the caption's own first, and how many those are."""
        tokens, mask = condition.tokens, condition.mask != 0
        _check_caption(tokens, mask, self.caption_width)
        order = jnp.argsort(~mask, axis=1, stable=True)  # usually as they are; attention does not see the order
        tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
        return self.caption_embed(tokens), mask.sum(axis=1)

    def context(self, times: jax.Array, condition: Caption | PreparedCaption) -> Context:
        """A row's modulation (row, 6, width), its time as the head reads it (row, width), and its example's caption."""
        time = self.time_embed(times.reshape(-1)).reshape(*times.shape, -1)
        if self.size_conditioning:
            size = condition.size
            assert size is not None  # `with_size` comes first
            sides = self.size_embed(size.reshape(-1)).reshape(size.shape[0], -1)
            time = time + jnp.concatenate([sides, self.ratio_embed(size[:, 0] / size[:, 1])], axis=-1)[:, None]
        modulation = self.modulation(nn.silu(time)).reshape(*time.shape[:-1], 6, -1)
        batch = condition[0].shape[0]

        def by_row(x):
            return jnp.broadcast_to(x, (batch, *x.shape[1:])).reshape(-1, *x.shape[2:])

        rows = {"modulation": by_row(modulation), "time": by_row(time)}
        if isinstance(condition, PreparedCaption):
            examples = {"lengths": condition.lengths}
            told, own = condition.summary, (condition.keys, condition.values)
        else:
            tokens, lengths = self._project(condition)
            examples, told, own = {"tokens": tokens, "lengths": lengths}, _mean(tokens, lengths), None
        summary = by_row(time + told[:, None])
        return Context(rows, examples, summary, own)


def _mean(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Of a caption's own vectors: (batch, token, width) → (batch, width)."""
    is_own = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return (tokens * is_own[..., None]).sum(axis=1) / lengths[:, None].astype(tokens.dtype)


def _check_caption(tokens: jax.Array, mask: jax.Array, width: int) -> None:
    """Raises UserError for vectors of another encoder, and for a caption of no tokens where that can be seen."""
    if tokens.ndim != 3 or tokens.shape[-1] != width or mask.shape != tokens.shape[:2]:
        raise UserError(
            f"captions are tokens {tuple(tokens.shape)} with a mask {tuple(mask.shape)}, but (batch, token, {width}) "
            f"and (batch, token) were expected: encode them with the text encoder that this network was trained with."
        )
    if not isinstance(mask, jax.core.Tracer) and not np.asarray(mask).any(axis=1).all():
        raise UserError("a caption's mask is all zeros: even the empty caption has a token, its end.")
