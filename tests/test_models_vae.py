"""The autoencoder against diffusers', and its way in and out of diffusers' files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ard_jax.convert import vae_from_diffusers, vae_to_diffusers
from ard_jax.convert.vae import OLD_NAMES, published_shapes, vae_shapes
from ard_jax.errors import UserError
from ard_jax.files import write_json
from ard_jax.models import AutoencoderKL, count_parameters, parameter_shapes, vae
from ard_jax.models.vae import decode, to_images, to_latents, to_raw
from ard_jax.weights.tensors import read_tensors, write_tensors


def config(widths=(8, 16, 16, 16), **settings):
    """Stable Diffusion's config, shrunk."""
    return {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "sample_size": 64,
        **settings,
    }


jitted_decode = jax.jit(decode, static_argnames="model")


def oracle(dtype="float32", **settings):
    """A random autoencoder of diffusers' and the same one here, (model, params)."""
    import diffusers
    import torch

    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**config(**settings)).eval().requires_grad_(False)
    for parameter in theirs.parameters():  # norms start at 1 and 0, where a swap would not show
        parameter += 0.1 * torch.randn_like(parameter)
    for module in theirs.modules():
        module.to(getattr(torch, dtype))
    return theirs, vae_from_diffusers(numpy_dict(theirs), dict(theirs.config))


def numpy_dict(theirs):
    return {name: array.numpy() for name, array in theirs.state_dict().items()}


def channels_last(array):
    return np.moveaxis(array.numpy(), 1, -1)


def relative(ours, theirs):
    """Greatest error over the greatest value."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@functools.partial(jax.jit, static_argnames="model")
def encode(model, params, images):
    return model.apply({"params": params}, images, method="encode")


latents_of = jax.jit(to_latents, static_argnames="model")


def tiny(**fields):
    """A small model without an oracle, and parameters that are no defaults."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), tiny_shapes())
    return AutoencoderKL(**TINY, **fields), params


TINY = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)


@functools.cache
def tiny_shapes():
    return parameter_shapes(AutoencoderKL(**TINY), jax.ShapeDtypeStruct((1, 2, 2, 3), "float32"))


def random_images(count=2, side=8):
    return np.random.default_rng(1).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- parity

VARIANTS = {
    "sd": {},
    "bare": dict(
        widths=(4, 8), mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1
    ),
    "other sizes": dict(widths=(8, 12), in_channels=1, out_channels=2, latent_channels=3, shift_factor=0.1),
}


