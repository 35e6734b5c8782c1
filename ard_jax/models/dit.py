"""The teacher: a class-conditional diffusion transformer (DiT, Peebles and Xie 2023, arXiv 2212.09748).

The same backbone serves noise-predicting (VP) and velocity (flow-matching) teachers: what the output means is the
business of `ard_jax.diffusion`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ard_jax.errors import UserError
from ard_jax.models import layers
from ard_jax.models.attention import BACKENDS, attend_within_rows
from ard_jax.models.layers import Attend, Dense, DiTBlock, Dtype, FinalLayer, TimeEmbedder

# Name: width, depth, heads (DiT, table 1); the published names add "/2", "/4" or "/8", the patch size.
SIZES = {"DiT-S": (384, 12, 6), "DiT-B": (768, 12, 12), "DiT-L": (1024, 24, 16), "DiT-XL": (1152, 28, 16)}
PATCH_SIZES = (2, 4, 8)

# What the backward pass keeps of a block: everything, its matrix products, or nothing but the block's input.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def size_fields(name: str) -> dict[str, int]:
    """Fields of a published size: "DiT-XL/2" → {"patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16}.

    Raises:
        UserError: no such size.
    """
    size, _, patch = name.partition("/")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        known = ", ".join(f"{size}/{patch}" for size in SIZES for patch in PATCH_SIZES)
        raise UserError(f"model name {name!r} is not a published size: choose one of {known}, or set the fields.")
    width, depth, heads = SIZES[size]
    return {"patch_size": int(patch), "hidden_size": width, "depth": depth, "num_heads": heads}


class DiT(nn.Module):
    """DiT: (images, times, labels) → predictions.

    Attributes:
        channels: channels of an image or latent.
        patch_size: side of a patch.
        hidden_size: width of a token.
        depth: number of blocks L.
        num_heads: attention heads; must divide `hidden_size`.
        num_classes: classes; index `num_classes` is the null class of classifier-free guidance.
        mlp_ratio: width of the MLP over `hidden_size`.
        learn_sigma: the output has a second half of channels (the learned variance, unused here).
        label_init_std: standard deviation of the label table at initialisation.
        time_init_std: the same for the timestep MLP.
        dtype: compute type; None takes it from the inputs and parameters. Parameters are float32.
        remat: a name in `REMAT_POLICIES`.
        unroll: lay the layers out one by one instead of in a loop (to count FLOPs; slow to compile).
        frequency_shift: see `layers.sinusoids`; 0 as published, 1 in diffusers' DiT.
        mlp_norm_eps: eps of the layer norm before the MLP; 1e-6 as published, 1e-5 in diffusers' DiT.
        image_size: side of the images that it was made for, which only the published position table tells; the
            network takes any.
        attention: a backend in `attention.BACKENDS`.
    """

    channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    learn_sigma: bool = True
    label_init_std: float = 0.02
    time_init_std: float = 0.02
    dtype: Dtype | None = None
    remat: str = "none"
    unroll: bool = False
    frequency_shift: float = 0.0
    mlp_norm_eps: float = 1e-6
    image_size: int | None = None
    attention: str = "auto"

    def __post_init__(self):
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(
                f"hidden_size {self.hidden_size} with {self.num_heads} heads does not work: "
                f"it must be a multiple of the number of heads and of 4."
            )
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat is {self.remat!r}: choose one of {', '.join(REMAT_POLICIES)}.")
        if self.attention not in BACKENDS:
            raise UserError(f"model.attention is {self.attention!r}: choose one of {', '.join(BACKENDS)}.")
        super().__post_init__()

    def setup(self):
        self.patch_embed = Dense(self.hidden_size, kernel_init=layers.xavier, dtype=self.dtype)
        self.time_embed = TimeEmbedder(self.hidden_size, self.time_init_std, self.dtype, self.frequency_shift)
        self.label_embed = nn.Embed(
            self.num_classes + 1,
            self.hidden_size,
            embedding_init=nn.initializers.normal(self.label_init_std),
            dtype=self.dtype,
        )
        block = DiTBlock
        if self.remat != "none":  # prevent_cse: a scanned body needs no barrier against common subexpressions
            policy = REMAT_POLICIES[self.remat]
            block = nn.remat(DiTBlock, policy=policy, prevent_cse=False, static_argnums=(4,))
        self.blocks = block(self.num_heads, self.mlp_ratio, self.dtype, self.mlp_norm_eps)
        out_channels = self.channels * (2 if self.learn_sigma else 1)
        self.final_layer = FinalLayer(self.patch_size**2 * out_channels, self.dtype)

    def embed(self, images: jax.Array) -> jax.Array:
        """(rows, height, width, channel) → tokens (rows, token, width) with their positions."""
        if images.shape[-1] != self.channels:
            raise UserError(
                f"images of {images.shape[-1]} channels were given to a model of {self.channels} channels: "
                f"arrays are (batch, height, width, channel), channels last."
            )
        x = self.patch_embed(layers.patchify(images, self.patch_size))
        grid = images.shape[1] // self.patch_size, images.shape[2] // self.patch_size
        return x + layers.position_table(*grid, self.hidden_size).astype(x.dtype)

    def run_blocks(
        self,
        x: jax.Array,
        condition: jax.Array,
        attend: Attend,
        first: int,
        last: int,
        memory: Any = None,
        differentiable: bool = True,
        every: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Runs blocks first … last−1 in a loop over the stacked parameters.

        `memory`, and what comes back in its place, has a leading axis of last − first layers, or is None. With `every`,
        the tokens that each block puts out come back in its place.

        A loop over a part of the stack goes over a copy of that part. If no gradient is wanted, it picks each layer out
        of the whole stack instead, which saves the copy; the gradient of that would touch the whole stack in each turn.
        """
        if first == last:
            return x, memory

        def body(block, x, condition, memory):
            x = layers.constrain(x, "batch", None, None)
            x, memory = block(x, layers.constrain(condition, "batch", None), memory, attend)
            return x, x if every else memory

        def pick(block, x, condition, layer_and_memory):
            layer, memory = layer_and_memory
            return nn.map_variables(body, "params", trans_in_fn=lambda stack: take(stack, layer))(
                block, x, condition, memory
            )

        length = last - first
        unroll = length if self.unroll else 1
        if not differentiable and length < self.depth:
            run = nn.scan(pick, variable_broadcast="params", in_axes=(nn.broadcast, 0), length=length, unroll=unroll)
            return run(self.blocks, x, condition, (jnp.arange(first, last), memory))
        run = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=length,
            unroll=unroll,
        )
        if length < self.depth:
            run = nn.map_variables(run, "params", trans_in_fn=lambda stack: take(stack, slice(first, last)))
        return run(self.blocks, x, condition, memory)

    def features(
        self, x: jax.Array, t: jax.Array, y: jax.Array, chosen: tuple[int, ...] = ()
    ) -> tuple[jax.Array, jax.Array]:
        """What the blocks see in images: the discriminator's input.

        Args:
            x, t, y: as `__call__` takes them.
            chosen: indices of blocks, in the order wanted; () for all. Blocks after the last of them are not run.

        Returns:
            The tokens that each chosen block puts out, (block, batch, token, width), and the sum of the time and label
            embeddings, (batch, width).

        Raises:
            UserError: what `__call__` raises.
        """
        chosen = chosen or tuple(range(self.depth))
        condition = self.time_embed(t) + self.label_embed(y)
        last = max(chosen) + 1
        _, tokens = self.run_blocks(self.embed(x), nn.silu(condition), self.attend_within_rows, 0, last, every=True)
        return (tokens if chosen == tuple(range(last)) else tokens[jnp.asarray(chosen)]), condition

    def attend_within_rows(
        self, q: jax.Array, k: jax.Array, v: jax.Array, memory: None = None
    ) -> tuple[jax.Array, None]:
        """See `attention.attend_within_rows`."""
        return attend_within_rows(q, k, v, memory, backend=self.attention)

    def to_image(self, tokens: jax.Array, images: jax.Array) -> jax.Array:
        """Tokens of the final layer → (rows, height, width, out channel), sides as in `images`."""
        return layers.unpatchify(tokens, self.patch_size, *images.shape[1:3])

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        """Predicts.

        Args:
            x: images or latents, (batch, height, width, channel).
            t: network times, (batch,), fractions allowed.
            y: labels, (batch,), `num_classes` being the null class.

        Returns:
            (batch, height, width, channel), or twice the channels with `learn_sigma`.

        Raises:
            UserError: the sides are no multiple of the patch size, or the channels are not the model's.
        """
        condition = nn.silu(self.time_embed(t) + self.label_embed(y))
        h, _ = self.run_blocks(self.embed(x), condition, self.attend_within_rows, 0, self.depth)
        return self.to_image(self.final_layer(h, condition), x)


def take(tree: Any, index: int | slice) -> Any:
    """Indexes the leading axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def parameter_shapes(model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Any:
    """The parameters' shapes and types, without making them."""
    return jax.eval_shape(functools.partial(model.init, jax.random.key(0)), *inputs)["params"]


def count_parameters(params: Any) -> int:
    """Number of trained parameters; the fixed position table is not among them."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
