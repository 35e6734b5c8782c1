"""The adversarial objective against the same losses written out and differentiated whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import macs
from networks import ard_student
from quick import quick_jit

from ard_jax.diffusion import FlowMatching, LinearVP
from ard_jax.models import DiT, init_from_teacher, parameter_shapes
from ard_jax.models.discriminator import normalise_kernels, power_iteration, spectral_norms
from ard_jax.objectives.adversarial import DISCRIMINATOR, adversarial_method, flip_at_random, make_judge
from ard_jax.objectives.ard import ard

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
COLUMNS = (0, 2)
BATCH, WARMUP, WEIGHT = 4, 5, 10.0
FIELDS = dict(channels=1, patch_size=2, hidden_size=8, num_heads=2, num_classes=3, depth=3, learn_sigma=False)


@pytest.fixture(scope="module", params=["separate", pytest.param("shared", marks=pytest.mark.slow)])
def given(request):
    """The networks, large random parameters of all, the spectral vectors, and a batch."""
    student = ard_student(**FIELDS, steps=2, history_layers=1, heads=request.param)
    judge = make_judge(DiT(**FIELDS), (0, 2), LinearVP(), 0.0)
    teacher_shapes = parameter_shapes(judge.teacher, jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    teacher = jax.tree.map(draw, teacher_shapes)
    params = jax.tree.map(draw, jax.eval_shape(lambda tree: init_from_teacher(tree, student), teacher_shapes))
    others, memory = quick_jit(method(student, judge).begin)(params, teacher, KEY)
    label = np.asarray(rng.integers(0, 3, (2, BATCH)), np.int32)
    trajectory = {"noise": rng.normal(size=(BATCH, *SHAPE)), "x0": rng.normal(size=(BATCH, 3, *SHAPE))}
    batch = {
        "trajectory": jax.tree.map(jnp.float32, trajectory) | {"condition": label[0], "position": np.arange(BATCH)},
        "real": {
            "image": jnp.asarray(rng.normal(size=(BATCH, *SHAPE)), jnp.float32),
            "condition": label[1],
            "position": np.arange(10, 10 + BATCH),
        },
    }
    return student, judge, {"student": params, **others}, memory, teacher, batch


def method(student, judge, horizontal_flip=False):
    return adversarial_method(
        student,
        judge,
        shape=SHAPE,
        target="x0",
        columns=COLUMNS,
        horizontal_flip=horizontal_flip,
        weight=WEIGHT,
        warmup=WARMUP,
        spectral_rounds=30,
        optimizer={},
    )


@pytest.fixture(scope="module")
def computed(given):
    """(gradients, memory, metrics) at the last step of the warm-up and at the one after."""
    student, judge, *inputs = given
    run = quick_jit(method(student, judge).objective.gradients)
    return {step: run(*inputs, KEY, step) for step in (WARMUP - 1, WARMUP)}


@pytest.fixture(scope="module")
def written_out(given):
    """Losses by plain forward passes, and their gradients, each differentiated whole."""
    student, judge, networks, memory, teacher, batch = given
    vectors = quick_jit(power_iteration)(networks[DISCRIMINATOR], memory)
    trajectory, real = batch["trajectory"], batch["real"]
    points = trajectory["x0"][:, jnp.asarray(COLUMNS)]

    def logits(heads, images, label):
        tokens, condition = judge.teacher.apply({"params": teacher}, images, jnp.zeros(BATCH), label, method="features")
        chosen = tokens[jnp.asarray([0, 2])]
        return judge.heads.apply({"params": normalise_kernels(heads, vectors)}, chosen, condition)

    def fake(params):
        inputs = jnp.stack([trajectory["noise"], points[:, 0]], axis=1)
        return student.apply({"params": params}, inputs, trajectory["condition"])[:, -1]

    def regression(params):
        return ard(student, target="x0", columns=COLUMNS)(params, None, trajectory, KEY)[0]

    def generator(params, heads):
        return -jnp.mean(logits(heads, fake(params), trajectory["condition"]))

    def discriminator(heads, params):
        on_real, on_fake = (
            logits(heads, real["image"], real["condition"]),
            logits(heads, fake(params), trajectory["condition"]),
        )
        loss = jnp.mean(jnp.maximum(0, 1 - on_real)) + jnp.mean(jnp.maximum(0, 1 + on_fake))
        return loss, (jnp.mean(on_real > 0), jnp.mean(on_fake < 0))

    @quick_jit
    def run(params, heads):
        (loss, right), to_heads = jax.value_and_grad(discriminator, has_aux=True)(heads, params)
        return {
            "regression": jax.value_and_grad(regression)(params),
            "generator": jax.value_and_grad(generator)(params, heads),
            "discriminator": (loss, to_heads),
            "right": right,
        }

    return run(networks["student"], networks[DISCRIMINATOR]) | {"vectors": vectors}


def assert_same(left, right):
    """Equal but for rounding, as large as the largest number of an array."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max() + 1e-7), left, right)


