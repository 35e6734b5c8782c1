"""diffusers' DiT: the same outputs there and here, and the same bits there and back."""

import json
import logging

import jax
import numpy as np
import pytest
from convert_fixtures import assert_same, state_dict

from ard_jax.config import default_config
from ard_jax.convert import dit_from_diffusers, dit_to_diffusers, from_torch
from ard_jax.convert.diffusers_pipeline import sampling_differences
from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, DiT, layers
from ard_jax.models.layers import position_table
from ard_jax.weights.tensors import read_tensors, write_tensors

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_embeds_ada_norm": 10,
}
TIMES = np.array([0, 321, 999])
LABELS = np.array([0, 5, 10])  # the last is the null class


def oracle(seed=0, dtype="float32", **settings):
    """A tiny transformer of diffusers, random everywhere: what is initialised with zeros would hide mistakes."""
    import torch
    from diffusers import DiTTransformer2DModel

    random = torch.Generator().manual_seed(seed)
    model = DiTTransformer2DModel(**(TINY | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
        shared = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(shared)
    return model.to(getattr(torch, dtype))


def weights(transformer):
    return {name: tensor.numpy() for name, tensor in transformer.state_dict().items()}


def images(size, dtype):
    return np.random.default_rng(1).normal(size=(3, size, size, 4)).astype(dtype)


def run_oracle(transformer, x, times):
    import torch

    with torch.no_grad():
        output = transformer(
            torch.from_numpy(np.moveaxis(x, -1, 1)), torch.from_numpy(times), torch.from_numpy(LABELS)
        ).sample
    return np.moveaxis(output.numpy(), 1, -1)


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.oracle
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sample_size": 128, "patch_size": 8},  # where the older Transformer2DModel scales the positions
        {"out_channels": 4, "norm_eps": 1e-2, "num_layers": 1, "patch_size": 4},
    ],
)
def test_float32(settings):
    transformer = oracle(**settings)
    model, params = dit_from_diffusers(weights(transformer), dict(transformer.config))
    x = images(transformer.config.sample_size, np.float32)
    ours = model.apply({"params": params}, x, TIMES.astype(np.float32), LABELS)
    assert relative_error(ours, run_oracle(transformer, x, TIMES.astype(np.float32))) < 2e-5


@pytest.mark.oracle
def test_float64(x64, monkeypatch):
    """diffusers makes its time's sinusoids in float32 whatever the model's type is, so both are given those."""
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    transformer = oracle(dtype="float64", norm_eps=1e-2)
    model, params = dit_from_diffusers(weights(transformer), dict(transformer.config))
    x = images(8, np.float64)
    theirs = get_timestep_embedding(torch.from_numpy(TIMES), 256, flip_sin_to_cos=True, downscale_freq_shift=1).numpy()
    exact = layers.sinusoids(TIMES.astype(np.float64), frequency_shift=1.0)
    assert np.abs(exact - theirs).max() < 1e-4  # float32's angles near 999
    monkeypatch.setattr(layers, "sinusoids", lambda t, **_: jax.numpy.asarray(theirs, np.float64))
    ours = model.apply({"params": params}, x, TIMES.astype(np.float64), LABELS)
    assert ours.dtype == np.float64
    assert relative_error(ours, run_oracle(transformer, x, TIMES)) < 1e-10


@pytest.mark.oracle
def test_float64_at_time_0(x64):
    """At time 0 float32's sinusoids are exact: nothing is put in anyone's place."""
    transformer = oracle(dtype="float64")
    model, params = dit_from_diffusers(weights(transformer), dict(transformer.config))
    x, times = images(8, np.float64), np.zeros(3)
    ours = model.apply({"params": params}, x, times, LABELS)
    assert relative_error(ours, run_oracle(transformer, x, times)) < 1e-10


@pytest.mark.oracle
def test_the_published_spacing_of_the_sinusoids_is_another_network():
    """At a tenth of the outputs' size for these weights: a converter must know which one it is given."""
    transformer = oracle()
    model, params = dit_from_diffusers(weights(transformer), dict(transformer.config), frequency_shift=0.0)
    x, times = images(8, np.float32), TIMES.astype(np.float32)
    ours = model.apply({"params": params}, x, times, LABELS)
    assert model.frequency_shift == 0.0 and relative_error(ours, run_oracle(transformer, x, times)) > 1e-2


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.oracle
def test_diffusers_loads_what_is_written(tmp_path):
    from diffusers import DiTTransformer2DModel

    transformer = oracle()
    model, params = dit_from_diffusers(weights(transformer), dict(transformer.config))
    written, config = dit_to_diffusers(model, params)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "diffusion_pytorch_model.safetensors", written, {"format": "pt"})
    loaded, facts = DiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"] and not facts["mismatched_keys"]
    assert_same(weights(loaded), weights(transformer))
    known = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    assert {key: loaded.config[key] for key in known} == known


def published():
    """A teacher's published state dict."""
    return state_dict(heads=1, hidden=32, side=4)


def test_ours_to_diffusers_to_ours(tmp_path):
    model, params = from_torch(published(), num_heads=2, frequency_shift=1.0, mlp_norm_eps=1e-5)
    written, config = dit_to_diffusers(model, params)
    write_tensors(tmp_path / "x.safetensors", written)
    again, found = dit_from_diffusers(read_tensors(tmp_path / "x.safetensors"), config)
    assert again == model
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, params)
    assert_same(dit_to_diffusers(again, found)[0], written)


