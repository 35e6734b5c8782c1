"""CLIP against transformers', and its way in from transformers' and open_clip's names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit

from ard_jax.convert import clip_from_open_clip, clip_from_transformers
from ard_jax.convert.clip import open_clip_shapes, transformers_shapes
from ard_jax.convert.clip_config import fields_of_open_clip, fields_of_transformers
from ard_jax.errors import UserError
from ard_jax.models import CLIP, clip_fields, count_parameters, parameter_shapes
from ard_jax.models.clip import ACTIVATIONS, Tower
from ard_jax.models.partition import logical_axes

# Every size differs, so that none can stand for another; of 30 pixels a side, patches of 8 leave 6 over.
TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": 48,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 30,
    "patch_size": 8,
}
# The same of open_clip.
OPEN_CLIP = {
    "embed_dim": 20,
    "vision_cfg": {"width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 1.5, "patch_size": 8, "image_size": 30},
    "text_cfg": {
        "width": 24, "layers": 3, "heads": 4, "mlp_ratio": 1.6667, "context_length": 12, "vocab_size": 50
    },
}  # fmt: skip


def config(text=None, vision=None, **changes):
    return {
        "model_type": "clip",
        "projection_dim": 20,
        "text_config": TEXT | (text or {}),
        "vision_config": VISION | (vision or {}),
        **changes,
    }


def random_state_dict(seed=0, **changes):
    """A state dict with transformers' names and shapes, random everywhere, and its config."""
    settings = config(**changes)
    random = np.random.default_rng(seed)
    shapes = transformers_shapes(CLIP(**fields_of_transformers(settings)))
    # the shape is asked for by itself, since of no axes comes a float
    arrays = {name: np.asarray(0.3 * random.normal(size=shape), np.float32) for name, shape in shapes.items()}
    return arrays, settings


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, params, *inputs, method):
    return model.apply({"params": params}, *inputs, method=method)


def some_images(side=30, count=2):
    return np.random.default_rng(1).normal(size=(count, side, side, 3)).astype(np.float32)


def some_ids(length=12):
    """Ids in which the highest and id 7 come twice, at other places in each row."""
    ids = np.random.default_rng(2).integers(8, 47, size=(4, length))
    for row, (highest, seven) in enumerate([(3, 5), (7, 1), (10, 4), (0, 9)]):
        ids[row, [highest, 11]], ids[row, [seven, 8]] = 49, 7
    return ids


