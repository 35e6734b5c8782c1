"""The student as the published PyTorch code computes it, for comparison (docs/METHOD.md section 4): a plain reference.

It differs from `ARDStudent` in what it costs, not in what comes out:
- one modulation a token, though it is the same for all tokens of a block;
- in training, one dense mask over the tokens of all blocks, in every layer;
- the sampler caches the history layers' keys and values, as `ARDStudent`'s does.

Hidden states are (batch, token, width); in training the tokens of all blocks stand in one row. Parameters are an
`ARDStudent`'s, of separate heads.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.models import ARDStudent, default_block_times, visible_blocks
from ard_jax.models.backbone import take_layers
from ard_jax.models.flops import student_macs
from ard_jax.models.layers import layer_norm, patchify, position_table, sinusoids, unpatchify


def dense(params: Any, x: jax.Array) -> jax.Array:
    """As one 2-D product, which is as good for this reference on a CPU as it is for the student."""
    return (x.reshape(-1, x.shape[-1]) @ params["kernel"] + params["bias"]).reshape(*x.shape[:-1], -1)


def modulations(params: Any, condition: jax.Array, count: int) -> list[jax.Array]:
    """Shifts, scales and gates of every token: condition (batch, token, width) → `count` of the same shape."""
    return jnp.split(dense(params["modulation"], condition), count, axis=-1)


def conditions(student: ARDStudent, params: Any, y: jax.Array, tokens: int) -> jax.Array:
    """SiLU(time of the block + label) of every token, (batch, block, token, width)."""
    times = student.block_times or default_block_times(student.steps, student.noise_time, student.data_time)
    features = sinusoids(jnp.asarray(times, jnp.float32), frequency_shift=student.backbone.frequency_shift)
    time = dense(params["time_embed"]["mlp_out"], nn.silu(dense(params["time_embed"]["mlp_in"], features)))
    both = nn.silu(time[None] + params["label_embed"]["embedding"][y][:, None])
    return jnp.repeat(both[:, :, None], tokens, axis=2)


def embed(student: ARDStudent, params: Any, images: jax.Array) -> jax.Array:
    """(rows, height, width, channel) → tokens (rows, token, width) with their positions."""
    grid = images.shape[1] // student.backbone.patch_size, images.shape[2] // student.backbone.patch_size
    tokens = dense(params["patch_embed"], patchify(images, student.backbone.patch_size))
    return tokens + position_table(*grid, student.backbone.hidden_size)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Softmax attention, (batch, token, head, head width), with a mask (query, key) or none."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), v)


def block(student: ARDStudent, params: Any, x: jax.Array, condition: jax.Array, attend: Any) -> tuple[jax.Array, Any]:
    """A layer: x and condition (batch, token, width); attend(q, k, v) → output and what is to be kept."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulations(params, condition, 6)
    h = layer_norm(x, None) * (1 + scale_a) + shift_a
    qkv = dense(params["qkv"], h).reshape(*x.shape[:2], 3, student.backbone.num_heads, -1)
    h, kept = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    x = x + gate_a * dense(params["attention_out"], h.reshape(x.shape))
    h = layer_norm(x, None, student.backbone.mlp_norm_eps) * (1 + scale_m) + shift_m
    return x + gate_m * dense(params["mlp_out"], nn.gelu(dense(params["mlp_in"], h), approximate=True)), kept


def predict(student: ARDStudent, params: Any, h: jax.Array, condition: jax.Array, step: int, shape) -> jax.Array:
    """Head `step`: tokens and conditions of one block, (batch, token, width) → the next point."""
    head = take_layers(params["final_layer"], step)
    shift, scale = modulations(head, condition, 2)
    tokens = dense(head["linear"], layer_norm(h, None) * (1 + scale) + shift)
    return unpatchify(tokens, student.backbone.patch_size, *shape[:2])[..., : student.backbone.channels]


