"""What every diffusion transformer shares, whatever its blocks are and whatever it is told beside the image.

A backbone cuts images into tokens (`embed`), runs a stack of blocks over them (`run_blocks`) and reads patches out
(`head`, `to_image`). What it is told of an example is a *condition*, a pytree of arrays with a leading axis of
examples: of a class its number, of a caption its token vectors and their mask. With the network's times it becomes a
`Context`, which is all that blocks and heads read beside the tokens. `ARDStudent` is made of a backbone and knows no
more of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.errors import UserError
from ard_jax.keys import make_key
from ard_jax.models import layers
from ard_jax.models.attention import BACKENDS, attention
from ard_jax.models.partition import constrain
from ard_jax.types import Params, PyTree

# Of a batch of examples, what a network is told: a pytree whose leaves are (batch, …).
Condition = PyTree

# What the backward pass keeps of a block: everything, its matrix products, or nothing but the block's input.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Context(NamedTuple):
    """What blocks and heads read beside the tokens. A row is an image, or a block of one trajectory.

    Attributes:
        rows: a pytree of each row's own, leaves (row, …), such as the vector that modulates its tokens.
        examples: a pytree of each example's, leaves (batch, …), common to all its rows, which lie side by side; None
            where there is nothing of the kind.
        summary: time and condition as one vector, (row, width), which a discriminator compares tokens with.
        layers: of each example, what each block reads of its own, leaves (batch, layer, …), such as the keys of a
            caption; a block sees its layer's, leaves (batch, …).
    """

    rows: PyTree
    examples: PyTree = None
    summary: jax.Array | None = None
    layers: PyTree = None

    def by_block(self, steps: int) -> "Context":
        """The same with rows (batch, block, …), where they are the examples' `steps` blocks."""
        return self._replace(rows=jax.tree.map(lambda leaf: leaf.reshape(-1, steps, *leaf.shape[1:]), self.rows))

    def by_row(self) -> "Context":
        """The inverse of `by_block`."""
        return self._replace(rows=jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.rows))

    def of_block(self, block: int) -> "Context":
        """What one block of every example reads, of a context `by_block`."""
        return self._replace(rows=jax.tree.map(lambda leaf: leaf[:, block], self.rows))