def relative(ours, theirs):
    """Greatest error over the greatest value."""
    theirs = theirs.detach().numpy()
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def oracle(dtype="float32", **changes):
    """A random CLIP of transformers', and the same one here, (model, params)."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    theirs = CLIPModel(CLIPConfig(**config(**changes))).eval().requires_grad_(False).to(getattr(torch, dtype))
    for parameter in theirs.parameters():  # norms start at 1 and 0, where a swap would not show
        parameter += 0.2 * torch.randn_like(parameter)
    return theirs, clip_from_transformers(theirs.state_dict(), config(**changes))


def errors(theirs, model, params, mask=None):
    """Of both towers."""
    import torch

    dtype = next(theirs.parameters()).dtype
    images = torch.from_numpy(some_images(model.image_size)).to(dtype)
    ids = torch.from_numpy(some_ids())
    mask = torch.ones_like(ids) if mask is None else torch.from_numpy(mask)
    image = apply(model, params, images.numpy(), method="encode_image")
    text = apply(model, params, ids.numpy(), mask.numpy(), method="encode_text")
    return (
        relative(image, theirs.get_image_features(images.permute(0, 3, 1, 2)).pooler_output),
        relative(text, theirs.get_text_features(ids, mask).pooler_output),
    )


# ------------------------------------------------------------------------------------------------------- parity


@pytest.mark.oracle
@pytest.mark.parametrize("end", [2, 7])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_vectors_are_those_of_transformers(activation, end):
    theirs, (model, params) = oracle(
        text={"hidden_act": activation, "eos_token_id": end}, vision={"hidden_act": activation}
    )
    assert model.end == (None if end == 2 else 7)
    assert max(errors(theirs, model, params)) < 2e-5


@pytest.mark.oracle
@pytest.mark.parametrize("end", [2, 7])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_vectors_are_those_of_transformers_in_float64(x64, activation, end):
    theirs, (model, params) = oracle(
        "float64", text={"hidden_act": activation, "eos_token_id": end}, vision={"hidden_act": activation}
    )
    assert max(errors(theirs, model, params)) < 1e-10


@pytest.mark.oracle
@pytest.mark.parametrize("change", [{"image_size": 32}, {"image_size": 9}, {"patch_size": 5, "layer_norm_eps": 0.1}])
def test_other_patches_and_norms(change):
    theirs, (model, params) = oracle(vision=change, text={"layer_norm_eps": 0.3})
    assert max(errors(theirs, model, params)) < 2e-5


@pytest.mark.oracle
def test_a_mask_hides_tokens_before_the_end_too():
    theirs, (model, params) = oracle()
    mask = np.ones_like(some_ids())
    mask[:, 1::3] = 0
    mask[3] = 1  # its end is its first token
    assert errors(theirs, model, params, mask)[1] < 2e-5
    ids = some_ids()
    seen = [apply(model, params, ids, one, method="encode_text") for one in (mask, np.ones_like(ids))]
    assert np.abs(seen[0] - seen[1])[:3].max() > 0.01


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "millions"), [("ViT-B/32", 151.28), ("ViT-L/14", 427.62), ("ViT-H/14", 986.11), ("ViT-bigG/14", 2539.57)]
)
def test_names_and_shapes_of_the_published_sizes(name, millions):
    """The numbers are those of open_clip's docs/model_profile.csv."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    model = CLIP(**clip_fields(name, "gelu"))
    tower = {
        part: {
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.depth,
            "num_attention_heads": sizes.num_heads,
            "intermediate_size": sizes.mlp_width,
            "hidden_act": sizes.activation,
        }
        for part, sizes in (("text_config", model.text), ("vision_config", model.vision))
    }
    tower["vision_config"]["patch_size"] = model.patch_size
    settings = {"projection_dim": model.projection, **tower}
    with torch.device("meta"):
        theirs = CLIPModel(CLIPConfig(**settings))
    expected = {name: tuple(array.shape) for name, array in theirs.state_dict().items()}
    assert transformers_shapes(model) == expected
    assert sum(parameter.numel() for parameter in theirs.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert CLIP(**fields_of_transformers(settings)) == model.clone(end=49_407)


# -------------------------------------------------------------------------------------------------- transformers


@pytest.mark.oracle
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_config": {"hidden_size": 64}, "vision_config": None},
        {"text_config": {"hidden_size": 64, "hidden_act": "gelu"}, "text_config_dict": {"num_hidden_layers": 3}},
        {"vision_config": {"patch_size": 14}, "vision_config_dict": {"hidden_size": 96}, "text_config_dict": None},
    ],
)
def test_settings_that_a_config_leaves_out_are_those_of_transformers(settings):
    from transformers import CLIPConfig

    assert fields_of_transformers(settings) == fields_of_transformers(CLIPConfig(**settings).to_dict())


def test_every_array_finds_its_place():
    state_dict, settings = random_state_dict()
    model, params = clip_from_transformers(state_dict, settings)
    image, text = params["image_encoder"], params["text_encoder"]
    np.testing.assert_array_equal(
        image["blocks"]["mlp_in"]["kernel"][1], state_dict["vision_model.encoder.layers.1.mlp.fc1.weight"].T
    )
    np.testing.assert_array_equal(
        text["blocks"]["key"]["bias"][2], state_dict["text_model.encoder.layers.2.self_attn.k_proj.bias"]
    )
    patches = state_dict["vision_model.embeddings.patch_embedding.weight"]
    assert patches.shape == (32, 3, 8, 8)
    np.testing.assert_array_equal(image["patch_embed"]["kernel"][(2 * 8 + 5) * 3 + 1], patches[:, 1, 2, 5])
    assert params["logit_scale"].shape == () and params["logit_scale"] == state_dict["logit_scale"]
    assert count_parameters(params) == sum(array.size for array in state_dict.values())
    counters = {f"{part}_model.embeddings.position_ids": np.arange(12)[None] for part in ("text", "vision")}
    again = clip_from_transformers(state_dict | counters, settings)
    assert again[0] == model and jax.tree.all(jax.tree.map(np.array_equal, again[1], params))


