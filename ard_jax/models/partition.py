"""What the axes of parameters stand for, and how activations lie on the mesh that a program is traced for."""

import math

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ard_jax.errors import UserError

STACKS = {
    "blocks": "layer",
    "final_layer": "block",
    "heads": "head",
}  # modules whose parameters may have one more axis, in front
VECTORS = ("bias", "scale")  # Flax's names of vectors, which lie whole where nobody named their module
_AXES: dict[str, tuple[str | None, ...]] = {}  # a module's or a parameter's name → what its axes stand for


def name_axes(**axes: tuple[str | None, ...]) -> None:
    """Says what the axes of parameters stand for; each file of `models/` says it of its own, as it is imported.

    Args:
        axes: by the name of a module, (input, output) of its kernel, of which a bias has the output's; or by the name
            of a parameter. An axis is one of `parallel.RULES`, or any other word or None for one that lies whole.

    Raises:
        ValueError: the name stands for other axes already.
    """
    for name, names in axes.items():
        if _AXES.setdefault(name, names) != names:
            raise ValueError(f"{name} has the axes {_AXES[name]} already: give the module of {names} another name.")


def logical_axes(path: tuple[jax.tree_util.KeyEntry, ...], ndim: int) -> tuple[str | None, ...]:
    """What the axes of a parameter stand for, by the names that its path ends in.

    Args:
        path: of a leaf, as `jax.tree_util` gives it; an optimiser's moments have their parameter's at the end.
        ndim: axes of the leaf.

    Returns:
        A name for each axis, see `parallel.RULES`; None for all of a vector's, and of a moment of another shape than
        its parameter's.

    Raises:
        UserError: it is a matrix, or a stack of anything, that `name_axes` was not told of.
    """
    keys = [getattr(entry, "key", None) or getattr(entry, "name", None) for entry in path]
    name = next((key for key in (*keys[-2:-1], *keys[-1:]) if key in _AXES), None)  # its module's, or its own
    if name is None and ndim > 1 and keys[-1] not in VECTORS:
        raise UserError(
            f"nothing says what the {ndim} axes of the parameter {'/'.join(map(str, keys))} stand for, so it would lie "
            f"whole on every device: name them beside its module, with models.partition.name_axes."
        )
    axes = _AXES[name] if name else ()
    axes = axes[-1:] if keys[-1:] == ["bias"] else axes
    stack = next((STACKS[key] for key in reversed(keys) if key in STACKS), None)
    if stack and ndim == len(axes) + 1:
        axes = (stack, *axes)
    return axes if len(axes) == ndim else (None,) * ndim


def divisible_spec(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
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
