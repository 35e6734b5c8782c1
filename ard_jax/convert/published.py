"""Published PyTorch names (the DiT repository's, the ARD repository's) ↔ our parameter trees.

PyTorch's Linear weights are (out, in), ours (in, out); its patch convolution is (D, C, p, p), ours a matrix over
patches in the order (row, column, channel); our layers are stacked.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, DiT
from ard_jax.models.layers import position_table

BLOCK_NAMES = {  # ours: published
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "attention_out": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
# What tells the sizes, and how many axes each has.
NEEDED = {"x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2, "final_layer.linear.weight": 2}
FINAL_NAMES = {"modulation": "adaLN_modulation.1", "linear": "linear"}


def from_torch(
    state_dict: Mapping[str, np.ndarray], *, num_heads: int, history_layers: int = 6, **fields: Any
) -> tuple[DiT | ARDStudent, Any]:
    """Builds the model that a published state dict belongs to.

    Args:
        state_dict: published names to NumPy arrays.
        num_heads: attention heads, which no shape tells.
        history_layers: N, for a student.
        fields: further fields of the model, such as `mask` or `dtype`.

    Returns:
        A `DiT`, or an `ARDStudent` when `final_layer2`, … are there (S = number of heads), and its parameters. The
        sizes come from the shapes; types are kept.

    Raises:
        UserError: names are missing or unexpected, shapes do not fit, or the position table is not the fixed one.
    """
    shapes = {name: np.shape(array) for name, array in state_dict.items()}
    for name, axes in NEEDED.items():
        if name not in shapes:
            raise UserError(f"the state dict has no {name!r}, so it is not a DiT's: give one with the published names.")
        if len(shapes[name]) != axes:
            raise UserError(
                f"the state dict's {name!r} has shape {shapes[name]} where a DiT's has {axes} axes: "
                f"give one with the published names and shapes."
            )
    width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    depth = 1 + highest(shapes, r"blocks\.(\d+)\.", none=-1)
    steps = highest(shapes, r"final_layer(\d+)\.", none=1)
    fields = {
        "channels": channels,
        "patch_size": patch_size,
        "hidden_size": width,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "mlp_ratio": shapes.get("blocks.0.mlp.fc1.weight", (4 * width,))[0] / width,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * channels * patch_size**2,
        **fields,
    }
    if steps > 1:
        model = ARDStudent(steps=steps, history_layers=history_layers, **fields)
    else:
        model = DiT(**fields)
    check_names(shapes, expected_shapes(model))
    check_position_table(np.asarray(state_dict["pos_embed"]), width)
    return model, build_tree(state_dict, depth, steps)


def highest(names: Iterable[str], pattern: str, none: int) -> int:
    """The highest number in names that start with `pattern`, so that a gap below it shows as missing names."""
    return max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=none)


def build_tree(state_dict: Mapping[str, np.ndarray], depth: int, steps: int) -> Any:
    def dense(name):
        return {"kernel": state_dict[f"{name}.weight"].T, "bias": state_dict[f"{name}.bias"]}

    def stack(trees):
        return {key: np.stack([tree[key] for tree in trees]) for key in trees[0]}

    patches = state_dict["x_embedder.proj.weight"]
    heads = ["final_layer"] + [f"final_layer{b}" for b in range(2, steps + 1)]
    tree = {
        "patch_embed": {
            "kernel": patches.transpose(2, 3, 1, 0).reshape(-1, patches.shape[0]),
            "bias": state_dict["x_embedder.proj.bias"],
        },
        "time_embed": {"mlp_in": dense("t_embedder.mlp.0"), "mlp_out": dense("t_embedder.mlp.2")},
        "label_embed": {"embedding": state_dict["y_embedder.embedding_table.weight"]},
        "blocks": {
            ours: stack([dense(f"blocks.{layer}.{theirs}") for layer in range(depth)])
            for ours, theirs in BLOCK_NAMES.items()
        },
        "final_layer": {
            ours: stack([dense(f"{head}.{theirs}") for head in heads]) if steps > 1 else dense(f"final_layer.{theirs}")
            for ours, theirs in FINAL_NAMES.items()
        },
    }
    return jnp_tree(tree)


def jnp_tree(tree: Any) -> Any:
    return {key: jnp_tree(value) if isinstance(value, dict) else jnp.asarray(value) for key, value in tree.items()}


def expected_shapes(model: DiT) -> dict[str, tuple[int, ...] | None]:
    """Published names and shapes of a model; None where any shape will do (the position table's length)."""
    width, hidden = model.hidden_size, round(model.hidden_size * model.mlp_ratio)
    out = model.patch_size**2 * model.channels * (2 if model.learn_sigma else 1)
    dense = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for layer in range(model.depth):
        sizes = {
            "modulation": (6 * width, width),
            "qkv": (3 * width, width),
            "attention_out": (width, width),
            "mlp_in": (hidden, width),
            "mlp_out": (width, hidden),
        }
        dense |= {f"blocks.{layer}.{BLOCK_NAMES[name]}": shape for name, shape in sizes.items()}
    steps = model.steps if isinstance(model, ARDStudent) else 1
    for head in ["final_layer"] + [f"final_layer{b}" for b in range(2, steps + 1)]:
        dense |= {f"{head}.adaLN_modulation.1": (2 * width, width), f"{head}.linear": (out, width)}
    shapes: dict[str, tuple[int, ...] | None] = {
        "pos_embed": None,
        "x_embedder.proj.weight": (width, model.channels, model.patch_size, model.patch_size),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (model.num_classes + 1, width),
    }
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def check_names(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...] | None]) -> None:
    """Raises UserError with the first few missing, unexpected and misshapen names."""
    misshapen = [n for n, s in expected.items() if n in found and s is not None and found[n] != s]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [f"{n} {found[n]} instead of {expected[n]}" for n in misshapen],
    }
    said = [
        f"{kind}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if said:
        raise UserError(
            f"the state dict does not fit the architecture that its shapes suggest ({'; '.join(said)}): "
            f"give a state dict with the published DiT or ARD names."
        )


def check_position_table(table: np.ndarray, width: int) -> None:
    side = round((table.size / width) ** 0.5)
    fixed = position_table(side, side, width)
    if table.shape != (1, *fixed.shape) or not np.allclose(table[0], fixed, rtol=0, atol=1e-6):
        raise UserError(
            f"the state dict's pos_embed {tuple(table.shape)} is not the fixed sin-cos table of a square grid: "
            f"only DiTs with the published table can be used."
        )
