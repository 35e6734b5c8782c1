"""CLIP against transformers'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_fixtures import config, random_state_dict
from jaxprs import traced
from quick import quick_jit

from ard_jax.convert import clip_from_transformers
from ard_jax.convert.clip import transformers_shapes
from ard_jax.convert.clip_config import fields_of_transformers
from ard_jax.errors import UserError
from ard_jax.models import CLIP, clip_fields, jaxprs, parameter_shapes
from ard_jax.models.clip import ACTIVATIONS, PRECISION, Tower


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


def test_every_product_is_in_full_precision():
    """Of which a CPU shows nothing: it has no other."""
    model, params = clip_from_transformers(*random_state_dict())
    both = traced(functools.partial(model.apply, {"params": params}), some_images(), some_ids(), np.ones((4, 12)))
    found = [one.params["precision"] for one, _ in jaxprs.equations(both) if one.primitive.name == "dot_general"]
    assert found == [(PRECISION, PRECISION)] * (2 * 8 + 3)  # of each tower's block; patches and two projections


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
