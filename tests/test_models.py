import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import macs, products, shapes
from networks import ard_student
from quick import quick_jit

from ard_jax.convert import from_torch
from ard_jax.convert.published import BLOCK_NAMES, FINAL_NAMES
from ard_jax.diffusion import Guidance, LinearVP, guided_output
from ard_jax.errors import UserError
from ard_jax.models import (
    MASKS,
    ARDStudent,
    Context,
    DiT,
    count_parameters,
    default_block_times,
    init_from_teacher,
    parameter_shapes,
    size_fields,
    visible_blocks,
)
from ard_jax.models.layers import layer_norm, position_table
from ard_jax.objectives.ard import ard
from ard_jax.parallel import make_mesh
from ard_jax.sampling import predict_student, sample_student
from ard_jax.training.state import init_state, make_step

FLOAT32_TOLERANCE = {"tiny": 3e-6, "strong": 1e-3}  # tests/golden/README.md
POINTS = ("z15", "z10", "z5", "z0")
SMALL = dict(channels=2, patch_size=2, hidden_size=8, depth=2, num_heads=2, num_classes=5)


def student_inputs(steps, side=4, channels=2, batch=2, seed=0, dtype=np.float64):
    """Points (batch, steps + 1, side, side, channel), block 0 the noise, and labels."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(batch, steps + 1, side, side, channels)).astype(dtype)
    return points, rng.integers(0, 5, batch).astype(np.int32)


def random_params(model, seed=0, scale=0.3, dtype=np.float64):
    """Parameters that are all large enough to matter, unlike those of adaLN-Zero's start."""
    points, y = student_inputs(getattr(model, "steps", 1), channels=model.backbone.channels, dtype=np.float32)
    inputs = (points[:, :-1], y) if isinstance(model, ARDStudent) else (points[:, 0], np.ones(len(y), np.float32), y)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), dtype), shapes_of(model, *inputs))


def shapes_of(model, *inputs):
    return parameter_shapes(model, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in inputs))


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance)


# --- reference numbers ---


@pytest.mark.parametrize("kind", ["tiny", "strong"])
def test_dit_equals_the_published_implementation(golden, kind):
    arrays = golden(f"dit_{kind}")
    model, params = from_torch(arrays.state_dict(), num_heads=int(arrays["cfg/num_heads"]))
    out = quick_jit(model.apply)({"params": params}, arrays.images("x"), arrays["t"], arrays["y"])
    assert out.dtype == jnp.float32
    assert_close(out, arrays.images("out"), FLOAT32_TOLERANCE[kind])


@pytest.mark.parametrize("kind", ["tiny", "strong"])
def test_dit_equals_the_published_implementation_layer_by_layer_in_float64(golden, x64, kind):
    arrays = golden(f"dit_{kind}")
    model, params = from_torch(arrays.state_dict(np.float64), num_heads=int(arrays["cfg/num_heads"]))
    bound = model.bind({"params": params})
    x, t = arrays.images("x").astype(np.float64), arrays["t"].astype(np.float64)

    def check(actual, name):
        assert_close(actual, arrays[f"inter_f64/{name}"], 1e-10)

    h = bound.embed(x)
    check(h - position_table(4, 4, model.backbone.hidden_size), "x_emb_no_pos")
    time, label = bound.time_embed(t), bound.label_embed(arrays["y"])
    check(time, "t_emb")
    check(label, "y_emb")
    context = Context(jax.nn.silu(time + label))
    within = model.attend_within_rows()
    for layer in range(model.backbone.depth):
        h, _ = model.apply({"params": params}, h, context, within, layer, layer + 1, method="run_blocks")
        check(h, f"block{layer}")
    check(bound.head(h, context), "final")
    out = quick_jit(model.apply)({"params": params}, x, t, arrays["y"])
    assert_close(out, np.moveaxis(arrays["out_f64"], 1, -1), 1e-10)