def masks(student: ARDStudent, tokens: int) -> np.ndarray:
    """Which key each query sees, within its block and in the history layers: (2, block · token, block · token)."""
    seen = [
        [key in visible_blocks(student.mask, query) for key in range(student.steps)] for query in range(student.steps)
    ]
    blocks = np.stack([np.eye(student.steps, dtype=bool), np.array(seen)])
    return blocks.repeat(tokens, axis=1).repeat(tokens, axis=2)


def forward(student: ARDStudent, params: Any, points: jax.Array, y: jax.Array) -> jax.Array:
    """`ARDStudent.__call__`: (batch, block, height, width, channel) → predictions of the same shape."""
    batch, steps, *shape = points.shape
    h = embed(student, params, points.reshape(-1, *shape))
    tokens = h.shape[1]
    condition = conditions(student, params, y, tokens)
    flat = condition.reshape(batch, steps * tokens, -1)
    both, with_history = masks(student, tokens), np.arange(student.backbone.depth) < student.layers_with_history

    def layer(x, inputs):
        own, history = inputs
        mask = jnp.asarray(both)[history.astype(int)]
        return block(student, own, x, flat, lambda q, k, v: (attention(q, k, v, mask), None))

    h, _ = jax.lax.scan(layer, h.reshape(flat.shape), (params["blocks"], with_history))
    h = h.reshape(batch, steps, tokens, -1)
    predictions = [predict(student, params, h[:, b], condition[:, b], b, shape) for b in range(steps)]
    return jnp.stack(predictions, axis=1)


def sample(student: ARDStudent, params: Any, noise: jax.Array, y: jax.Array) -> jax.Array:
    """`sample_student`: noise (batch, height, width, channel) → (batch, step, height, width, channel)."""
    history, cache, points, x = student.layers_with_history, [], [], noise
    for step in range(student.steps):
        h = embed(student, params, x)
        condition = conditions(student, params, y, h.shape[1])[:, step]
        earlier = [cache[b] for b in visible_blocks(student.mask, step)[:-1]] if history else []

        def with_history(h, inputs, condition=condition):
            own, seen = inputs

            def attend(q, k, v):
                keys = jnp.concatenate([keys for keys, _ in seen] + [k], axis=1)
                values = jnp.concatenate([values for _, values in seen] + [v], axis=1)
                return attention(q, keys, values, None), (k, v)

            return block(student, own, h, condition, attend)

        def alone(h, own, condition=condition):
            return block(student, own, h, condition, lambda q, k, v: (attention(q, k, v, None), None))

        h, kept = jax.lax.scan(with_history, h, (take_layers(params["blocks"], slice(history)), earlier))
        h, _ = jax.lax.scan(alone, h, take_layers(params["blocks"], slice(history, None)))
        cache.append(kept)
        x = predict(student, params, h, condition, step, x.shape[1:])
        points.append(x)
    return jnp.stack(points, axis=1)


@dataclasses.dataclass(frozen=True)
class DenseStudent:
    """This forward where `ard_jax.objectives.ard` wants a student's."""

    student: ARDStudent

    def apply(self, variables: Any, points: jax.Array, y: jax.Array) -> jax.Array:
        return forward(self.student, variables["params"], points, y)


def dense_macs(student: ARDStudent, shape: tuple[int, int, int], training: bool) -> int:
    """Multiply-accumulates of one trajectory here, as `student_macs` counts the student's."""
    network = student.backbone
    tokens, width = (shape[0] // network.patch_size) * (shape[1] // network.patch_size), network.hidden_size
    modulation = (6 * network.depth + 2) * width**2 * student.steps * (tokens - 1)
    if not training:
        return student_macs(student, shape) + modulation
    within = student.clone(history_layers=0)
    attention = 2 * width * ((student.steps * tokens) ** 2 - student.steps * tokens**2)
    return student_macs(within, shape) + modulation + network.depth * attention
