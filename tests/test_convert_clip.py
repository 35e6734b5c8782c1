"""CLIP's way in from transformers' and open_clip's names and configs."""

import json

import jax
import numpy as np
import pytest
from clip_fixtures import config, random_state_dict
from pixart_fixtures import word_tokenizer
from safetensors.numpy import save_file

from ard_jax.convert import clip_from_open_clip, clip_from_transformers
from ard_jax.convert.clip import open_clip_shapes
from ard_jax.convert.clip_config import fields_of_open_clip, fields_of_transformers
from ard_jax.convert.clip_folder import open_clip_folder
from ard_jax.errors import UserError
from ard_jax.models import CLIP, clip_fields, count_parameters
from ard_jax.models.clip import ACTIVATIONS
from ard_jax.models.partition import logical_axes
from ard_jax.weights.tensors import open_tensors, write_tensors

# The tiny one's config as open_clip has it.
OPEN_CLIP = {
    "embed_dim": 20,
    "vision_cfg": {"width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 1.5, "patch_size": 8, "image_size": 30},
    "text_cfg": {
        "width": 24, "layers": 3, "heads": 4, "mlp_ratio": 1.6667, "context_length": 12, "vocab_size": 50
    },
}  # fmt: skip


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


def test_a_file_is_read_as_the_arrays_are(tmp_path):
    arrays, settings = random_state_dict()
    params = clip_from_transformers(arrays, settings)[1]
    files = {"transformers": (arrays, clip_from_transformers, settings)}
    files["open_clip"] = under_open_clip_names(arrays), clip_from_open_clip, OPEN_CLIP
    for name, (written, convert, described) in files.items():
        write_tensors(tmp_path / f"{name}.safetensors", written)
        found = convert(open_tensors(tmp_path / f"{name}.safetensors"), described)[1]
        assert jax.tree.all(jax.tree.map(np.array_equal, found, params)), name


def test_whole_numbers_of_published_folders_are_left_out(tmp_path):
    """OpenAI's files in transformers' names count their positions, those in its own say its sizes."""
    arrays, settings = random_state_dict()
    params = clip_from_transformers(arrays, settings)[1]
    sizes = {"input_resolution": np.array(30), "context_length": np.array(12), "vocab_size": np.array(50)}
    places = {
        f"{part}_model.embeddings.position_ids": np.arange(count)[None]
        for part, count in (("text", 12), ("vision", 10))
    }
    folders = {
        "config.json": (arrays | places, settings),
        "open_clip_config.json": (under_open_clip_names(arrays) | sizes, OPEN_CLIP),
    }
    for name, (written, described) in folders.items():
        folder = tmp_path / name.split(".")[0]
        word_tokenizer(folder / "tokenizer.json")
        save_file({key: np.asarray(array, order="C") for key, array in written.items()}, folder / "model.safetensors")
        (folder / name).write_text(json.dumps(described))
        assert jax.tree.all(jax.tree.map(np.array_equal, open_clip_folder(folder).params, params)), name


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
