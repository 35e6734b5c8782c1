"""The student: a history encoder under per-block layers (docs/METHOD.md section 4; ARD, section 3).

Its parameters are the teacher's, name by name, but for the final layer, which has a leading block axis: one head a
step. The lowest `history_layers` slices of the layer stack look across blocks, the others stay inside a block.
"""

from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from ard_jax.errors import UserError
from ard_jax.models.attention import KeysAndValues, block_attention, block_mass, cached_attention
from ard_jax.models.backbone import Backbone, Condition, Context, inputs_like, parameter_shapes, take_layers
from ard_jax.models.layers import Attend
from ard_jax.models.masks import MASKS, visible_blocks
from ard_jax.models.partition import constrain
from ard_jax.types import Params

HEADS = ("separate", "shared")


def default_block_times(steps: int, noise_time: float, data_time: float = 0.0) -> tuple[float, ...]:
    """Network time of each block, T·(S−b)/S (docs/METHOD.md section 4): 999, 749.25, 499.5, 249.75 for S = 4.

    From `noise_time` in equal steps towards `data_time`, which is 0 but for networks whose time runs the other way.
    """
    return tuple((noise_time * (steps - block) + data_time * block) / steps for block in range(steps))


class ARDStudent(nn.Module):
    """Predicts the next point of a trajectory from all points before it.

    Attributes:
        backbone: the network that it is made of, the teacher's; the student's parameters carry its names.
        steps: S, the number of blocks and of predictions.
        history_layers: N, how many of the lowest layers see earlier blocks.
        mask: which of them ("diagonal", "window", "noise_and_own", "causal").
        heads: "separate" (one final layer a step) or "shared".
        block_times: network time of each block; empty for T·(S−b)/S.
        noise_time: T, the network time of pure noise.
        data_time: the network time of data.
    """

    backbone: Backbone
    steps: int = 4
    history_layers: int = 6
    mask: str = "causal"
    heads: str = "separate"
    block_times: tuple[float, ...] = ()
    noise_time: float = 999.0
    data_time: float = 0.0

    is_student = True

    def __post_init__(self):
        depth = self.backbone.depth
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}: a student makes at least 1 step.")
        if not 0 <= self.history_layers <= depth:
            raise UserError(
                f"history_layers is {self.history_layers}, but the model has {depth} layers: "
                f"choose a number from 0 to {depth}."
            )
        if self.mask not in MASKS:
            raise UserError(f"mask is {self.mask!r}, which does not exist: choose one of {', '.join(MASKS)}.")
        if self.heads not in HEADS:
            raise UserError(f"heads is {self.heads!r}: choose one of {', '.join(HEADS)}.")
        if self.block_times and len(self.block_times) != self.steps:
            raise UserError(
                f"block_times has {len(self.block_times)} times for {self.steps} steps: give one time a step, or none."
            )
        super().__post_init__()

    def setup(self):
        nn.share_scope(self, self.backbone)

    @property
    def layers_with_history(self) -> int:
        """How many layers cross blocks: none if the mask is diagonal or there is but one block."""
        return 0 if self.mask == "diagonal" or self.steps == 1 else self.history_layers

    @property
    def stacked_heads(self) -> int:
        """How many final layers lie on a leading block axis; 0 for one that all steps share."""
        return self.steps if self.heads == "separate" else 0

    def with_backbone(self, **fields: Any) -> "ARDStudent":
        """A copy with some of the backbone's fields changed."""
        return self.clone(backbone=self.backbone.clone(**fields))

    def prepare(self, condition: Condition) -> Condition:
        """See `Backbone.prepare`."""
        return self.backbone.prepare(condition)

    def context(self, condition: Condition, images: jax.Array, blocks: slice = slice(None)) -> Context:
        """What the given blocks of every example read; condition leaves (batch, …) → batch · block rows.

        `images` (row, height, width, channel) say their sides and type.
        """
        condition = self.backbone.with_size(condition, *images.shape[1:3])
        times = (self.block_times or default_block_times(self.steps, self.noise_time, self.data_time))[blocks]
        return self.backbone.context(jnp.asarray(times, jnp.promote_types(images.dtype, jnp.float32))[None], condition)

    def head(self, h: jax.Array, context: Context, block: int) -> jax.Array:
        """Head `block`: h (batch, token, width) and that block's context → tokens (batch, token, features)."""

        def run(final_layer, h, context):
            rows = jax.tree.map(lambda leaf: constrain(leaf, "batch", *[None] * (leaf.ndim - 1)), context.rows)
            return final_layer(h, context._replace(rows=rows))

        if self.heads == "separate" and self.is_initializing():  # makes all of them, stacked on a block axis
            stack = nn.vmap(run, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
                            axis_size=self.steps)  # fmt: skip
            return stack(self.backbone.final_layer, h, context)[block]
        if self.heads == "separate":
            run = nn.map_variables(run, "params", trans_in_fn=lambda stack: take_layers(stack, block))
        return run(self.backbone.final_layer, h, context)

    def predict(self, h: jax.Array, context: Context, block: int, images: jax.Array) -> jax.Array:
        """The next point after `block`, (batch, height, width, channel); the learned variance is dropped."""
        return self.backbone.to_image(self.head(h, context, block), images)[..., : self.backbone.channels]

    def __call__(self, points: jax.Array, condition: Condition) -> jax.Array:
        """Teacher forcing: predicts every next point from the given ones.

        Args:
            points: x_T, x_{τS−1}, …, x_{τ1}: (batch, block, height, width, channel), block 0 the noise.
            condition: of the examples, leaves (batch, …).

        Returns:
            Predictions of x_{τS−1}, …, x_{τ0}, of the shape of `points`.

        Raises:
            UserError: the number of blocks is not `steps`, or what the backbone raises.
        """
        return self.read_out(*self.trunk(points, condition), points)

    def trunk(self, points: jax.Array, condition: Condition) -> tuple[jax.Array, Context]:
        """All that comes before the heads, so that a gradient can be taken at the heads alone; arguments of `__call__`.

        Returns:
            Tokens (batch, block, token, width) and their context by block, for `read_out`.
        """
        batch, steps = points.shape[:2]
        h, context = self.embed_blocks(points, condition)
        # all layers read one copy, so that their gradients are added up before the heads' are added to them
        rows, within = context.by_row(), self.backbone.attend_within_rows()
        if self.is_initializing():  # the parameters do not depend on which layers have a history
            h, _ = self.backbone.run_blocks(h, rows, within, 0, self.backbone.depth)
        else:
            history = self.layers_with_history
            h, _ = self.backbone.run_blocks(h, rows, self.attend_to_history(), 0, history)
            h, _ = self.backbone.run_blocks(h, rows, within, history, self.backbone.depth)
        return h.reshape(batch, steps, *h.shape[1:]), context

    def read_out(self, h: jax.Array, context: Context, points: jax.Array) -> jax.Array:
        """The heads' predictions from what `trunk` puts out, of the shape of `points`."""
        predictions = [
            self.predict(h[:, block], context.of_block(block), block, points[:, block]) for block in range(self.steps)
        ]
        return jnp.stack(predictions, axis=1)

    def embed_blocks(self, points: jax.Array, condition: Condition) -> tuple[jax.Array, Context]:
        """Tokens (batch · block, token, width) and their context by block; arguments as in a call."""
        batch, steps = points.shape[:2]
        if steps != self.steps:
            raise UserError(
                f"a student of {self.steps} steps was given {steps} points: its input is the noise and the "
                f"{self.steps - 1} points after it."
            )
        images = points.reshape(batch * steps, *points.shape[2:])
        return self.backbone.embed(images), self.context(condition, images)._replace(summary=None).by_block(steps)

    def attention_mass(self, points: jax.Array, condition: Condition) -> jax.Array:
        """How much of its attention each block pays to each block that it sees, layer by layer.

        Args:
            points, condition: as in a call.

        Returns:
            Means over queries and heads, (batch, layer, query block, key block), of the layers that look across blocks;
            they sum to 1 over the key blocks, and are 0 for those that are not seen.

        Raises:
            UserError: no layer does, or what a call raises.
        """
        if not self.layers_with_history:
            raise UserError("a student without history layers pays no attention to earlier blocks: ask one with some.")
        h, context = self.embed_blocks(points, condition)
        attend, mask, steps = self.attend_to_history(), self.mask, self.steps

        def attend_and_weigh(q, k, v, memory):
            output, _ = attend(q, k, v, memory)
            return output, block_mass(q, k, mask, steps)

        _, mass = self.backbone.run_blocks(
            h, context.by_row(), attend_and_weigh, 0, self.layers_with_history, differentiable=False
        )
        return mass.swapaxes(0, 1)

    def attend_to_history(self) -> Attend:
        """Each block's queries meet the keys of just the blocks that it sees; no mask over S·T tokens is formed."""
        mask, steps, backend = self.mask, self.steps, self.backbone.attention
        return lambda q, k, v, memory: (block_attention(q, k, v, mask, steps, backend), memory)

    def step(
        self, point: jax.Array, condition: Condition, cache: tuple[KeysAndValues, ...] = ()
    ) -> tuple[jax.Array, tuple[KeysAndValues, ...]]:
        """One step of the cached sampler: the block index is the number of blocks in the cache.

        Args:
            point: the newest point (the noise at first), (batch, height, width, channel).
            condition: of the examples, leaves (batch, …); a sampler hands over what `prepare` makes of it.
            cache: what the earlier steps returned, () at first: of each block the keys and values of all history
                layers, which are a leading axis.

        Returns:
            The prediction of the next point, and the cache with this block's keys and values in it.
        """
        block, history, backend = len(cache), self.layers_with_history, self.backbone.attention
        context = self.context(condition, point, slice(block, block + 1))
        seen = tuple(cache[b] for b in visible_blocks(self.mask, block)[:-1]) if history else ()

        def attend(q, k, v, earlier):
            return cached_attention(q, k, v, earlier, backend)

        run, within = self.backbone.run_blocks, self.backbone.attend_within_rows()
        h, own = run(self.backbone.embed(point), context, attend, 0, history, seen, differentiable=False)
        h, _ = run(h, context, within, history, self.backbone.depth, differentiable=False)
        return self.predict(h, context._replace(summary=None), block, point), (*cache, own)


# What learns and is sampled: a student with a history, or a backbone alone.
Network: TypeAlias = Backbone | ARDStudent


def init_from_teacher(teacher_params: Params, student: Network) -> Params:
    """The student's parameters at the start: the teacher's, with a copy of its final layer for every head.

    The stack of layers is shared with the teacher's tree, not copied.
    """
    if not student.stacked_heads:
        return dict(teacher_params)

    def repeat(leaf):
        return jnp.broadcast_to(leaf, (student.stacked_heads, *leaf.shape))

    return {**teacher_params, "final_layer": jax.tree.map(repeat, teacher_params["final_layer"])}


def network_shapes(model: Network) -> Params:
    """Shapes and types of a network's parameters, which do not depend on the size of its images."""
    shapes = parameter_shapes(model.backbone, *inputs_like(model.backbone))
    return jax.eval_shape(lambda params: init_from_teacher(params, model), shapes)