@pytest.mark.parametrize("kind", ["tiny", "strong"])
def test_guidance_equals_the_published_implementation(golden, x64, kind):
    arrays = golden(f"dit_{kind}")
    model, params = from_torch(arrays.state_dict(np.float64), num_heads=int(arrays["cfg/num_heads"]))
    x, times, y = arrays.images("cfg_x").astype(np.float64), arrays["cfg_t"].astype(np.float64), arrays["cfg_y"]
    run = quick_jit(guided_output, static_argnums=(0, 5, 6))
    for number, scale in enumerate(arrays["cfg_scales"]):
        expected = arrays.images(f"cfg_out_{number}_f64")[..., : model.backbone.channels]
        guidance = Guidance(float(scale), 3)
        for row in range(2):  # the conditional rows; the other two are their unconditional halves
            one = slice(row, row + 1)
            out = run(model, params, x[one], times[row], y[one], guidance, LinearVP())
            assert_close(out, expected[one], 1e-10)


def load_student(golden, kind, history_layers, dtype=np.float32):
    arrays = golden(f"ard_{kind}")
    heads = int(arrays["cfg/num_heads"])
    model, params = from_torch(arrays.state_dict(dtype), num_heads=heads, history_layers=history_layers)
    points = np.stack([arrays.images(name) for name in ("zT", "z15", "z10", "z5")], axis=1).astype(dtype)
    return arrays, model, params, points


def expected_points(arrays, prefix):
    return np.stack([arrays.images(f"{prefix}/pred_{name}")[..., :4] for name in POINTS], axis=1)


@functools.partial(quick_jit, static_argnums=0)
def forward_and_rollout(model, params, points, y):
    return model.apply({"params": params}, points, y), sample_student(model, params, points[:, 0], y)


@pytest.mark.parametrize("history_layers", [0, 1, 2, 3])
def test_student_and_cached_sampler_equal_the_published_implementation(golden, history_layers):
    for kind, tolerance in FLOAT32_TOLERANCE.items():
        arrays, model, params, points = load_student(golden, kind, history_layers)
        assert isinstance(model, ARDStudent) and (model.steps, model.backbone.depth, model.mask) == (4, 3, "causal")
        forced, rollout = forward_and_rollout(model, params, points, arrays["y"])
        assert_close(forced, expected_points(arrays, f"forward/n{history_layers}"), tolerance)
        assert_close(rollout, expected_points(arrays, f"infer/n{history_layers}"), tolerance)


def published_norms(gradient, steps):
    """Norms of a student's gradient by published name."""
    norms = {
        "x_embedder.proj.weight": gradient["patch_embed"]["kernel"],
        "x_embedder.proj.bias": gradient["patch_embed"]["bias"],
        "y_embedder.embedding_table.weight": gradient["label_embed"]["embedding"],
    }
    dense = {
        "t_embedder.mlp.0": gradient["time_embed"]["mlp_in"],
        "t_embedder.mlp.2": gradient["time_embed"]["mlp_out"],
    }
    for ours, theirs in BLOCK_NAMES.items():
        for layer in range(len(gradient["blocks"][ours]["bias"])):
            dense[f"blocks.{layer}.{theirs}"] = jax.tree.map(lambda leaf, i=layer: leaf[i], gradient["blocks"][ours])
    for ours, theirs in FINAL_NAMES.items():
        for head in range(steps):
            name = f"final_layer{head + 1 if head else ''}.{theirs}"
            dense[name] = jax.tree.map(lambda leaf, i=head: leaf[i], gradient["final_layer"][ours])
    for name, leaves in dense.items():
        norms |= {f"{name}.weight": leaves["kernel"], f"{name}.bias": leaves["bias"]}
    return {name: np.linalg.norm(np.ravel(leaf)) for name, leaf in norms.items()}