@pytest.mark.oracle
def test_tensors_of_torch_keep_their_types():
    import torch

    state_dict, settings = random_state_dict()
    params = clip_from_transformers(state_dict, settings)[1]
    for dtype, error in ((torch.float32, 0), (torch.bfloat16, 0.005), (torch.float16, 0.0005)):
        tensors = {name: torch.tensor(array, dtype=dtype, requires_grad=True) for name, array in state_dict.items()}
        found = clip_from_transformers(tensors, settings)[1]
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(found)} == {str(dtype).removeprefix("torch.")}
        found = jax.tree.map(lambda leaf: leaf.astype("float32"), found)
        jax.tree.map(lambda a, b, e=error: np.testing.assert_allclose(a, b, rtol=e, atol=1e-7), found, params)


def test_every_matrix_has_named_axes():
    state_dict, settings = random_state_dict()
    params = clip_from_transformers(state_dict, settings)[1]
    axes = jax.tree_util.tree_map_with_path(lambda path, leaf: logical_axes(path, leaf.ndim), params)
    for encoder in ("image_encoder", "text_encoder"):
        assert axes[encoder]["blocks"]["query"] == {"kernel": ("layer", "embed", "heads"), "bias": ("layer", "heads")}
        assert axes[encoder]["blocks"]["mlp_out"]["kernel"] == ("layer", "mlp", "embed")
        assert axes[encoder]["projection"]["kernel"] == ("embed", "projection")
        assert axes[encoder]["positions"] == ("token", "embed")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(model_type="clip_text_model"), "is of a 'clip_text_model', but only a whole 'clip' can be converted"),
        (dict(text={"eos_token_id": [2, 3]}), r"text_config has eos_token_id \[2, 3\], but a single id is needed"),
        (dict(vision={"hidden_act": "relu"}), "vision_config has hidden_act 'relu', but only 'quick_gelu' and 'gelu'"),
        (dict(vision={"image_size": [30, 30]}), r"vision_config has image_size \[30, 30\], but a positive whole"),
        (dict(text={"vocab_size": 0}), "text_config has vocab_size 0, but a positive whole number is needed"),
        (dict(text={"layer_norm_eps": None}), "text_config has layer_norm_eps None, but a positive number is needed"),
        (dict(projection_dim="20"), "the config has projection_dim '20', but a positive whole number is needed"),
        (dict(vision={"num_attention_heads": 5}), "width 32 with 5 heads does not work"),
        (dict(vision={"patch_size": 31}), "patch_size is 31, more than the 30 pixels of an image's side"),
        (dict(text={"num_hidden_layers": 4}), r"missing: text_model.encoder.layers.3.* and 13 more"),
        (dict(vision={"num_hidden_layers": 1}), r"unexpected: vision_model.encoder.layers.1.* and 13 more"),
        (dict(projection_dim=21), r"another shape: visual_projection.weight \(20, 32\) instead of \(21, 32\)"),
        (dict(vision={"patch_size": 6}), r"patch_embedding.weight \(32, 3, 8, 8\) instead of \(32, 3, 6, 6\)"),
    ],
)  # fmt: skip
def test_what_is_no_clip_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        clip_from_transformers(random_state_dict()[0], config(**changes))


# ----------------------------------------------------------------------------------------------------- open_clip