def last_kernel_norm(gradient):
    kernel = np.asarray(gradient["final_layer"]["linear"]["kernel"])
    return np.linalg.norm(kernel[-1] if kernel.ndim == 3 else kernel)


def test_the_student_follows_both_losses(computed, written_out):
    gradients, _, metrics = computed[WARMUP]
    (_, regression), (_, generator) = written_out["regression"], written_out["generator"]
    factor = WEIGHT * last_kernel_norm(regression) / (last_kernel_norm(generator) + 1e-4)
    assert factor > 0.1 and metrics["adaptive_weight"] == pytest.approx(factor, rel=1e-4)
    assert_same(gradients["student"], jax.tree.map(lambda a, b: a + factor * b, regression, generator))
    assert optax.tree.norm(generator) * factor > optax.tree.norm(regression)  # or the test would see one loss alone


def test_the_discriminator_follows_the_hinge(computed, written_out):
    for step in (WARMUP - 1, WARMUP):
        assert_same(computed[step][0][DISCRIMINATOR], written_out["discriminator"][1])


def test_metrics_are_the_losses(computed, written_out):
    metrics = computed[WARMUP][2]
    for name in ("regression", "generator", "discriminator"):
        assert metrics[f"loss_{name}"] == pytest.approx(float(written_out[name][0]), rel=1e-4)
    assert metrics["loss"] == pytest.approx(
        float(metrics["loss_regression"] + metrics["adaptive_weight"] * metrics["loss_generator"]), rel=1e-5
    )
    assert (metrics["right_real"], metrics["right_fake"]) == written_out["right"]
    assert metrics["loss_step_1"] + metrics["loss_step_2"] == pytest.approx(2 * float(metrics["loss_regression"]))


def test_during_the_warm_up_the_student_only_regresses(computed, written_out):
    gradients, _, metrics = computed[WARMUP - 1]
    assert metrics["adaptive_weight"] == 0 and metrics["loss"] == metrics["loss_regression"]
    assert_same(gradients["student"], written_out["regression"][1])


def test_each_step_turns_the_spectral_vectors_once(given, computed, written_out):
    memory = computed[WARMUP][1]
    assert_same(memory, written_out["vectors"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), memory, given[3])
    assert max(jax.tree.leaves(moved)) > 1e-5


def test_the_trunk_is_gone_through_once_and_each_side_costs_what_it_must(given):
    """All multiply-accumulates are those of the formula: one backward pass, none into the teacher's weights."""
    student, judge, *inputs = given
    made = method(student, judge)
    assert made.reads == "teacher" and set(computed_networks(made, inputs)) == {"student", DISCRIMINATOR}
    total = macs(lambda *inputs: made.objective.gradients(*inputs, KEY, WARMUP), *inputs)
    assert total == pytest.approx(BATCH * made.flops / 2, rel=0.08)


def computed_networks(made, inputs):
    return jax.eval_shape(lambda *inputs: made.objective.gradients(*inputs, KEY, 0), *inputs)[0]