def test_student_loss_and_gradient_equal_the_published_implementation_in_float64(golden, x64):
    def loss(params, model, points, y, target):
        predictions = model.apply({"params": params}, points, y)
        per_example = jnp.mean((predictions - target) ** 2, axis=(1, 2, 3, 4))
        return jnp.mean(per_example), (predictions, per_example)

    run = quick_jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    for kind in FLOAT32_TOLERANCE:
        arrays, model, params, points = load_student(golden, kind, 2, np.float64)
        target = np.stack([arrays.images(name) for name in POINTS], axis=1).astype(np.float64)
        (mean, (predictions, per_example)), gradient = run(params, model, points, arrays["y"], target)
        assert_close(predictions, expected_points(arrays, "forward_f64/n2"), 1e-10)
        np.testing.assert_allclose(per_example, arrays["loss/n2"], rtol=1e-6)
        assert_close(mean, arrays["loss_f64_mean"], 1e-10)
        norms = published_norms(gradient, model.steps)
        for name, norm in norms.items():
            np.testing.assert_allclose(norm, arrays[f"gradnorm_f64/{name}"], rtol=1e-9, err_msg=name)
        assert len(norms) == sum(name.startswith("gradnorm_f64/") for name in arrays)
        total = np.sqrt(sum(norm**2 for norm in norms.values()))
        np.testing.assert_allclose(total, arrays["gradnorm_f64_total"], rtol=1e-10)
        _, rollout = forward_and_rollout(model, params, points, arrays["y"])
        assert_close(rollout, expected_points(arrays, "infer_f64/n2"), 1e-10)


# --- history layers against an independent dense reference ---


