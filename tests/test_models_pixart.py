"""PixArt: diffusers' outputs and ours, names there and back, and a student of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_fixtures import assert_same
from jaxprs import macs

from ard_jax.convert import (
    pixart_from_diffusers,
    pixart_from_published,
    pixart_to_diffusers,
    pixart_to_published,
)
from ard_jax.diffusion import Guidance, LinearVP
from ard_jax.errors import UserError
from ard_jax.models import (
    MASKS,
    ARDStudent,
    Caption,
    PixArt,
    count_parameters,
    init_from_teacher,
    inputs_like,
    layers,
    network_shapes,
    parameter_shapes,
    pixart,
)
from ard_jax.models.attention import cross_attention
from ard_jax.models.flops import student_macs, teacher_macs
from ard_jax.sampling import Solve, sample_student, sample_teacher

LENGTH, CHANNELS = 5, 10
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 24,
    "caption_channels": CHANNELS,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
TIMES = np.array([0, 321, 999])
# a caption of one token, a whole one, and one whose tokens do not come first
MASK = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], np.int32)


def oracle(seed=0, dtype="float32", **settings):
    """A tiny transformer of diffusers, random everywhere: what is initialised with zeros would hide mistakes."""
    import torch
    from diffusers import PixArtTransformer2DModel

    random = torch.Generator().manual_seed(seed)
    model = PixArtTransformer2DModel(**(TINY | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    return model.to(getattr(torch, dtype))


def weights(transformer):
    return {name: tensor.numpy() for name, tensor in transformer.state_dict().items()}


def inputs(height=8, width=8, dtype=np.float32):
    random = np.random.default_rng(1)
    x = random.normal(size=(3, height, width, 4)).astype(dtype)
    null = random.normal(size=(1, 2, CHANNELS)).repeat(3, axis=0).astype(dtype)
    return x, Caption(random.normal(size=(3, LENGTH, CHANNELS)).astype(dtype), MASK, null)


def run_oracle(transformer, x, times, caption):
    import torch

    size = None
    if transformer.use_additional_conditions:
        height, width = 8 * x.shape[1], 8 * x.shape[2]
        size = {
            "resolution": torch.tensor([[height, width]] * len(x)),
            "aspect_ratio": torch.tensor([[height / width]] * len(x)),
        }
    with torch.no_grad():
        output = transformer(
            torch.from_numpy(np.moveaxis(x, -1, 1)),
            encoder_hidden_states=torch.from_numpy(np.asarray(caption.tokens)),
            timestep=torch.from_numpy(times),
            encoder_attention_mask=torch.from_numpy(np.asarray(caption.mask)),
            added_cond_kwargs=size,
        ).sample
    return np.moveaxis(output.numpy(), 1, -1)


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def random_params(model, seed=0, scale=0.3, dtype=jnp.float32):
    """Random everywhere."""
    shapes = network_shapes(model)
    leaves, tree = jax.tree.flatten(shapes)
    random = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(scale * random.standard_normal(leaf.shape), dtype) for leaf in leaves])


def small(**fields):
    sizes = dict(patch_size=2, hidden_size=24, depth=3, num_heads=2, caption_width=CHANNELS, caption_length=LENGTH)
    return PixArt(**{**sizes, "image_size": 8, **fields})


# ------------------------------------------------------------------------------------------------------ diffusers


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({}, (8, 8)),
        ({}, (12, 6)),
        ({"sample_size": 128, "interpolation_scale": None, "num_layers": 1}, (8, 20)),
        ({"interpolation_scale": 0.5, "patch_size": 4, "out_channels": 4}, (8, 16)),
        ({"use_additional_conditions": True}, (8, 8)),
        ({"use_additional_conditions": None, "sample_size": 128, "num_layers": 1}, (6, 14)),
    ],
    ids=["sigma", "tall", "scale", "patch", "size", "alpha1024"],
)
def test_float32(settings, side):
    if settings.get("sample_size") == 128 and "use_additional_conditions" not in settings:
        settings = settings | {"use_additional_conditions": False}
    transformer = oracle(**settings)
    model, params = pixart_from_diffusers(weights(transformer), dict(transformer.config))
    x, caption = inputs(*side)
    ours = model.apply({"params": params}, x, TIMES.astype(np.float32), caption)
    assert relative_error(ours, run_oracle(transformer, x, TIMES.astype(np.float32), caption)) < 2e-5


@pytest.mark.oracle
@pytest.mark.parametrize("told_size", [False, True])
def test_float64(x64, monkeypatch, told_size):
    """diffusers makes its sinusoids in float32 whatever the model's type is, so both are given those."""
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    transformer = oracle(dtype="float64", use_additional_conditions=told_size)
    model, params = pixart_from_diffusers(weights(transformer), dict(transformer.config))
    x, caption = inputs(12, 6, np.float64)

    def theirs(t, **_):
        given = torch.tensor(np.asarray(t))
        found = get_timestep_embedding(given, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        return jnp.asarray(found.numpy(), np.float64)

    exact = layers.sinusoids(TIMES.astype(np.float64))
    assert np.abs(exact - theirs(TIMES)).max() < 1e-4  # float32's angles near 999
    monkeypatch.setattr(layers, "sinusoids", theirs)
    with jax.disable_jit():
        ours = model.apply({"params": params}, x, TIMES.astype(np.float64), caption)
    assert ours.dtype == np.float64
    assert relative_error(ours, run_oracle(transformer, x, TIMES, caption)) < 1e-10


@pytest.mark.oracle
def test_float64_at_time_0(x64):
    """At time 0 float32's sinusoids are exact: nothing is put in anyone's place."""
    transformer = oracle(dtype="float64")
    model, params = pixart_from_diffusers(weights(transformer), dict(transformer.config))
    x, caption = inputs(8, 12, np.float64)
    ours = model.apply({"params": params}, x, np.zeros(3), caption)
    assert relative_error(ours, run_oracle(transformer, x, np.zeros(3), caption)) < 1e-10


@pytest.mark.oracle
@pytest.mark.parametrize("solver", ["dpm++2m", "ddim"])
@pytest.mark.parametrize("pipeline", ["PixArtSigmaPipeline", "PixArtAlphaPipeline"])
def test_pipelines(pipeline, solver):
    """Whole runs of diffusers' pipelines from the same noise, under both conventions of the empty caption's mask."""
    import diffusers
    import torch

    told_size = pipeline == "PixArtAlphaPipeline"
    transformer = oracle(sample_size=128, use_additional_conditions=told_size, num_layers=2)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(0.5)  # twenty guided steps of the larger ones leave float32's range of sense
    settings = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    if solver == "ddim":
        scheduler = diffusers.DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**settings, final_sigmas_type="zero")
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)  # fmt: skip
    pipe = getattr(diffusers, pipeline)(None, None, vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise, caption = inputs(6, 10)
    spacing = {"ddim": "leading", "dpm++2m": "dpm"}[solver]
    how = Solve(LinearVP(spacing=spacing), solver, 20, Guidance(4.5, 0))
    found = {}
    for null_mask in ("own", "caption"):
        model, params = pixart_from_diffusers(weights(transformer), dict(transformer.config), null_mask=null_mask)
        null = model.unconditional(caption)
        told = [np.array(array) for array in (caption.tokens, caption.mask, null.tokens, null.mask)]
        tokens, mask, null_tokens, null_mask_ = (torch.from_numpy(array) for array in told)
        expected = pipe(
            prompt=None, negative_prompt=None, prompt_embeds=tokens, prompt_attention_mask=mask,
            negative_prompt_embeds=null_tokens, negative_prompt_attention_mask=null_mask_, guidance_scale=4.5,
            num_inference_steps=20, height=48, width=80, use_resolution_binning=False, output_type="latent",
            latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
        ).images.numpy()  # fmt: skip
        solve = jax.jit(lambda params, model=model: sample_teacher(model, params, noise, caption, how).xt[:, -1])
        found[null_mask] = solve(params)
        # a random network's latents are some hundreds, so float32 is told by their size
        assert relative_error(found[null_mask], np.moveaxis(expected, 1, -1)) < 2e-5
    assert relative_error(found["own"], found["caption"]) > 1e-3


@pytest.mark.oracle
@pytest.mark.parametrize("told_size", [False, True])
def test_there_and_back(told_size):
    transformer = oracle(use_additional_conditions=told_size)
    given = weights(transformer)
    model, params = pixart_from_diffusers(given, dict(transformer.config))
    assert model.null_mask == "own"
    written, config = pixart_to_diffusers(model, params)
    assert_same(written, given)
    assert {key: transformer.config[key] for key in config if key in transformer.config} == {
        key: value for key, value in config.items() if key in transformer.config
    }
    published = pixart_to_published(model, params, np.ones((LENGTH, CHANNELS), np.float32))
    authors, again = pixart_from_published(published, config)
    assert authors.null_mask == "caption" and authors.clone(null_mask="own") == model
    assert_same(pixart_to_published(authors, again, np.ones((LENGTH, CHANNELS), np.float32)), published)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_the_authors_names():
    """Those of their files, with q, k and v as rows of one array, and the caption's k and v of another."""
    model = small(size_conditioning=True)
    published = pixart_to_published(model, random_params(model))
    shapes = {name: array.shape for name, array in published.items()}
    assert shapes["x_embedder.proj.weight"] == (24, 4, 2, 2) and shapes["pos_embed"] == (1, 16, 24)
    assert shapes["t_embedder.mlp.0.weight"] == (24, 256) and shapes["t_block.1.weight"] == (144, 24)
    assert shapes["csize_embedder.mlp.2.bias"] == shapes["ar_embedder.mlp.2.bias"] == (8,)
    assert shapes["y_embedder.y_proj.fc1.weight"] == (24, CHANNELS)
    assert shapes["y_embedder.y_proj.fc2.weight"] == (24, 24)
    assert shapes["blocks.2.attn.qkv.weight"] == (72, 24) and shapes["blocks.2.attn.proj.bias"] == (24,)
    assert shapes["blocks.2.cross_attn.q_linear.weight"] == shapes["blocks.2.cross_attn.proj.weight"] == (24, 24)
    assert shapes["blocks.2.cross_attn.kv_linear.weight"] == (48, 24)
    assert shapes["blocks.2.mlp.fc1.weight"] == (96, 24) and shapes["blocks.2.mlp.fc2.weight"] == (24, 96)
    assert shapes["blocks.2.scale_shift_table"] == (6, 24)
    assert shapes["final_layer.scale_shift_table"] == (2, 24) and shapes["final_layer.linear.weight"] == (32, 24)
    assert len(shapes) == 1 + 2 * (1 + 2 + 1 + 2 + 4) + 3 * (2 * 7 + 1) + 3


def test_another_position_table_is_refused():
    model = small()
    published = pixart_to_published(model, random_params(model))
    config = pixart_to_diffusers(model, random_params(model))[1]
    pixart_from_published(published, config)
    del published["pos_embed"]
    pixart_from_published(published, config)  # it is a constant, which files may leave out
    published["pos_embed"] = layers.position_table(4, 4, 24)[None]  # that of another interpolation
    with pytest.raises(UserError, match="pos_embed .* is not the fixed sin-cos table"):
        pixart_from_published(published, config)
    written = pixart_to_diffusers(model, random_params(model))[0]  # as older files of diffusers have it
    pixart_from_diffusers(written | {"pos_embed.pos_embed": model.positions(4, 4)[None]}, config)
    with pytest.raises(UserError, match="pos_embed .* is not the fixed sin-cos table"):
        pixart_from_diffusers(written | {"pos_embed.pos_embed": published["pos_embed"]}, config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "DiTTransformer2DModel"}, "a DiTTransformer2DModel, but only a PixArtTransformer2DModel"),
        ({"norm_type": "ada_norm_zero"}, "norm_type is 'ada_norm_zero', but only 'ada_norm_single'"),
        ({"num_layers": "3"}, "num_layers is '3' in its config"),
        ({"cross_attention_dim": 48}, "cross_attention_dim is 48, but its captions are projected to 24"),
        ({"out_channels": 6}, "out_channels is 6 for 4 channels"),
        ({"num_layers": 4}, "missing: .*blocks.3"),
        ({"num_layers": 2}, "unexpected: .*blocks.2"),
        ({"caption_channels": 11}, "of another shape: .*instead of"),
        ({"use_additional_conditions": True}, "missing: .*embedder"),
        ({"attention_head_dim": 7, "cross_attention_dim": 14}, "multiple of the number of heads and of 4"),
    ],
)
def test_weights_of_another_network_are_refused(change, said):
    model = small()
    state_dict, config = pixart_to_diffusers(model, random_params(model))
    with pytest.raises(UserError, match=said):
        pixart_from_diffusers(state_dict, config | change)