def under_open_clip_names(arrays):
    """transformers' arrays as open_clip has them, by hand."""
    found = {
        "logit_scale": arrays["logit_scale"],
        "text_projection": arrays["text_projection.weight"].T,
        "positional_embedding": arrays["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": arrays["text_model.embeddings.token_embedding.weight"],
        "ln_final.weight": arrays["text_model.final_layer_norm.weight"],
        "ln_final.bias": arrays["text_model.final_layer_norm.bias"],
        "visual.proj": arrays["visual_projection.weight"].T,
        "visual.class_embedding": arrays["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": arrays["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": arrays["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = arrays[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = arrays[f"vision_model.post_layernorm.{kind}"]
        for tower, prefix, depth in (("text", "", 3), ("vision", "visual.", 2)):
            for layer in range(depth):
                theirs, block = f"{tower}_model.encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
                rows = [arrays[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = np.concatenate(rows)
                found[f"{block}.attn.out_proj.{kind}"] = arrays[f"{theirs}.self_attn.out_proj.{kind}"]
                found[f"{block}.mlp.c_fc.{kind}"] = arrays[f"{theirs}.mlp.fc1.{kind}"]
                found[f"{block}.mlp.c_proj.{kind}"] = arrays[f"{theirs}.mlp.fc2.{kind}"]
                found[f"{block}.ln_1.{kind}"] = arrays[f"{theirs}.layer_norm1.{kind}"]
                found[f"{block}.ln_2.{kind}"] = arrays[f"{theirs}.layer_norm2.{kind}"]
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_open_clip_names_the_same_arrays(activation):
    arrays, settings = random_state_dict(text={"hidden_act": activation}, vision={"hidden_act": activation})
    model, params = clip_from_transformers(arrays, settings)
    theirs = under_open_clip_names(arrays)
    quick = {"quick_gelu": True} if activation == "quick_gelu" else {}
    again, found = clip_from_open_clip(theirs, OPEN_CLIP | quick)
    assert again == model
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
    assert open_clip_shapes(model) == {name: array.shape for name, array in theirs.items()}
    # as the file beside the weights has it, and older files
    others = {"attn_mask": np.zeros((12, 12)), "input_resolution": np.array(30)}
    again, found = clip_from_open_clip(theirs | others, {"model_cfg": OPEN_CLIP | quick, "preprocess_cfg": {}})
    assert again == model and jax.tree.all(jax.tree.map(np.array_equal, found, params))


def test_settings_that_a_config_leaves_out_are_those_of_open_clip():
    """Its ViT-H-14.json and ViT-bigG-14.json, and nothing but the width of the vectors."""
    settings = {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    }
    assert CLIP(**fields_of_open_clip(settings)) == CLIP(**clip_fields("ViT-H/14", "gelu"))
    settings = {
        "embed_dim": 1280,
        "vision_cfg": {
            "image_size": 224, "layers": 48, "width": 1664, "head_width": 104, "mlp_ratio": 4.9231, "patch_size": 14
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1280, "heads": 20, "layers": 32},
    }  # fmt: skip
    assert CLIP(**fields_of_open_clip(settings)) == CLIP(**clip_fields("ViT-bigG/14", "gelu"))
    bare = CLIP(**fields_of_open_clip({"embed_dim": 512}))
    assert bare == CLIP(**(clip_fields("ViT-B/32", "gelu") | {"patch_size": 16}))


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        ("vision_cfg", {"timm_model_name": "vit"}, "vision_cfg has timm_model_name 'vit', which is unknown here"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, r"vision_cfg has layers \[3, 4, 6, 3\], but a positive whole number"),
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg has pool_type 'avg', but only 'tok' can be converted"),
        ("vision_cfg", {"head_width": 64}, "width 32 with 0 heads does not work"),
        ("text_cfg", {"mlp_ratio": "4"}, "text_cfg has mlp_ratio '4', but a positive number is needed"),
        ("text_cfg", {"layers": 2}, r"unexpected: transformer.resblocks.2.* and 9 more"),
        ("text_cfg", {"width": 28}, r"another shape: .*text.*open_clip's CLIP"),
    ],
)
def test_what_is_no_clip_of_open_clip_is_refused(part, changes, sentence):
    theirs = under_open_clip_names(random_state_dict()[0])
    with pytest.raises(UserError, match=sentence):
        clip_from_open_clip(theirs, OPEN_CLIP | {part: OPEN_CLIP[part] | changes})
    with pytest.raises(UserError, match="the config has no embed_dim, so it is not open_clip's"):
        clip_from_open_clip(theirs, config())
    harmless = {part: OPEN_CLIP[part] | {"pad_id": 1, "output_tokens": True, "no_causal_mask": False}}
    assert fields_of_open_clip(OPEN_CLIP | harmless) == fields_of_open_clip(OPEN_CLIP)


# ------------------------------------------------------------------------------------------------------ the model


def test_a_text_s_vector_does_not_depend_on_what_follows_its_end():
    model, params = clip_from_transformers(*random_state_dict(text={"eos_token_id": 7}))
    encode = functools.partial(apply, model, params, method="encode_text")
    ids = np.array([[48, 9, 20, 7, 0, 0], [48, 9, 20, 7, 7, 7], [48, 9, 20, 7, 33, 7]])
    vectors = np.asarray(encode(ids, ids > 0))
    np.testing.assert_allclose(vectors[1:], vectors[:1].repeat(2, axis=0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(encode(ids[:1, :4], np.ones((1, 4))), vectors[:1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(encode(ids, np.ones_like(ids)), vectors, rtol=0, atol=1e-5)
    changed = ids.copy()
    changed[0, 1], changed[1, :3], changed[2, 3] = 10, [9, 20, 48], 8
    assert np.abs(encode(changed, np.ones_like(ids)) - vectors).max(axis=1).min() > 0.01


def test_the_first_place_of_the_highest_id_stands_for_a_text_of_old_configs():
    state_dict, settings = random_state_dict()
    model, params = clip_from_transformers(state_dict, settings)
    by_id = clip_from_transformers(state_dict, config(text={"eos_token_id": 49}))[0]
    assert (model.end, by_id.end) == (None, 49)
    ids, mask = some_ids(), np.ones((4, 12))
    np.testing.assert_array_equal(
        apply(model, params, ids, mask, method="encode_text"), apply(by_id, params, ids, mask, method="encode_text")
    )
    ids[ids == 49] = 47  # still the highest, but no end any more
    assert (
        np.abs(
            apply(model, params, ids, mask, method="encode_text")
            - apply(by_id, params, ids, mask, method="encode_text")
        ).max()
        > 0.01
    )


def test_half_precision_keeps_its_type_and_comes_near():
    state_dict, settings = random_state_dict()
    model, params = clip_from_transformers(state_dict, settings)
    images = some_images()
    half = clip_from_transformers(state_dict, settings, dtype=jnp.bfloat16)[0]
    found = apply(half, params, images, method="encode_image")
    exact = apply(model, params, images, method="encode_image")
    assert found.dtype == jnp.bfloat16
    assert 0 < np.abs(found.astype(np.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_init_makes_all_parameters():
    model = CLIP(Tower(8, 1, 2, 12), Tower(12, 2, 3, 20), 6, image_size=9, patch_size=4, vocabulary=30, length=5)
    inputs = jnp.zeros((1, 9, 9, 3)), jnp.zeros((1, 5), int), jnp.ones((1, 5))
    params = quick_jit(model.init)(jax.random.key(0), *inputs)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, parameter_shapes(model, *inputs))
    np.testing.assert_allclose(params["logit_scale"], 2.6592, atol=1e-4)
    image, text = quick_jit(model.apply)({"params": params}, *inputs)
    assert image.shape == text.shape == (1, 6) and np.isfinite(image).all() and np.isfinite(text).all()
    nothing = apply(model, params, inputs[1], jnp.zeros((1, 5)), method="encode_text")  # a text that is all padding
    assert np.isfinite(nothing).all()


def test_wrong_inputs_and_fields_are_refused():
    model, params = clip_from_transformers(*random_state_dict())

    def sentence(method, *inputs):
        with pytest.raises(UserError) as error:
            model.apply({"params": params}, *inputs, method=method)
        return str(error.value)

    assert "images of 32×30 were given to a CLIP of 30×30" in sentence("encode_image", np.zeros((1, 32, 30, 3)))
    assert "images of 30 channels were given" in sentence("encode_image", np.zeros((1, 3, 30, 30)))
    assert "texts of 13 tokens were given to a CLIP of 12" in sentence("encode_text", *np.zeros((2, 1, 13), int))
    ids = np.zeros((2, 12), int)
    assert "the ids have shape (2, 12) and their mask (12,)" in sentence("encode_text", ids, ids[0])
    with pytest.raises(UserError, match="name is 'B/32', which is not a published CLIP: choose one of ViT-B/32"):
        clip_fields("B/32", "gelu")
    with pytest.raises(UserError, match="activation is 'relu', which no CLIP has: choose one of quick_gelu, gelu"):
        clip_fields("ViT-B/32", "relu")
