import jax
import numpy as np
import pytest

from ard_jax.convert import from_torch
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, DiT, parameter_shapes
from ard_jax.models.layers import position_table


def state_dict(width=8, channels=3, patch=2, depth=2, classes=5, hidden=20, out=6, heads=2, side=3, dtype=np.float32):
    """A state dict with the published names, random but for the position table."""
    rng = np.random.default_rng(0)
    shapes = {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
    }
    dense = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for layer in range(depth):
        dense |= {
            f"blocks.{layer}.attn.qkv": (3 * width, width),
            f"blocks.{layer}.attn.proj": (width, width),
            f"blocks.{layer}.mlp.fc1": (hidden, width),
            f"blocks.{layer}.mlp.fc2": (width, hidden),
            f"blocks.{layer}.adaLN_modulation.1": (6 * width, width),
        }
    for head in range(1, heads + 1):
        name = "final_layer" if head == 1 else f"final_layer{head}"
        dense |= {f"{name}.linear": (patch**2 * out, width), f"{name}.adaLN_modulation.1": (2 * width, width)}
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return {"pos_embed": position_table(side, side, width)[None]} | arrays


def test_sizes_come_from_the_shapes():
    model, params = from_torch(state_dict(), num_heads=4, history_layers=1, mask="window", remat="full")
    assert type(model) is ARDStudent
    fields = ("channels", "patch_size", "hidden_size", "depth", "num_heads", "num_classes", "mlp_ratio", "learn_sigma")
    assert [getattr(model, name) for name in fields] == [3, 2, 8, 2, 4, 5, 2.5, True]
    assert (model.steps, model.history_layers, model.mask, model.remat) == (2, 1, "window", "full")
    expected = parameter_shapes(model, np.zeros((1, 2, 4, 4, 3), np.float32), np.zeros(1, np.int32))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)

    model, params = from_torch(
        state_dict(heads=1, out=1, channels=1, patch=4, depth=3, hidden=61, width=28, dtype=np.float16), num_heads=2
    )
    assert type(model) is DiT
    assert [getattr(model, name) for name in fields[:-2]] == [1, 4, 28, 3, 2, 5] and not model.learn_sigma
    expected = parameter_shapes(model, *(np.zeros(s, np.float32) for s in ((1, 8, 8, 1), 1)), np.zeros(1, np.int32))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)  # int(28 · (61/28)) is 60
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float16"}


def test_every_array_finds_its_place():
    given = state_dict(heads=3)
    _, params = from_torch(given, num_heads=2, history_layers=0)
    patch = given["x_embedder.proj.weight"][5, 2, 0, 1]  # of width 5, channel 2, row 0, column 1
    assert params["patch_embed"]["kernel"][(0 * 2 + 1) * 3 + 2, 5] == patch
    np.testing.assert_array_equal(params["blocks"]["qkv"]["kernel"][1], given["blocks.1.attn.qkv.weight"].T)
    np.testing.assert_array_equal(params["blocks"]["mlp_out"]["bias"][0], given["blocks.0.mlp.fc2.bias"])
    np.testing.assert_array_equal(params["final_layer"]["linear"]["kernel"][2], given["final_layer3.linear.weight"].T)
    ours = np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]))
    theirs = np.concatenate([np.ravel(array) for name, array in given.items() if name != "pos_embed"])
    np.testing.assert_array_equal(ours, np.sort(theirs))


def without(*names):
    return {name: array for name, array in state_dict().items() if name not in names}


@pytest.mark.parametrize(
    "given, sentence",
    [
        (
            {},
            "the state dict has no 'x_embedder.proj.weight', so it is not a DiT's: give one with the published",
        ),
        (without("y_embedder.embedding_table.weight"), "has no 'y_embedder.embedding_table.weight', so it is not"),
        (without("pos_embed"), r"does not fit .* \(missing: pos_embed\): give a state dict with the published"),
        (without("blocks.1.attn.qkv.weight"), r"\(missing: blocks.1.attn.qkv.weight\)"),
        (without("final_layer2.linear.weight"), r"\(missing: final_layer2.linear.weight\)"),
        (
            without(*(f"blocks.0.{part}.{kind}" for part in ("attn.qkv", "attn.proj") for kind in ("weight", "bias"))),
            r"\(missing: blocks.0.attn.qkv.weight, .*, blocks.0.attn.proj.weight and 1 more\)",
        ),
        (state_dict() | {"blocks.0.attn.q_norm.weight": np.zeros(4)}, r"\(unexpected: blocks.0.attn.q_norm.weight\)"),
        (
            state_dict() | {"t_embedder.mlp.0.weight": np.zeros((8, 128))},
            r"\(of another shape: t_embedder.mlp.0.weight \(8, 128\) instead of \(8, 256\)\)",
        ),
        (
            without("final_layer.linear.bias") | {"head.bias": np.zeros(1)},
            r"\(missing: final_layer.linear.bias; unexpected: head.bias\)",
        ),
        (state_dict() | {"x_embedder.proj.weight": np.zeros((8, 12))}, r"has shape \(8, 12\) where a DiT's has 4 axes"),
        (state_dict(out=5), r"final_layer.linear.weight \(20, 8\) instead of \(12, 8\)"),
        (state_dict() | {"pos_embed": np.zeros((1, 9, 8))}, r"pos_embed \(1, 9, 8\) is not the fixed sin-cos table"),
        (state_dict() | {"pos_embed": np.zeros((1, 8, 8))}, r"pos_embed \(1, 8, 8\) is not .* of a square grid"),
        (state_dict() | {"pos_embed": position_table(3, 3, 12)[None]}, r"pos_embed \(1, 9, 12\) is not the fixed"),
        (state_dict() | {"pos_embed": np.zeros(3)}, r"pos_embed \(3,\) is not the fixed"),
    ],
)
def test_bad_state_dicts(given, sentence):
    with pytest.raises(UserError, match=sentence):
        from_torch(given, num_heads=2, history_layers=1)


def test_bad_fields():
    with pytest.raises(UserError, match="hidden_size 8 with 3 heads does not work"):
        from_torch(state_dict(), num_heads=3, history_layers=1)
    with pytest.raises(UserError, match="history_layers is 6, but the model has 2 layers: choose a number from 0 to"):
        from_torch(state_dict(), num_heads=2)