def dense_student(model, params, points, y, masses=None):
    """The student as the published code computes it: all S·T tokens at once, a dense mask, modulation per token.

    To the list `masses` goes each layer's attention (batch, head, query, key).
    """
    params = jax.tree.map(np.asarray, params)
    batch, steps, side = points.shape[:3]
    network = model.backbone
    patch, width, heads = network.patch_size, network.hidden_size, network.num_heads
    grid = side // patch

    def dense(x, weights):
        return x @ weights["kernel"] + weights["bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x, eps=1e-6):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    patches = points.reshape(batch, steps, grid, patch, grid, patch, -1).transpose(0, 1, 2, 4, 3, 5, 6)
    x = dense(patches.reshape(batch, steps, grid**2, -1), params["patch_embed"]) + position_table(grid, grid, width)
    x = x.reshape(batch, steps * grid**2, width)
    block_of = np.repeat(np.arange(steps), grid**2)
    start, end = model.noise_time, model.data_time
    times = np.array(model.block_times or [start + (end - start) * b / steps for b in range(steps)])[block_of]
    angles = times[:, None] * 10_000.0 ** (-np.arange(128) / (128 - model.backbone.frequency_shift))
    time = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    time = dense(silu(dense(time, params["time_embed"]["mlp_in"])), params["time_embed"]["mlp_out"])
    condition = silu(time + params["label_embed"]["embedding"][y][:, None])

    sees = {
        "diagonal": lambda q, k: q == k,
        "window": lambda q, k: (k <= q) & (k >= q - 1),
        "noise_and_own": lambda q, k: (k == q) | (k == 0),
        "causal": lambda q, k: k <= q,
    }
    for layer in range(model.backbone.depth):
        weights = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        mask = sees[model.mask if layer < model.history_layers else "diagonal"](block_of[:, None], block_of[None])
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(dense(condition, weights["modulation"]), 6, -1)
        qkv = dense(norm(x) * (1 + scale_a) + shift_a, weights["qkv"])
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
        logits = np.where(mask, q @ k.swapaxes(-1, -2) / np.sqrt(width // heads), -np.inf)
        attention = np.exp(logits - logits.max(-1, keepdims=True))
        attention = attention / attention.sum(-1, keepdims=True)
        if masses is not None:
            masses.append(attention)
        attention = attention @ v
        x = x + gate_a * dense(attention.transpose(0, 2, 1, 3).reshape(x.shape), weights["attention_out"])
        h = gelu(dense(norm(x, model.backbone.mlp_norm_eps) * (1 + scale_m) + shift_m, weights["mlp_in"]))
        x = x + gate_m * dense(h, weights["mlp_out"])
    out = []
    for block in range(steps):
        own = block_of == block
        head = params["final_layer"]
        head = jax.tree.map(lambda leaf, b=block: leaf[b], head) if model.heads == "separate" else head
        shift, scale = np.split(dense(condition[:, own], head["modulation"]), 2, -1)
        tokens = dense(norm(x[:, own]) * (1 + scale) + shift, head["linear"])
        image = tokens.reshape(batch, grid, grid, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
        out.append(image.reshape(batch, side, side, -1)[..., : model.backbone.channels])
    return np.stack(out, axis=1)


ROWS = 60  # batch · steps where nothing is compiled as a whole: with other sizes each operation is compiled anew


def forward(model, params, points, y):
    """The training forward without compiling it as a whole, which takes longer than running it a few times."""
    with jax.disable_jit():
        return model.apply({"params": params}, points, y)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_equal_a_dense_masked_reference(x64, mask):
    points, y = student_inputs(4, batch=ROWS // 4)
    predictions = []
    for history_layers in range(3):
        model = ard_student(**SMALL, steps=4, history_layers=history_layers, mask=mask)
        params = random_params(model)
        predictions.append(forward(model, params, points[:, :-1], y))
        assert_close(predictions[-1], dense_student(model, params, points[:, :-1], y), 1e-12)
    for fewer, more in itertools.pairwise(predictions):
        if mask == "diagonal":  # step distillation, whatever N
            np.testing.assert_array_equal(fewer, more)
        else:
            assert np.abs(fewer - more).max() > 1e-3
            np.testing.assert_array_equal(fewer[:, 0], more[:, 0])  # the noise has no history


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "diagonal"])
def test_attention_mass_equals_a_dense_reference(x64, mask):
    steps, batch = 4, ROWS // 4
    points, y = student_inputs(steps, batch=batch)
    model = ard_student(**SMALL | {"depth": 3}, steps=steps, history_layers=2, mask=mask)
    params, dense = random_params(model), []
    with jax.disable_jit():
        mass = np.asarray(model.apply({"params": params}, points[:, :-1], y, method="attention_mass"))
    dense_student(model, params, points[:, :-1], y, dense)
    heads, tokens = 2, 4
    expected = [
        layer.reshape(batch, heads, steps, tokens, steps, tokens).sum(-1).mean(axis=(1, 3)) for layer in dense[:2]
    ]
    assert_close(mass, np.stack(expected, axis=1), 1e-12)
    assert_close(mass.sum(axis=-1), np.ones((batch, 2, steps)), 1e-12)
    for block in range(steps):
        seen = np.isin(np.arange(steps), visible_blocks(mask, block))
        assert (mass[:, :, block, seen] > 0).all() and (mass[:, :, block, ~seen] == 0).all()
    assert np.ptp(mass[:, :, 1, 0]) > 1e-3  # rows and layers differ


def test_a_student_without_history_has_no_attention_mass():
    points, y = student_inputs(3)
    for fields in ({"mask": "diagonal"}, {"history_layers": 0}):
        model = ard_student(**SMALL | {"steps": 3, "history_layers": 2} | fields)
        with pytest.raises(UserError, match="without history layers pays no attention to earlier blocks"):
            params = random_params(model, dtype=np.float32)
            model.apply({"params": params}, points[:, :-1], y, method="attention_mass")


@pytest.mark.parametrize("mask", MASKS)
def test_given_points_take_the_place_of_the_students_own(x64, mask):
    """From the plain rollout, where none are given, to teacher forcing, where all are; each row has its own."""
    steps = 3
    points, y = student_inputs(steps, batch=ROWS)  # as many rows of a step as of the training forward, of `full`
    none, one, full = (slice(first, None, steps) for first in range(steps))
    model = ard_student(**SMALL, steps=steps, history_layers=1, mask=mask)
    params = random_params(model)
    is_given = jnp.arange(steps) < jnp.arange(ROWS)[:, None] % steps
    with jax.disable_jit():
        forced = forward(model, params, points[full, :-1], y[full])
        rollout = sample_student(model, params, points[:, 0], y)
        first = sample_student(model, params, points[:, 0], y, {1: points[:, 1]})
        got = predict_student(model, params, points[:, 0], y, points[:, 1:], is_given)
    np.testing.assert_array_equal(first[:, 0], points[:, 1])
    np.testing.assert_array_equal(got[none], rollout[none])
    np.testing.assert_array_equal(got[:, 0], rollout[:, 0])
    np.testing.assert_array_equal(got[one, 1:], first[one, 1:])
    assert_close(got[full], forced, 1e-12)
    assert np.abs(got[one, 1:] - rollout[one, 1:]).max(axis=(0, 2, 3, 4)).min() > 1e-3


def test_visible_blocks():
    seen = {mask: [visible_blocks(mask, block) for block in range(4)] for mask in MASKS}
    assert seen == {
        "diagonal": [(0,), (1,), (2,), (3,)],
        "window": [(0,), (0, 1), (1, 2), (2, 3)],
        "noise_and_own": [(0,), (0, 1), (0, 2), (0, 3)],
        "causal": [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)],
    }


def test_block_times_heads_and_width_of_the_mlp(x64):
    points, y = student_inputs(3)
    assert default_block_times(4, 999.0) == (999.0, 749.25, 499.5, 249.75)
    assert default_block_times(4, 0.0, 1.0) == (0.0, 0.25, 0.5, 0.75)  # a network that counts time from the noise
    default = ard_student(**SMALL, steps=3, history_layers=1)
    params = random_params(default)
    base = forward(default, params, points[:, :-1], y)
    same = ard_student(**SMALL, steps=3, history_layers=1, block_times=(999.0, 666.0, 333.0))
    np.testing.assert_array_equal(base, forward(same, params, points[:, :-1], y))
    for fields in (
        {"block_times": (999.0, 624.0, 208.0)},
        {"noise_time": 1000.0},
        {"noise_time": 0.0, "data_time": 1.0},
        {"frequency_shift": 1.0},
        {"mlp_norm_eps": 0.1},
        {"heads": "shared"},
        {"mlp_ratio": 2.6, "learn_sigma": False},
    ):
        model = ard_student(**SMALL, steps=3, history_layers=1, **fields)
        params = random_params(model)
        predictions = forward(model, params, points[:, :-1], y)
        assert_close(predictions, dense_student(model, params, points[:, :-1], y), 1e-12)
        assert np.abs(predictions - base).max() > 1e-3
    assert random_params(model)["blocks"]["mlp_in"]["kernel"].shape == (2, 8, 21)


@pytest.mark.parametrize("steps", [1, 2, 4, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (3, 5, 6))])
def test_cached_sampler_equals_the_training_forward_on_its_own_predictions(x64, steps):
    points, y = student_inputs(steps, batch=ROWS)  # as many rows of a step as of the training forward, of `some`
    rollouts = []
    for mask, history_layers in itertools.product(MASKS, range(3)):
        model = ard_student(**SMALL, steps=steps, history_layers=history_layers, mask=mask)
        if not model.layers_with_history and (mask, history_layers) != (MASKS[0], 0):
            continue  # nothing but step distillation again
        params = random_params(model, seed=steps)
        with jax.disable_jit():
            rollout = sample_student(model, params, points[:, 0], y)
        some = slice(ROWS // steps)
        inputs = np.concatenate([points[some, :1], rollout[some, :-1]], axis=1)
        assert_close(rollout[some], forward(model, params, inputs, y[some]), 1e-12)
        rollouts.append(rollout)
    assert len(rollouts) == (1 if steps == 1 else 7)
    assert all(np.abs(rollout - rollouts[0]).max() > 1e-3 for rollout in rollouts[1:])


# --- what is never formed ---


@pytest.mark.parametrize("mask", MASKS)
def test_no_mask_over_all_tokens_and_no_modulation_per_token(mask):
    batch, steps, tokens, width = 2, 4, 64, 16
    model = ard_student(
        channels=3, patch_size=2, hidden_size=width, depth=3, num_heads=2, num_classes=5, history_layers=2, mask=mask
    )
    points, y = student_inputs(steps, side=16, channels=3, dtype=np.float32)
    params = random_params(model, dtype=np.float32)

    def loss(params):
        return jnp.mean(model.apply({"params": params}, points[:, :-1], y) ** 2)

    every_token = steps * tokens
    for shape in shapes(jax.grad(loss), params):
        assert sum(size >= every_token for size in shape) < 2, shape
    modulations = [(left, right) for left, right, _, _ in products(loss, params) if right[-1:] == (6 * width,)]
    assert {left for left, _ in modulations} == {(batch * steps, width)}
    heads = [left for left, right, _, _ in products(loss, params) if right == (width, 2 * width)]
    assert heads == [(batch, width)] * steps


# --- compute settings ---


def test_remat_and_unroll_change_no_number():
    policies = ("none", "dots", "full")
    points, y = student_inputs(2, dtype=np.float32)

    def loss_of(model, *inputs):
        return lambda params: jnp.mean((model.apply({"params": params}, *inputs)[..., :2] - 1) ** 2)

    students = [ard_student(**SMALL, steps=2, history_layers=1, remat=policy) for policy in policies]
    params = random_params(students[0], dtype=np.float32)
    done = [macs(jax.grad(loss_of(student, points[:, :-1], y)), params) for student in students]
    assert done[0] < done[1] < done[2]  # the more is forgotten, the more is done again

    params = random_params(DiT(**SMALL), dtype=np.float32)
    results = [
        quick_jit(jax.value_and_grad(loss_of(DiT(**SMALL, **settings), points[:, 0], np.full(2, 500, np.float32), y)))(
            params
        )
        for settings in (*({"remat": policy} for policy in policies), {"unroll": True})
    ]
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(results[0])) > 1e-2
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other, results[0])