def test_parameters_of_the_published_sizes():
    for name in pixart.SIZES:
        model = PixArt(**pixart.size_fields(name))
        expected = 611_349_152 if name == "PixArt-XL-2-1024-MS" else 610_856_096
        assert count_parameters(parameter_shapes(model, *inputs_like(model))) == expected
    assert PixArt() == PixArt(**pixart.size_fields("PixArt-Sigma-XL-2-1024-MS"))
    with pytest.raises(UserError, match="'PixArt-XL/2', which is not a published PixArt's: choose one of PixArt-XL-2-"):
        pixart.size_fields("PixArt-XL/2")


# ------------------------------------------------------------------------------------------------------- captions


def test_only_the_captions_own_tokens_are_seen_in_whatever_order():
    model = small()
    params, (x, caption) = random_params(model), inputs()
    times = np.full(3, 500.0, np.float32)
    out = model.apply({"params": params}, x, times, caption)
    other = np.where(MASK[..., None], caption.tokens, 1e3)
    np.testing.assert_array_equal(out, model.apply({"params": params}, x, times, caption._replace(tokens=other)))
    turned = caption._replace(tokens=caption.tokens[:, ::-1], mask=MASK[:, ::-1])
    np.testing.assert_allclose(out, model.apply({"params": params}, x, times, turned), rtol=2e-5, atol=2e-5)
    told = caption.tokens.copy()
    told[0, 0] += 1.0
    moved = np.abs(model.apply({"params": params}, x, times, caption._replace(tokens=told)) - out).max(axis=(1, 2, 3))
    assert moved[0] > 1e-2 and moved[1] == moved[2] == 0