def test_the_config_is_diffusers_own():
    model, params = from_torch(published(), num_heads=2, mlp_norm_eps=1e-6)
    written, config = dit_to_diffusers(model, params)
    said = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 3,
            "out_channels": 6, "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5,
            "norm_eps": 1e-6, "activation_fn": "gelu-approximate", "attention_bias": True}  # fmt: skip
    assert {key: config[key] for key in said} == said
    third = written["transformer_blocks.1.attn1.to_k.weight"]
    np.testing.assert_array_equal(third, published()["blocks.1.attn.qkv.weight"][8:16])


def test_another_spacing_is_warned_of(caplog):
    caplog.set_level(logging.WARNING, logger="ard_jax")
    model, params = from_torch(published(), num_heads=2, frequency_shift=1.0)
    dit_to_diffusers(model, params)
    assert not caplog.records
    dit_to_diffusers(model.clone(frequency_shift=0.0), params)
    assert [record.getMessage() for record in caplog.records] == [
        "diffusers spaces the time's sinusoids by 1/127, this model by 1/128: its images differ a little there."
    ]


def test_folders_of_2023():
    """They call the class Transformer2DModel, and hold the position table."""
    model, params = from_torch(published(), num_heads=2, frequency_shift=1.0, mlp_norm_eps=1e-5)
    written, config = dit_to_diffusers(model, params)
    written["pos_embed.pos_embed"] = position_table(4, 4, 8)[None]
    old = config | {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "cross_attention_dim": None}
    again, found = dit_from_diffusers(written, old)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, found, params)
    with pytest.raises(UserError, match="is not the fixed sin-cos table of a square grid"):
        dit_from_diffusers(written | {"pos_embed.pos_embed": 2 * written["pos_embed.pos_embed"]}, old)
    del old["norm_elementwise_affine"]  # whose default was another one for that class
    with pytest.raises(UserError, match="norm_elementwise_affine is None, but only False can be converted"):
        dit_from_diffusers(written, old)


def test_what_its_pipeline_does_otherwise_is_said():
    config = default_config()
    config.data.update(num_classes=0, channels=4, space="latent")
    config.model.update(name="PixArt", null_mask="caption")
    config.diffusion.update(guided_channels=3, guidance_interval=(0.3, 0.7), solver="dpm++2m", spacing="dpm")
    assert sampling_differences(config) == [
        "PixArtSigmaPipeline guides all 4 channels, the teacher's settings 3.",
        "PixArtSigmaPipeline guides at every step, the teacher's settings from 0.3 to 0.7 of the way from data to "
        "noise (diffusion.guidance_interval).",
        "PixArtSigmaPipeline reads the empty caption under a mask of its own, this teacher under that of the caption "
        "in whose place it stands (model.null_mask is 'caption').",
    ]
    config.diffusion.guidance_scale = 1.0
    assert sampling_differences(config) == []
    config = default_config()
    config.data.num_classes = 1000
    config.diffusion.update(guided_channels=0, guidance_interval=(0.0, 0.5), spacing="leading")
    (said,) = sampling_differences(config)
    assert said.startswith("DiTPipeline guides at every step, the teacher's settings from 0 to 0.5 of the way")


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"_class_name": "PixArtTransformer2DModel"},
            "is a PixArtTransformer2DModel, but only a DiTTrans",
        ),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu', but only 'gelu-approximate' can be converted"),
        ({"attention_bias": False}, "attention_bias is False, but only True can be converted"),
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single', but only 'ada_norm_zero' can"),
        ({"interpolation_scale": 2}, "positions are scaled by 2, as Transformer2DModel does for sample_size 8: only"),
        ({"_class_name": "Transformer2DModel", "sample_size": 128}, "positions are scaled by 2, as .* sample_size 128"),
        ({"out_channels": 5}, "out_channels is 5 for 3 channels: only 3, or 6 with a learned variance, can be"),
        ({"num_layers": "2"}, "num_layers is '2' in its config: give a config with a number there"),
        ({"patch_size": None}, "patch_size is None in its config"),
        ({"sample_size": 0}, "sample_size is 0 in its config"),
        ({"num_layers": 3}, r"its config describes \(missing: transformer_blocks.2.norm1.emb.timestep_embedder"),
        ({"num_layers": 1}, r"\(unexpected: transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight, "),
        ({"num_embeds_ada_norm": 6}, r"class_embedder.embedding_table.weight \(6, 8\) instead of \(7, 8\)"),
    ],
)
def test_configs_that_cannot_be(change, sentence):
    model, params = from_torch(published(), num_heads=2, frequency_shift=1.0)
    written, config = dit_to_diffusers(model, params)
    with pytest.raises(UserError, match=sentence):
        dit_from_diffusers(written, config | change)


def test_embedders_that_differ():
    model, params = from_torch(published(), num_heads=2, frequency_shift=1.0)
    written, config = dit_to_diffusers(model, params)
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    written[name] = written[name] + np.float32(1e-6)
    with pytest.raises(UserError, match=rf"\.0\.norm1\..* and {name} differ: only DiTs whose blocks share their time"):
        dit_from_diffusers(written, config)


def test_models_that_diffusers_does_not_have():
    model, params = from_torch(published(), num_heads=2, steps=1, history_layers=0)
    assert isinstance(model, ARDStudent)
    with pytest.raises(UserError, match="diffusers has no ARD students: export a student as a pipeline or"):
        dit_to_diffusers(model, params)
    with pytest.raises(UserError, match="mlp_ratio is 2.0, but diffusers' DiT has 4: export safetensors instead"):
        dit_to_diffusers(DiT(mlp_ratio=2.0, image_size=8), params)