class Backbone(nn.Module):
    """A diffusion transformer: (images, times, condition) → predictions.

    A subclass makes, in `setup`, `blocks` (one module (x (row, token, width), context, memory, attend) → (x, memory),
    whose parameters `run_blocks` stacks) and `final_layer` ((tokens, context) → patches), and says what a condition is.

    Attributes:
        channels: channels of an image or latent.
        patch_size: side of a patch.
        hidden_size: width of a token.
        depth: number of blocks L.
        learn_sigma: the output has a second half of channels (the learned variance, unused here).
        dtype: compute type; None takes it from the inputs and parameters. Parameters are float32.
        remat: a name in `REMAT_POLICIES`.
        unroll: lay the layers out one by one instead of in a loop (to count FLOPs; slow to compile).
        image_size: side of the images that it was made for, which only the published position table tells; the
            network takes any.
        attention: a backend in `attention.BACKENDS`.
    """

    channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    learn_sigma: bool = True
    dtype: layers.Dtype | None = None
    remat: str = "none"
    unroll: bool = False
    image_size: int | None = None
    attention: str = "auto"

    is_student = False
    num_classes = 0  # of a network that is told a class, how many there are
    frequency_shift = 0.0  # see `layers.sinusoids`
    stacked_heads = 0  # of a student, how many final layers lie on a leading axis; a backbone alone has but one

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat is {self.remat!r}: choose one of {', '.join(REMAT_POLICIES)}.")
        if self.attention not in BACKENDS:
            raise UserError(f"attention is {self.attention!r}: choose one of {', '.join(BACKENDS)}.")
        super().__post_init__()

    # ------------------------------------------------------------------------------------- what a subclass says

    @property
    def condition_shapes(self) -> PyTree:
        """Shapes and types of one example's condition, without the leading axis."""
        raise NotImplementedError

    def unconditional(self, condition: Condition) -> Condition:
        """The condition of guidance's unconditional call, of the same shapes; reads no parameters."""
        raise NotImplementedError

    def embed(self, images: jax.Array) -> jax.Array:
        """(row, height, width, channel) → tokens (row, token, width) with their positions."""
        raise NotImplementedError

    def positions(self, rows: int, columns: int) -> np.ndarray:
        """The fixed positions of a grid of patches, (token, width) float32, which published weights come with."""
        return layers.position_table(rows, columns, self.hidden_size)

    def context(self, times: jax.Array, condition: Condition) -> Context:
        """What blocks and heads read.

        Args:
            times: network times (batch, block), or (1, block) where all examples have the same; fractions allowed.
            condition: leaves (batch, …).

        Returns:
            Of batch · block rows, an example's blocks side by side.
        """
        raise NotImplementedError

    def prepare(self, condition: Condition) -> Condition:
        """What is the same of a condition at all times, computed once: `context` takes it in the condition's place."""
        return condition

    def with_size(self, condition: Condition, height: int, width: int) -> Condition:
        """The condition with what the network is told of its images' sides; nothing, for most."""
        return condition

    # --------------------------------------------------------------------------------------- what all of them do

    @property
    def backbone(self) -> "Backbone":
        """Itself; of a student, the network that it is made of."""
        return self

    def with_backbone(self, **fields: Any) -> "Backbone":
        """A copy with some of the backbone's fields changed."""
        return self.clone(**fields)

    def rematerialised(self, block: type[nn.Module]) -> type[nn.Module]:
        """A class of blocks of which the backward pass keeps what `remat` says."""
        if self.remat == "none":
            return block
        # prevent_cse: a scanned body needs no barrier against common subexpressions
        return nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False, static_argnums=(4,))

    def run_blocks(
        self,
        x: jax.Array,
        context: Context,
        attend: layers.Attend,
        first: int,
        last: int,
        memory: PyTree = None,
        differentiable: bool = True,
        every: bool = False,
    ) -> tuple[jax.Array, PyTree]:
        """Runs blocks first … last−1 in a loop over the stacked parameters.

        `memory`, and what comes back in its place, has a leading axis of last − first layers, or is None. With `every`,
        the tokens that each block puts out come back in its place.

        A loop over a part of the stack goes over a copy of that part. If no gradient is wanted, it picks each layer out
        of the whole stack instead, which saves the copy; the gradient of that would touch the whole stack in each turn.
        """
        if first == last:
            return x, memory
        own = jax.tree.map(lambda leaf: leaf[:, first:last], context.layers)
        context = context._replace(summary=None, layers=None)

        def body(block, x, context, own, memory):
            x = constrain(x, "batch", None, None)
            context = context._replace(layers=own)
            context = jax.tree.map(lambda leaf: constrain(leaf, "batch", *[None] * (leaf.ndim - 1)), context)
            x, memory = block(x, context, memory, attend)
            return x, x if every else memory

        def pick(block, x, context, own, layer_and_memory):
            layer, memory = layer_and_memory
            return nn.map_variables(body, "params", trans_in_fn=lambda stack: take_layers(stack, layer))(
                block, x, context, own, memory
            )

        length = last - first
        unroll = length if self.unroll else 1
        if not differentiable and length < self.depth:
            axes = (nn.broadcast, 1, 0)
            run = nn.scan(pick, variable_broadcast="params", in_axes=axes, length=length, unroll=unroll)
            return run(self.blocks, x, context, own, (jnp.arange(first, last), memory))
        run = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 1, 0),
            length=length,
            unroll=unroll,
        )
        if length < self.depth:
            run = nn.map_variables(run, "params", trans_in_fn=lambda stack: take_layers(stack, slice(first, last)))
        return run(self.blocks, x, context, own, memory)

    def attend_within_rows(self) -> layers.Attend:
        """Every token sees the tokens of its own row: the teacher, and the student's per-block layers."""
        backend = self.attention
        return lambda q, k, v, memory: (attention(q, k, v, backend), memory)

    def features(
        self, x: jax.Array, t: jax.Array, condition: Condition, chosen: tuple[int, ...] = ()
    ) -> tuple[jax.Array, jax.Array | None]:
        """What the blocks see in images: the discriminator's input.

        Args:
            x, t, condition: as `__call__` takes them.
            chosen: indices of blocks, in the order wanted; () for all. Blocks after the last of them are not run.

        Returns:
            The tokens that each chosen block puts out, (block, batch, token, width), and the context's summary,
            (batch, width).

        Raises:
            UserError: what `__call__` raises.
        """
        chosen = chosen or tuple(range(self.depth))
        condition = self.with_size(condition, *x.shape[1:3])
        context, last = self.context(t[:, None], condition), max(chosen) + 1
        _, tokens = self.run_blocks(self.embed(x), context, self.attend_within_rows(), 0, last, every=True)
        return (tokens if chosen == tuple(range(last)) else tokens[jnp.asarray(chosen)]), context.summary

    def head(self, h: jax.Array, context: Context) -> jax.Array:
        """Tokens after the last block (row, token, width) → patches (row, token, features)."""
        return self.final_layer(h, context)

    def to_image(self, tokens: jax.Array, images: jax.Array) -> jax.Array:
        """Patches of the head → (rows, height, width, out channel), sides as in `images`."""
        return layers.unpatchify(tokens, self.patch_size, *images.shape[1:3])

    def __call__(self, x: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
        """Predicts.

        Args:
            x: images or latents, (batch, height, width, channel).
            t: network times, (batch,), fractions allowed.
            condition: leaves (batch, …), see `condition_shapes`.

        Returns:
            (batch, height, width, channel), or twice the channels with `learn_sigma`.

        Raises:
            UserError: the sides are no multiple of the patch size, or the channels are not the model's.
        """
        context = self.context(t[:, None], self.with_size(condition, *x.shape[1:3]))
        h, _ = self.run_blocks(self.embed(x), context, self.attend_within_rows(), 0, self.depth)
        return self.to_image(self.head(h, context), x)


def check_channels(images: jax.Array, channels: int) -> None:
    """Raises UserError for images of another number of channels, (…, channel)."""
    if images.shape[-1] != channels:
        raise UserError(
            f"images of {images.shape[-1]} channels were given to a model of {channels} channels: "
            f"arrays are (batch, height, width, channel), channels last."
        )


def condition_like(
    model: Backbone, batch: int, make: Callable[[tuple[int, ...], layers.Dtype], PyTree] = jnp.zeros
) -> Condition:
    """A condition of `batch` examples, by default of zeros; `make` takes shape and type of each leaf."""
    return jax.tree.map(lambda leaf: make((batch, *leaf.shape), leaf.dtype), model.condition_shapes)


def inputs_like(model: Backbone, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Condition]:
    """Shapes of a call's arguments; parameters do not depend on the size of the images, here a single patch."""
    image = (batch, model.patch_size, model.patch_size, model.channels)
    condition = condition_like(model, batch, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(image, "float32"), jax.ShapeDtypeStruct((batch,), "float32"), condition


def take_layers(tree: PyTree, index: int | slice) -> PyTree:
    """Indexes the leading axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def parameter_shapes(model: nn.Module, *inputs: PyTree) -> Params:
    """The parameters' shapes and types, without making them."""
    return jax.eval_shape(model.init, make_key(0), *inputs)["params"]


def count_parameters(params: Params) -> int:
    """Number of trained parameters; a fixed position table is not among them."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