@pytest.mark.parametrize("backend", ["splash_interpreted", "cudnn"])
def test_backends_of_the_caption(backend):
    """Queries of two rows an example, captions that fill no tile; cuDNN's own call is checked where there is one."""
    random = np.random.default_rng(0)
    q, k, v = (
        random.normal(size=(rows, length, 2, 8))
        for rows, length in (
            (
                4,
                128,
            ),
            (2, 150),
            (2, 150),
        )
    )
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    lengths = jnp.array([150, 7])
    if backend == "cudnn" and jax.default_backend() != "gpu":
        with pytest.raises(UserError, match="attention is 'cudnn', which cannot run here"):
            cross_attention(q, k, v, lengths, backend)
        return
    if backend == "cudnn":
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    expected = cross_attention(q, k, v, lengths)
    tolerance = 2e-2 if backend == "cudnn" else 2e-6
    np.testing.assert_allclose(cross_attention(q, k, v, lengths, backend), expected, rtol=0, atol=tolerance)
    gradient = jax.grad(lambda k, backend: jnp.sum(cross_attention(q, k, v, lengths, backend) ** 2))
    expected = gradient(k, "xla")
    assert np.abs(expected[1, 7:]).max() == 0 < np.abs(expected[1, :7]).min()
    np.testing.assert_allclose(gradient(k, backend), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_the_empty_caption_under_both_masks():
    _, caption = inputs()
    null = caption.null[0]
    own = small().unconditional(caption)
    np.testing.assert_array_equal(own.mask, [[1, 0, 0, 0, 0]] * 3)
    theirs = small(null_mask="caption").unconditional(caption)
    np.testing.assert_array_equal(theirs.mask, MASK)
    for told in (own, theirs):
        np.testing.assert_array_equal(told.tokens, [[null[0], *[null[1]] * 4]] * 3)
    # a whole table of the authors' stands as it is
    table = np.random.default_rng(2).normal(size=(3, LENGTH, CHANNELS)).astype(np.float32)
    np.testing.assert_array_equal(small(null_mask="caption").unconditional(caption._replace(null=table)).tokens, table)
    with pytest.raises(UserError, match="need the empty caption, and the condition has none"):
        small().unconditional(Caption(caption.tokens, MASK))
    with pytest.raises(UserError, match="null_mask is 'theirs': choose one of own, caption"):
        small(null_mask="theirs")


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        (Caption(np.zeros((3, 5, 11), np.float32), MASK), r"tokens \(3, 5, 11\) .* but \(batch, token, 10\)"),
        (Caption(np.zeros((3, 5, 10), np.float32), MASK[:, :4]), r"a mask \(3, 4\)"),
        (Caption(np.zeros((3, 5, 10), np.float32), MASK * np.int32([[0], [1], [1]])), "mask is all zeros"),
    ],
)
def test_bad_captions(caption, said):
    model = small()
    with pytest.raises(UserError, match=said):
        model.apply({"params": random_params(model)}, inputs()[0], np.zeros(3, np.float32), caption)


