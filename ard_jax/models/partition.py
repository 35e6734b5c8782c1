"""What the axes of parameters stand for, and how activations lie on the mesh that a program is traced for."""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

# What the input and the output of a module's kernel stand for; a bias has the output's.
AXES = {
    "patch_embed": ("patch", "embed"),
    "modulation": ("embed", "mlp"),
    "qkv": ("embed", "heads"),
    "attention_out": ("heads", "embed"),
    "mlp_in": ("embed", "mlp"),
    "mlp_out": ("mlp", "embed"),
    "linear": ("embed", "patch"),
    "pointwise": ("embed", "feature"),
    "windowed": ("window", "embed", "feature"),
    "logit": ("embed", "feature"),
    "condition": ("embed", "feature"),
}


STACKS = {
    "blocks": "layer",
    "final_layer": "block",
    "heads": "head",
}  # modules whose parameters may have one more axis, in front


def logical_axes(path: tuple[Any, ...], ndim: int) -> tuple[str | None, ...]:
    """What the axes of a parameter stand for, by the names that its path ends in.

    Args:
        path: of a leaf, as `jax.tree_util` gives it; an optimiser's moments have their parameter's at the end.
        ndim: axes of the leaf.

    Returns:
        A name for each axis, see `parallel.RULES`; None for all where the leaf is no such parameter.
    """
    keys = [getattr(entry, "key", None) or getattr(entry, "name", None) for entry in path]
    module = next((key for key in reversed(keys[:-1]) if key in AXES), None)
    axes = AXES.get(module, ())
    axes = axes[-1:] if keys[-1:] == ["bias"] else axes
    stack = next((STACKS[key] for key in reversed(keys) if key in STACKS), None)
    if stack and ndim == len(axes) + 1:
        axes = (stack, *axes)
    return axes if len(axes) == ndim else (None,) * ndim


def divided(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The spec, where the mesh divides an axis of the shape; else the axis stays whole."""

    def parts(axes):
        return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))

    return PartitionSpec(*(axes if size % parts(axes) == 0 else None for axes, size in zip(spec, shape, strict=True)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says how an activation lies on the mesh that the program is traced for (`parallel.on_mesh`), if there is one.

    Without it, XLA may move activations to where the parameters lie instead of gathering a layer's parameters.
    """
    if not nn.get_logical_axis_rules():
        return x
    return jax.lax.with_sharding_constraint(x, nn.logical_to_mesh_axes(axes))