def test_bfloat16_is_close_to_float32_and_keeps_float32_parameters():
    points, y = student_inputs(3, dtype=np.float32)
    fields = SMALL | {"steps": 3, "history_layers": 1}
    init = parameter_shapes(ard_student(**fields, dtype=jnp.bfloat16), jnp.asarray(points[:, :-1]), jnp.asarray(y))
    assert {leaf.dtype for leaf in jax.tree.leaves(init)} == {jnp.dtype(jnp.float32)}
    params = random_params(ard_student(**fields), scale=0.2, dtype=np.float32)
    exact, _ = forward_and_rollout(ard_student(**fields), params, points[:, :-1], y)
    rounded, _ = forward_and_rollout(ard_student(**fields, dtype=jnp.bfloat16), params, points[:, :-1], y)
    assert (exact.dtype, rounded.dtype) == (jnp.float32, jnp.bfloat16)
    error = np.abs(np.asarray(rounded, np.float32) - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 3e-2
    h = layer_norm(jnp.asarray([[[1000.0, 1001.0, 1002.0, 1003.0]]]), jnp.bfloat16)  # not in bfloat16's own precision
    np.testing.assert_allclose(np.asarray(h, np.float32)[0, 0], [-1.3416, -0.4472, 0.4472, 1.3416], rtol=1e-2)


# --- sizes, starting values, training ---


def test_published_sizes():
    image, y = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    time, points = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1, 4, 32, 32, 4), jnp.float32)
    position_table_size = 256 * 1152
    fields = size_fields("DiT-XL/2")
    assert count_parameters(parameter_shapes(DiT(**fields), image, time, y)) == 675_129_632 - position_table_size
    student = ard_student(**fields, steps=4, history_layers=6)
    assert count_parameters(parameter_shapes(student, points, y)) == 683_209_856 - position_table_size
    assert size_fields("DiT-S/8") == {"patch_size": 8, "hidden_size": 384, "depth": 12, "num_heads": 6}
    with pytest.raises(
        UserError, match=r"^name is 'DiT-H/2', which is not a published size: choose one of DiT-S/2, .*DiT-XL/8"
    ):
        size_fields("DiT-H/2")