@pytest.mark.parametrize("side", [(7, 8), (8, 9)])
def test_sides_that_the_patch_does_not_divide(side):
    model = small()
    x, caption = inputs(*side)
    with pytest.raises(UserError, match=f"images of {side[0]}×{side[1]} cannot be cut into patches of 2×2"):
        model.apply({"params": random_params(model)}, x, np.zeros(3, np.float32), caption)


@pytest.mark.parametrize("told_size", [False, True])
def test_guided_sampling_prepares_a_caption_once(told_size):
    """The solve is that of single guided calls, and no caption is projected inside of its loop."""
    model = small(size_conditioning=told_size)
    params, (x, caption) = random_params(model), inputs(8, 12)
    how = Solve(steps=3, guidance=Guidance(2.5, 0))
    found = jax.jit(lambda params: sample_teacher(model, params, x, caption, how))(params)
    state, grid = x, how.process.grid(3)
    call = jax.jit(lambda x, t, told: model.apply({"params": params}, x, jnp.full(3, t), told)[..., :4])
    for node, time in enumerate(grid.times):
        conditional, unconditional = (call(state, time, told) for told in (caption, model.unconditional(caption)))
        noise = unconditional + 2.5 * (conditional - unconditional)
        x0 = (state - grid.sigma[node] * noise) / grid.alpha[node]
        np.testing.assert_allclose(found.x0[:, node], x0, rtol=0, atol=2e-4 * np.abs(x0).max())
        state = np.float32(grid.alpha[node + 1]) * x0 + np.float32(grid.sigma[node + 1]) * noise
    plain = model.clone(unroll=True)

    def work(steps):
        how = Solve(steps=steps, guidance=Guidance(2.5, 0))
        return macs(lambda params: sample_teacher(plain, params, x, caption, how), params)

    projections = 6 * LENGTH * (CHANNELS * 24 + 24 * 24 + 3 * 24 * 48)  # two captions an image
    calls = [work(steps) - projections for steps in (1, 2, 4)]
    assert calls[1] == 2 * calls[0] and calls[2] == 4 * calls[0]