def test_real_images_are_mirrored_by_key_and_position():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(200, 2, 4, 1)), jnp.float32)
    positions = jnp.arange(200)
    mirrored = flip_at_random(KEY, positions, images)
    is_mirrored = np.abs(mirrored - images[:, :, ::-1]).max(axis=(1, 2, 3)) == 0
    np.testing.assert_array_equal(mirrored[~is_mirrored], images[~is_mirrored])
    assert 70 < is_mirrored.sum() < 130
    np.testing.assert_array_equal(flip_at_random(KEY, positions[50:60], images[50:60]), mirrored[50:60])
    assert not np.array_equal(flip_at_random(jax.random.key(1), positions, images), mirrored)


def test_only_the_real_images_are_mirrored(given, computed):
    student, judge, *inputs = given
    _, _, metrics = quick_jit(method(student, judge, horizontal_flip=True).objective.gradients)(*inputs, KEY, WARMUP)
    before = computed[WARMUP][2]
    for name in ("loss_regression", "loss_generator"):
        assert metrics[name] == pytest.approx(float(before[name]), rel=1e-6)
    assert abs(metrics["loss_discriminator"] - before["loss_discriminator"]) > 1e-4


def test_warm_vectors_begin(given):
    """Vectors that have been turned before the first step give positive sigmas, as fresh ones do not."""
    _, _, networks, memory, *_ = given
    for sigma in spectral_norms(networks[DISCRIMINATOR], memory).values():
        assert (sigma > 0.3).all()


def test_at_a_later_time_the_teacher_sees_noised_images():
    """The same network time and noise level as in its training; by key and position, whoever stands beside."""
    seen = {}

    class Probe(DiT):
        def apply(self, variables, images, time, label, layers, method):
            seen.update(images=images, time=time)

    images = jnp.full((40, 8, 8, 1), 2.0)
    for process, time in ((FlowMatching(10.0), 3.0), (FlowMatching(10.0, True), 7.0)):
        judge = make_judge(Probe(**FIELDS), (), process, 0.3)
        judge.features({}, images, None, KEY, jnp.arange(40))
        noise = (seen["images"] - 0.7 * images) / 0.3
        assert seen["time"][0] == pytest.approx(time) and abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
        before = seen["images"]
        judge.features({}, images[:5], None, KEY, jnp.arange(10, 15))
        np.testing.assert_array_equal(seen["images"], before[10:15])
    make_judge(Probe(**FIELDS), (), FlowMatching(10.0, True), 0.0).features({}, images, None, KEY, jnp.arange(40))
    np.testing.assert_array_equal(seen["images"], images)
    assert seen["time"][0] == 10.0


@pytest.mark.parametrize("process", [LinearVP(), FlowMatching()])
def test_noise_does_not_tell_a_fake_from_an_image(process):
    """On an accelerator a student's samples are bfloat16, and what is loaded is not: numbers alike look alike."""
    judge = make_judge(DiT(**FIELDS, dtype=jnp.bfloat16), (), process, 0.3)
    images = jax.random.normal(KEY, (4, *SHAPE)).astype(jnp.bfloat16)
    label, position = jnp.zeros(4, jnp.int32), jnp.arange(4)
    shapes = parameter_shapes(judge.teacher, jnp.zeros((1, *SHAPE)), jnp.zeros(1), label[:1])
    rng = np.random.default_rng(0)
    teacher = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    look = quick_jit(judge.features)
    fake, real = (look(teacher, seen, label, KEY, position)[0] for seen in (images, images.astype(jnp.float32)))
    np.testing.assert_array_equal(fake, real)


def test_a_teacher_of_whole_timesteps_is_told_the_one_that_its_image_is_noised_to():
    seen = {}

    class Probe(DiT):
        def apply(self, variables, images, time, label, layers, method):
            seen.update(images=images, time=time)

    judge, zeros = make_judge(Probe(**FIELDS), (), LinearVP(), 0.03), jnp.zeros((1000, 4, 4, 1))  # .03 · 999 is 29.97
    judge.features({}, zeros, None, KEY, jnp.arange(1000))
    assert set(np.asarray(seen["time"]).tolist()) == {30.0}
    signal = LinearVP().alphas_cumprod()
    assert abs(seen["images"].std() - (1 - signal[30]) ** 0.5) < abs(seen["images"].std() - (1 - signal[29]) ** 0.5)