def teacher_at_the_start():
    teacher = DiT(**SMALL)
    x = jnp.zeros((1, 4, 4, 2))
    return quick_jit(teacher.init)(jax.random.key(0), x, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]


def test_a_student_starts_as_its_teacher(x64):
    teacher = DiT(**SMALL)
    teacher_params = random_params(teacher)
    points, y = student_inputs(3)
    call = quick_jit(teacher.apply)
    expected = [
        call({"params": teacher_params}, points[:, b], jnp.full(2, time), y)[..., :2]
        for b, time in enumerate(default_block_times(3, 999.0))
    ]
    for heads in ("separate", "shared"):
        student = ard_student(**SMALL, steps=3, history_layers=2, mask="diagonal", heads=heads)
        params = init_from_teacher(teacher_params, student)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(
            lambda leaf: leaf.shape, shapes_of(student, points[:, :-1], y)
        )
        assert params["blocks"] is teacher_params["blocks"]
        assert_close(quick_jit(student.apply)({"params": params}, points[:, :-1], y), np.stack(expected, axis=1), 1e-12)


def test_every_parameter_moves_in_training_and_the_teacher_stays():
    teacher_params = teacher_at_the_start()
    student = ard_student(**SMALL, steps=4, history_layers=1)
    start = init_from_teacher(teacher_params, student)
    before, teacher_before = jax.tree.map(np.array, start), jax.tree.map(np.array, teacher_params)
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), optax.adamw(1e-2, weight_decay=0.0)
    state = init_state(start, optimizer, seed=0, mesh=mesh)
    step = make_step(ard(student, target="x0", columns=(0, 1, 2, 3)), optimizer, 0.9, mesh, state)
    points, y = student_inputs(4, dtype=np.float32)
    batch = {"noise": points[:, 0], "x0": points[:, 1:], "condition": y}
    for _ in range(4):  # adaLN-Zero lets the gradient through to the inside only after a few
        state, metrics = step(state, None, batch)
    assert int(state.step) == 4 and np.isfinite(metrics["loss"])
    for params in (state.params, state.ema):
        moved = jax.tree.map(lambda new, old: np.asarray(new) != old, params, before)
        for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
            stacked = path[0].key in ("blocks", "final_layer")  # every layer and every head of its own
            rows = leaf.reshape(len(leaf), -1) if stacked else leaf.reshape(1, -1)
            assert rows.any(axis=1).all(), jax.tree_util.keystr(path)
    jax.tree.map(np.testing.assert_array_equal, teacher_params, teacher_before)  # its memory was not given away


