import jax
import ml_dtypes
import numpy as np
import pytest
from convert_fixtures import assert_same, state_dict

from ard_jax.convert import from_torch, to_torch
from ard_jax.convert.published import parameters
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, DiT, parameter_shapes
from ard_jax.models.layers import position_table
from ard_jax.weights.tensors import open_tensors, read_tensors, write_tensors


def test_sizes_come_from_the_shapes():
    model, params = from_torch(state_dict(), num_heads=4, history_layers=1, mask="window", remat="full")
    assert type(model) is ARDStudent
    fields = ("channels", "patch_size", "hidden_size", "depth", "num_heads", "num_classes", "mlp_ratio", "learn_sigma")
    assert [getattr(model.backbone, name) for name in fields] == [3, 2, 8, 2, 4, 5, 2.5, True]
    assert (model.steps, model.history_layers, model.mask, model.backbone.remat) == (2, 1, "window", "full")
    expected = parameter_shapes(model, np.zeros((1, 2, 4, 4, 3), np.float32), np.zeros(1, np.int32))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)

    model, params = from_torch(
        state_dict(heads=1, out=1, channels=1, patch=4, depth=3, hidden=61, width=28, dtype=np.float16), num_heads=2
    )
    assert type(model) is DiT
    network = model.backbone
    assert [getattr(network, name) for name in fields[:-2]] == [1, 4, 28, 3, 2, 5] and not network.learn_sigma
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


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sizes", [{"heads": 1}, {"heads": 3}, {"heads": 1, "channels": 1, "patch": 4, "out": 1}])
def test_published_to_ours_to_published(tmp_path, sizes, dtype):
    """Bit for bit, through a file; a transposed or misplaced array would not come back."""
    given = state_dict(**sizes, dtype=dtype)
    given["pos_embed"] = given["pos_embed"].astype(dtype)
    model, params = from_torch(given, num_heads=2, history_layers=1)
    assert model.backbone.image_size == 3 * model.backbone.patch_size
    write_tensors(tmp_path / "x.safetensors", to_torch(model, params))
    assert_same(read_tensors(tmp_path / "x.safetensors"), given)
    again = parameters(open_tensors(tmp_path / "x.safetensors"), model)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_float64_round_trip(golden, x64):
    given = golden("dit_tiny").state_dict(np.float64)
    assert_same(to_torch(*from_torch(given, num_heads=4)), given)


def test_what_is_written_is_contiguous():
    """safetensors' own writer takes raw memory: a view of a transposed array would be written scrambled."""
    model, params = from_torch(state_dict(), num_heads=2, history_layers=1)
    assert all(array.flags.c_contiguous for array in to_torch(model, params).values())


def test_a_model_that_does_not_know_its_images():
    model, params = from_torch(state_dict(), num_heads=2, history_layers=1)
    with pytest.raises(UserError, match="image_size is None, but the published position table needs it: clone the mod"):
        to_torch(model.with_backbone(image_size=None), params)


def test_students_with_one_final_layer():
    """Of one step, with a stack of one head, and of several with a shared one."""
    given = state_dict(heads=1)
    own, params = from_torch(given, num_heads=2, history_layers=1, steps=1)
    assert type(own) is ARDStudent and (own.steps, own.heads) == (1, "separate")
    assert params["final_layer"]["linear"]["kernel"].shape == (1, 8, 24)
    assert_same(to_torch(own, params), given)
    shared, params = from_torch(given, num_heads=2, history_layers=1, steps=3)
    assert (shared.steps, shared.heads) == (3, "shared")
    assert params["final_layer"]["linear"]["kernel"].shape == (8, 24)
    assert_same(to_torch(shared, params), given)
    with pytest.raises(UserError, match="has 2 final layers, so its student makes 2 steps, not 3"):
        from_torch(state_dict(heads=2), num_heads=2, history_layers=1, steps=3)


def test_parameters_of_a_known_model():
    given = state_dict(heads=1)
    model, params = from_torch(given, num_heads=2)
    host = parameters(given, model, np.asarray)
    jax.tree.map(np.testing.assert_array_equal, host, params)
    assert {type(leaf) for leaf in jax.tree.leaves(host)} == {np.ndarray}
    with pytest.raises(UserError, match=r"that the config describes \(missing: blocks.2.adaLN_modulation.1.weight, "):
        parameters(given, model.with_backbone(depth=3))
    with pytest.raises(UserError, match=r"pos_embed \(1, 9, 8\) is not the fixed .* of a square grid \(4×4 here\)"):
        parameters(given, model.with_backbone(image_size=8))


def test_layers_of_different_types_are_stacked_in_the_wider_one():
    given = state_dict(heads=1, dtype=np.float16)
    given["blocks.1.attn.qkv.weight"] = given["blocks.1.attn.qkv.weight"].astype(np.float32) + 1e-6
    _, params = from_torch(given, num_heads=2)
    kernel = params["blocks"]["qkv"]["kernel"]
    assert kernel.dtype == np.float32 and params["blocks"]["qkv"]["bias"].dtype == np.float16
    np.testing.assert_array_equal(kernel[1].T, given["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_position_table_that_was_kept_in_half_precision(dtype):
    given = state_dict(heads=1)
    fixed = given["pos_embed"]
    given["pos_embed"] = fixed.astype(dtype).astype(np.float32)
    assert np.abs(given["pos_embed"] - fixed).max() > 1e-5  # more than the tolerance of a float32 table
    assert from_torch(given, num_heads=2)[0].image_size == 6
    given["pos_embed"] = given["pos_embed"] + np.float32(1e-4)
    with pytest.raises(UserError, match="is not the fixed sin-cos table"):
        from_torch(given, num_heads=2)


# -------------------------------------------------------------------------------------------------------- mistakes


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
            r"\(missing: blocks.0.attn.qkv.weight, blocks.0.attn.proj.weight, .* and 1 more\)",
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
        (state_dict() | {"pos_embed": np.zeros(())}, r"pos_embed \(\) is not the fixed"),
        (state_dict() | {"blocks.0.mlp.fc1.weight": np.zeros(())}, r"another shape: .*blocks.0.mlp.fc1.weight \(\)"),
        (state_dict() | {"x_embedder.proj.weight": np.zeros((0, 3, 2, 2))}, r"shape \(0, 3, 2, 2\) where a DiT's"),
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