def compare(theirs, model, params, limit):
    import torch

    rows = np.random.default_rng(1)
    side, dtype = 4 * model.downscale, next(theirs.parameters()).dtype
    images = torch.from_numpy(rows.uniform(-1, 1, (2, model.in_channels, side, side // 2))).to(dtype)
    posterior = theirs.encode(images).latent_dist
    encoded = encode(model, params, channels_last(images))
    assert relative(encoded.mean, channels_last(posterior.mean)) < limit
    assert relative(encoded.log_variance, channels_last(posterior.logvar)) < limit
    z = torch.from_numpy(rows.normal(size=(2, model.latent_channels, 3, 5))).to(dtype)
    assert relative(jitted_decode(model, params, channels_last(z)), channels_last(theirs.decode(z).sample)) < limit


@pytest.mark.oracle
@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_and_decode_are_diffusers(variant):
    theirs, (model, params) = oracle(**VARIANTS[variant])
    compare(theirs, model, params, 2e-5)


@pytest.mark.oracle
def test_encode_and_decode_are_diffusers_in_float64(x64):
    theirs, (model, params) = oracle("float64", widths=(4, 8, 8), layers_per_block=1)
    compare(theirs, model, params, 1e-10)


@pytest.mark.oracle
def test_log_variance_is_clipped_as_in_diffusers():
    import torch

    theirs, _ = oracle(widths=(4, 8))
    theirs.quant_conv.bias += torch.tensor([0, 0, 0, 0, 100, -100, 0, 0])
    model, params = vae_from_diffusers(numpy_dict(theirs), dict(theirs.config))
    images = torch.zeros(2, 3, 8, 8)
    encoded = encode(model, params, channels_last(images))
    assert relative(encoded.log_variance, channels_last(theirs.encode(images).latent_dist.logvar)) < 2e-5
    assert encoded.log_variance.max() == 20 and encoded.log_variance.min() == -30


def test_stable_diffusion_at_full_size():
    """Shapes alone, without memory."""
    model = AutoencoderKL()
    shapes = vae_shapes(model)
    assert count_parameters(shapes) == 83_653_863
    latents = jax.eval_shape(functools.partial(to_latents, model), shapes, jax.ShapeDtypeStruct((2, 256, 256, 3), "f4"))
    images = jax.eval_shape(functools.partial(to_images, model), shapes, latents)
    assert (latents.shape, images.shape, model.downscale) == ((2, 32, 32, 4), (2, 256, 256, 3), 8)


@pytest.mark.oracle
def test_names_and_shapes_at_full_size_are_diffusers():
    import diffusers
    import torch

    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**config(widths=(128, 256, 512, 512), norm_num_groups=32))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 83_653_863
    expected = {name: tuple(array.shape) for name, array in theirs.state_dict().items()}
    assert published_shapes(vae_shapes(AutoencoderKL())) == expected


def test_half_precision_keeps_float32_statistics():
    """The mean of pixels around 100.2 is no bfloat16 number."""
    x = jnp.asarray(100.2 + np.random.default_rng(0).normal(size=(1, 64, 64, 4)), jnp.bfloat16)
    norm = vae.group_norm(2, jnp.bfloat16)
    y = np.asarray(norm.apply({"params": {"scale": np.ones(4), "bias": np.zeros(4)}}, x), np.float64)
    groups = np.asarray(x, np.float64).reshape(-1, 2, 2)
    expected = (groups - groups.mean((0, 2), keepdims=True)) / groups.std((0, 2), keepdims=True)
    np.testing.assert_allclose(y.reshape(-1, 2, 2), expected, atol=0.02)
    model, params = tiny(dtype=jnp.bfloat16)
    encoded = jax.eval_shape(functools.partial(encode, model, params), random_images())
    assert encoded.mean.dtype == encoded.log_variance.dtype == jnp.float32
    assert jax.eval_shape(functools.partial(jitted_decode, model, params), encoded.mean).dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------------ latents and images


def test_latents_are_shifted_and_scaled_as_in_diffusers_pipelines():
    model, params = tiny(scaling_factor=0.5, shift_factor=0.25)
    mean = encode(tiny()[0], params, random_images()).mean
    latents = latents_of(model, params, random_images())
    np.testing.assert_allclose(latents, (mean - 0.25) * 0.5, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_raw(model, latents), mean, rtol=1e-5, atol=1e-6)
    images = jax.jit(to_images, static_argnums=0)(model, params, latents)
    np.testing.assert_allclose(images, jitted_decode(tiny()[0], params, mean), rtol=1e-4, atol=1e-5)
    unshifted = latents_of(tiny()[0], params, random_images())
    np.testing.assert_allclose(unshifted, mean * 0.18215, rtol=1e-5, atol=1e-6)


def standard_noise(model, posterior, latents):
    """The noise that latents were sampled with."""
    return (latents / model.scaling_factor - posterior.mean) / np.exp(posterior.log_variance / 2)


def test_latents_are_sampled_from_the_posterior():
    model, params = tiny()
    images = random_images(side=64)
    params["quant_conv"]["bias"][4:] = [-4, 0, 1, 2]
    posterior = encode(model, params, images)
    key, other = jax.random.key(0), jax.random.key(1)
    noise = standard_noise(model, posterior, latents_of(model, params, images, key))
    assert np.abs(noise.mean((0, 1, 2))).max() < 0.1 and np.abs(noise.std((0, 1, 2)) - 1).max() < 0.1
    np.testing.assert_allclose(noise, jax.random.normal(key, noise.shape), rtol=1e-3, atol=1e-3)
    assert not np.allclose(noise, standard_noise(model, posterior, latents_of(model, params, images, other)), atol=0.1)


def test_an_image_with_its_own_key_does_not_depend_on_its_batch():
    model, params = tiny()
    images, keys = random_images(), jax.random.split(jax.random.key(0), 2)
    together = latents_of(model, params, images, keys)
    noise = standard_noise(model, encode(model, params, images), together)
    expected = np.stack([jax.random.normal(key, noise.shape[1:]) for key in keys])
    np.testing.assert_allclose(noise, expected, rtol=1e-3, atol=1e-3)
    swapped = latents_of(model, params, images[::-1], keys[::-1])
    np.testing.assert_allclose(swapped[::-1], together, rtol=1e-4, atol=1e-6)


def test_wrong_images_and_latents_are_refused():
    model, params = tiny()

    def sentence(method, *shape):
        with pytest.raises(UserError) as error:
            model.apply({"params": params}, jnp.zeros(shape), method=method)
        return str(error.value)

    assert sentence("encode", 1, 6, 5, 3) == "images of 6×5 cannot be encoded: both sides must be multiples of 2."
    assert "images of 4 channels were given to an autoencoder whose images have 3" in sentence("encode", 1, 3, 4, 4)
    assert "latents of 3 channels were given to an autoencoder whose latents have 4" in sentence("decode", 1, 4, 4, 3)
    with pytest.raises(UserError, match=r"block_out_channels \(4, 6\) with 4 groups does not work"):
        AutoencoderKL(block_out_channels=(4, 6), norm_num_groups=4)


# ------------------------------------------------------------------------------------------------- in and out


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in theirs
    )


@pytest.mark.oracle
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips_are_bit_exact(tmp_path, variant):
    """diffusers → file → ours → file → diffusers, which opens the folder and has the same weights and config."""
    theirs, _ = oracle(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    model, params = vae_from_diffusers(read_tensors(tmp_path / "theirs"), settings)
    state_dict, written = vae_to_diffusers(model, params)
    assert same(state_dict, numpy_dict(theirs))
    write_tensors(tmp_path / "ours" / "diffusion_pytorch_model.safetensors", state_dict)
    write_json(tmp_path / "ours" / "config.json", written)
    opened = type(theirs).from_pretrained(tmp_path / "ours")
    assert same(numpy_dict(opened), numpy_dict(theirs))
    public = [{key: value for key, value in one.config.items() if key[0] != "_"} for one in (opened, theirs)]
    assert public[0] == public[1]
    again, back = vae_from_diffusers(read_tensors(tmp_path / "ours"), json.loads(json.dumps(written)))
    assert again == model
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_every_array_finds_its_place(tmp_path):
    model, params = tiny()
    state_dict, settings = vae_to_diffusers(model, params)
    block = params["decoder"]["up_blocks_1"]["resnets_0"]
    np.testing.assert_array_equal(
        state_dict["decoder.up_blocks.1.resnets.0.conv1.weight"][3, 5, 0, 2], block["conv1"]["kernel"][0, 2, 5, 3]
    )
    np.testing.assert_array_equal(
        state_dict["encoder.mid_block.attentions.0.to_out.0.weight"],
        params["encoder"]["mid_block"]["attentions_0"]["to_out_0"]["kernel"].T,
    )
    np.testing.assert_array_equal(state_dict["decoder.up_blocks.1.resnets.0.norm1.weight"], block["norm1"]["scale"])
    assert all(array.flags.c_contiguous for array in state_dict.values())
    write_tensors(tmp_path / "vae.safetensors", state_dict)
    again, back = vae_from_diffusers(read_tensors(tmp_path / "vae.safetensors"), settings)
    assert again == model and jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_old_names_of_attention_are_accepted():
    model, params = tiny()
    state_dict, settings = vae_to_diffusers(model, params)
    old = {}
    for name, array in state_dict.items():
        for before, now in OLD_NAMES.items():
            name = name.replace(f".attentions.0.{now}.", f".attentions.0.{before}.")
        old[name] = array
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in old and "decoder.mid_block.attentions.0.key.weight" in old
    assert len(old.keys() - state_dict.keys()) == 16
    assert same(vae_to_diffusers(*vae_from_diffusers(old, settings))[0], state_dict)


@pytest.mark.oracle
def test_settings_that_a_config_leaves_out_are_diffusers_defaults():
    import diffusers

    theirs = diffusers.AutoencoderKL()
    model, params = vae_from_diffusers(numpy_dict(theirs), {})
    mine = vae_to_diffusers(model, params)[1]
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.config.items()}
    assert mine == {key: value for key, value in defaults.items() if key[0] != "_"} | {"_class_name": "AutoencoderKL"}


def bad(**changes):
    model, params = tiny()
    state_dict, settings = vae_to_diffusers(model, params)
    return state_dict, settings | changes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(_class_name="AutoencoderTiny"), "is of class 'AutoencoderTiny', but only an AutoencoderKL"),
        (dict(act_fn="mish"), "has act_fn 'mish', but only 'silu' can be converted"),
        (
            dict(down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
            r"has down_block_types \('DownEncoderBlock2D', 'AttnDownEncoderBlock2D'\), but only "
            r"\('DownEncoderBlock2D', 'DownEncoderBlock2D'\) can be converted",
        ),
        (dict(up_block_types=["UpDecoderBlock2D"]), "has up_block_types"),
        (dict(latents_mean=[0.0] * 4), r"has latents_mean \(0.0, 0.0, 0.0, 0.0\), but only None can be converted"),
        (dict(patch_size=[2, 2]), r"has patch_size \(2, 2\), which is unknown here"),
        (
            dict(block_out_channels=[4, 8, 8], down_block_types=["DownEncoderBlock2D"] * 3,
                 up_block_types=["UpDecoderBlock2D"] * 3),
            r"the architecture that its config describes \(missing: .* and \d+ more; .*\): give a state dict with the "
            r"names and shapes of diffusers' AutoencoderKL",
        ),
        (dict(use_quant_conv=False), r"\(unexpected: quant_conv.bias, quant_conv.weight\)"),
        (
            dict(latent_channels=3),
            r"\(of another shape: decoder.conv_in.weight \(8, 4, 3, 3\) instead of \(8, 3, 3, 3\), .* and 4 more\)",
        ),
    ],
)  # fmt: skip
def test_what_we_do_not_do_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        vae_from_diffusers(*bad(**changes))


def test_harmless_words_of_a_config_are_accepted():
    model, _ = vae_from_diffusers(*bad(act_fn="swish", _diffusers_version="0.4.2", _name_or_path="../vae"))
    assert model == tiny()[0]