# --- bad input ---


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"history_layers": 3}, "history_layers is 3, but the model has 2 layers: choose a number from 0 to 2."),
        ({"history_layers": -1}, "history_layers is -1, but the model has 2 layers: choose a number from 0 to 2."),
        ({"mask": "full"}, "mask is 'full', .* choose one of diagonal, window, noise_and_own, causal."),
        ({"heads": "some"}, "heads is 'some': choose one of separate, shared."),
        ({"steps": 0}, "steps is 0: a student makes at least 1 step."),
        ({"block_times": (1.0, 0.5)}, "block_times has 2 times for 3 steps: give one time a step, or none."),
        ({"num_heads": 3}, "hidden_size 8 with 3 heads does not work: it must be a multiple of the number of heads"),
        ({"hidden_size": 10}, "hidden_size 10 with 2 heads does not work: .* and of 4."),
        ({"remat": "some"}, "remat is 'some': choose one of none, dots, full."),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        ard_student(**({"steps": 3, "history_layers": 1} | SMALL | fields))


def test_bad_inputs():
    student = ard_student(**SMALL, steps=3, history_layers=1)
    params = random_params(student, dtype=np.float32)
    y = jnp.zeros(1, jnp.int32)
    for shape, sentence in {
        (1, 4, 4, 4, 2): "a student of 3 steps was given 4 points: its input is the noise and the 2 points after it.",
        (
            1,
            3,
            5,
            4,
            2,
        ): "images of 5×4 cannot be cut into patches of 2×2: choose a patch size that divides both sides.",
        (1, 3, 4, 4, 3): "images of 3 channels were given to a model of 2 channels: .* channels last.",
    }.items():
        with pytest.raises(UserError, match=sentence):
            student.apply({"params": params}, jnp.zeros(shape), y)
    with pytest.raises(UserError, match="mask is 'all', which does not exist"):
        visible_blocks("all", 1)