# --------------------------------------------------------------------------------------------------------- student


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_cached_sampler_is_the_forward_on_its_own_predictions(x64, steps):
    teacher = small(size_conditioning=steps == 2, learn_sigma=steps != 4)
    random = np.random.default_rng(3)
    noise = jnp.asarray(random.normal(size=(3, 4, 6, 4)))
    _, caption = inputs(dtype=np.float64)
    settings = itertools.product(MASKS, range(4)) if steps == 4 else [("causal", 1), ("window", 3)]
    for mask, history in settings:
        student = ARDStudent(teacher, steps=steps, history_layers=history, mask=mask)
        if steps == 4 and not student.layers_with_history and (mask, history) != (MASKS[0], 0):
            continue  # nothing but step distillation again
        params = random_params(student, dtype=jnp.float64)
        points = jax.jit(lambda params, s=student: sample_student(s, params, noise, caption))(params)
        given = jnp.concatenate([noise[:, None], points[:, :-1]], axis=1)
        forced = jax.jit(student.apply)({"params": params}, given, caption)
        np.testing.assert_allclose(forced, points, rtol=0, atol=1e-12 * np.abs(points).max())


def test_a_student_starts_as_its_teacher():
    teacher = small()
    params, (x, caption) = random_params(teacher), inputs()
    student = ARDStudent(teacher, steps=2, history_layers=0, block_times=(700.0, 300.0))
    own = init_from_teacher(params, student)
    given = jnp.stack([x, x[::-1]], axis=1)
    out = student.apply({"params": own}, given, caption)
    for block, time in enumerate((700.0, 300.0)):
        expected = teacher.apply({"params": params}, given[:, block], jnp.full(3, time), caption)[..., :4]
        np.testing.assert_allclose(out[:, block], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_flops_of_the_published_size():
    """Traced at full size: history costs a hundredth, and a caption is projected once a sample, not once a block."""
    teacher = PixArt(**pixart.size_fields("PixArt-Sigma-XL-2-1024-MS"))
    shape, width, tokens, length = (128, 128, 4), 1152, 4096, 300
    caption = length * (4096 * width + width * width + 28 * 2 * width * width)
    modulation = 256 * width + width * width + 6 * width * width
    block = tokens * (3 + 1 + 1 + 1 + 8) * width * width + 2 * tokens * tokens * width + 2 * tokens * length * width
    image = modulation + 28 * block + tokens * width * (16 + 32)
    assert teacher_macs(teacher, shape) == image + caption
    counted = [student_macs(ARDStudent(teacher, steps=3, history_layers=n), shape) for n in (0, 1)]
    assert counted[0] == 3 * image + caption
    assert counted[1] == counted[0] + 3 * 2 * tokens * tokens * width  # two blocks see one and two more
    assert counted[1] / counted[0] <= 1.013

    def traced(history):
        student = ARDStudent(teacher.clone(attention="xla", unroll=True), steps=3, history_layers=history)
        noise = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        _, _, told = inputs_like(teacher)
        return macs(
            lambda params, *given: sample_student(student, params, *given), network_shapes(student), noise, told
        )

    assert [traced(history) for history in (0, 1)] == counted
