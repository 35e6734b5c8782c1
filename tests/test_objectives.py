import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from networks import ard_student, draw_noise_and_labels, solve_of
from quick import quick_jit

from ard_jax.conditions import draw_numbers
from ard_jax.config import default_config
from ard_jax.convert import from_torch
from ard_jax.diffusion import FlowMatching, LinearVP
from ard_jax.errors import UserError
from ard_jax.methods import training_flops
from ard_jax.models import DiT, parameter_shapes
from ard_jax.objectives import KEPT
from ard_jax.objectives.ard import ard, online_ard
from ard_jax.objectives.denoising import denoising
from ard_jax.parallel import make_mesh
from ard_jax.sampling import is_within_bounds, sample_student, sample_teacher, take_points, trajectory_key
from ard_jax.training.state import init_state, learning_rate, make_optimizer, make_step
from configs import digits

OPTIMIZER = default_config().distill.optimizer.to_dict()

KEY = jax.random.key(0)

# --- distillation ---


def test_ard_loss_equals_the_published_implementation(golden):
    run = quick_jit(lambda objective, *inputs: objective(*inputs), static_argnums=0)
    objective = None
    for kind in ("tiny", "strong"):
        arrays = golden(f"ard_{kind}")
        student, params = from_torch(arrays.state_dict(), num_heads=2, history_layers=2)
        objective = objective or ard(student, target="x0", columns=(1, 3, 4, 5))
        points = [arrays.images(name) for name in ("z15", "z10", "z5", "z0")]
        unused = np.full_like(points[0], 1e6)  # points of the store that this student does not have
        record = np.stack([unused, points[0], unused, *points[1:]], axis=1)
        batch = {"noise": arrays.images("zT"), "x0": record, "condition": arrays["y"]}
        loss, metrics = run(objective, params, None, batch, KEY)
        np.testing.assert_allclose(loss, arrays["loss/n2"].mean(), rtol=2e-6)
        np.testing.assert_allclose(loss, arrays["loss_f64_mean"], rtol=2e-6)
        predictions = [arrays.images(f"forward/n2/pred_{name}")[..., :4] for name in ("z15", "z10", "z5", "z0")]
        for step, (prediction, point) in enumerate(zip(predictions, points, strict=True), start=1):
            expected = np.mean((prediction.astype(np.float64) - point) ** 2)
            np.testing.assert_allclose(metrics[f"loss_step_{step}"], expected, rtol=1e-5)
        assert len(metrics) == 4


def test_steps_may_weigh_more_and_errors_be_less_than_square(golden):
    arrays = golden("ard_tiny")
    student, params = from_torch(arrays.state_dict(), num_heads=2, history_layers=2)
    names = ("z15", "z10", "z5", "z0")
    points = np.stack([arrays.images(name) for name in names], axis=1)
    predictions = np.stack([arrays.images(f"forward/n2/pred_{name}")[..., :4] for name in names], axis=1)
    square = np.mean((predictions.astype(np.float64) - points) ** 2, axis=(2, 3, 4))
    steps = np.mean(np.sqrt(square + 0.5**2) - 0.5, axis=0)
    batch = {"noise": arrays.images("zT"), "x0": points, "condition": arrays["y"]}
    objective = ard(student, target="x0", columns=(0, 1, 2, 3), weights=(8.0, 4.0, 0.5, 2.0), huber=0.5)
    loss, metrics = quick_jit(objective)(params, None, batch, KEY)
    np.testing.assert_allclose([metrics[f"loss_step_{step}"] for step in (1, 2, 3, 4)], steps, rtol=1e-5)
    np.testing.assert_allclose(loss, (8 * steps[0] + 4 * steps[1] + steps[2] / 2 + 2 * steps[3]) / 14.5, rtol=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, 0.0, 1.0, 1.0)])
def test_weights_that_are_not_one_for_each_step_are_refused(weights):
    config = digits.get_config()
    config.distill.ard.step_weights = weights
    with pytest.raises(
        UserError, match=r"distill.ard.step_weights is \(1.0, .*, but the student has 4 steps: give a number"
    ):
        training_flops(config)


def test_own_history_needs_one():
    config = digits.get_config()
    config.distill.ard.own_history = True
    assert training_flops(config) == 8 / 6 * training_flops(digits.get_config())
    config.student.points = (0,)
    with pytest.raises(UserError, match="own_history is True, but a student of one step has no history"):
        training_flops(config)


SHAPE = (4, 4, 2)
STEPS = 4
POINTS = (3, 1, 0)
POSITIONS = jnp.asarray([4, 0, 11, 7, 2, 9], jnp.int32)
SOLVE = solve_of(steps=STEPS, guided_channels=0)


@pytest.fixture(scope="module")
def networks():
    """A teacher, a student, and parameters of both that are large enough to matter."""
    fields = dict(channels=2, patch_size=2, hidden_size=8, num_heads=2, num_classes=3)
    teacher, student = DiT(**fields, depth=1), ard_student(**fields, depth=1, steps=3, history_layers=1)
    label, time = jnp.zeros(1, jnp.int32), jnp.zeros(1)
    shapes = (
        parameter_shapes(teacher, jnp.zeros((1, *SHAPE)), time, label),
        parameter_shapes(student, jnp.zeros((1, 3, *SHAPE)), label),
    )
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    return teacher, student, *(jax.tree.map(draw, tree) for tree in shapes)


def evaluate(objective, *inputs):
    return quick_jit(objective)(*inputs, KEY)


def assert_same(left, right):
    """Equal but for rounding, as large as the largest number of an array."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), left, right)


def positions(rows, seed=5):
    """What the online objective is given: positions in the stream, and what is drawn for them."""
    return {"position": rows, "condition": draw_numbers(trajectory_key(seed), rows, 3)}


def stored(teacher, params, seed):
    """What the trajectory job would store at `POSITIONS`: the noise, the label and all points, indices falling."""

    noise, label = draw_noise_and_labels(trajectory_key(seed), POSITIONS, SHAPE, teacher.num_classes)

    @quick_jit
    def job(params):
        solution = sample_teacher(teacher, params, noise, label, SOLVE)
        points = {name: take_points(getattr(solution, name), (3, 2, 1, 0), STEPS) for name in ("x0", "xt")}
        return {"noise": noise, "condition": label} | points

    return job(params)


@pytest.mark.parametrize("target", ["x0", "xt"])
def test_online_distillation_equals_that_from_the_store(networks, target):
    teacher, student, teacher_params, params = networks
    settings = dict(points=POINTS, shape=SHAPE, seed=5, how=SOLVE)
    columns = (0, 2, 3)  # of the points 3, 1, 0 among 3, 2, 1, 0
    records = stored(teacher, teacher_params, seed=5)
    from_store = ard(student, target=target, columns=columns)
    expected = evaluate(from_store, params, None, records)

    def solved_online(max_abs):
        online = online_ard(student, teacher, target=target, max_abs=max_abs, **settings)
        loss, metrics = evaluate(online, params, teacher_params, positions(POSITIONS))
        return metrics.pop(KEPT), (loss, metrics)

    number, found = solved_online(0.0)
    assert_same(found, expected)
    assert number == len(POSITIONS)
    assert expected[0] > 1e-2

    # dropped trajectories count neither in the sum nor in the number
    largest = jnp.abs(records["x0"][:, jnp.asarray(columns)]).max(axis=(1, 2, 3, 4))
    max_abs = float(np.median(largest))
    kept = np.flatnonzero(is_within_bounds(records["x0"][:, jnp.asarray(columns)], max_abs))
    assert len(kept) == 3
    rest = jax.tree.map(lambda array: array[kept], records)
    number, found = solved_online(max_abs)
    assert_same(found, evaluate(from_store, params, None, rest))
    assert number == len(kept)


def test_a_dropped_trajectory_counts_the_same_in_whichever_part_of_a_step_it_is(networks):
    """Of a step in two parts the one has three trajectories and the other two: each is a fifth of the step's mean."""
    teacher, student, teacher_params, params = networks
    points = stored(teacher, teacher_params, seed=5)["x0"][:, jnp.asarray((0, 2, 3))]
    limit = float(np.sort(np.abs(points).max(axis=(1, 2, 3, 4)))[-2:].mean())
    how = dict(target="x0", points=POINTS, shape=SHAPE, seed=5, max_abs=limit, how=SOLVE)
    objective, optimizer, mesh = online_ard(student, teacher, **how), optax.sgd(1.0), make_mesh()

    def after(accumulate):
        state = init_state(params, optimizer, 0, mesh)
        step = make_step(objective, optimizer, 0.9, mesh, state, teacher_params, accumulate)
        state, metrics = step(state, teacher_params, positions(POSITIONS))
        return jax.tree.map(jnp.subtract, state.params, params), metrics

    whole, parts = after(1), after(2)
    assert_same(parts, whole)
    assert set(whole[1]) == {"loss", *(f"loss_step_{n}" for n in (1, 2, 3)), "gradient_norm", "parameter_norm"}


@pytest.mark.slow
def test_trajectories_that_blow_up_do_no_harm_online(networks):
    teacher, student, teacher_params, params = networks
    table = teacher_params["label_embed"]["embedding"]
    broken = teacher_params | {"label_embed": {"embedding": table.at[1].set(jnp.nan)}}
    labels = np.asarray(stored(teacher, teacher_params, seed=5)["condition"])
    sound = POSITIONS[np.flatnonzero(labels != 1)]
    assert 0 < len(sound) < len(POSITIONS)
    objective = online_ard(student, teacher, target="x0", points=POINTS, shape=SHAPE, seed=5, max_abs=0.0, how=SOLVE)
    with_gradient = quick_jit(jax.value_and_grad(objective, has_aux=True))
    value, gradient = with_gradient(params, broken, positions(POSITIONS), KEY)
    assert_same(value, evaluate(objective, params, broken, positions(sound)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)) and optax.tree.norm(gradient) > 0.1
    everything = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), teacher_params)
    (loss, _), gradient = with_gradient(params, everything, positions(POSITIONS), KEY)
    assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


# --- the teacher's objective ---


class Probe:
    """Stands in for a network: remembers what it was called with, and puts out zeros (and a variance, far off)."""

    num_classes = 10

    def unconditional(self, condition):
        return jnp.full_like(condition, self.num_classes)

    channels = 3

    def __init__(self, learn_sigma=False):
        self.learn_sigma = learn_sigma

    def apply(self, variables, x, t, y):
        self.x, self.t, self.y = (np.asarray(array) for array in (x, t, y))
        return jnp.concatenate([jnp.zeros_like(x), jnp.full_like(x, 1e6)], -1) if self.learn_sigma else 0 * x


def images(count):
    rng = np.random.default_rng(1)
    return {
        "image": jnp.asarray(rng.uniform(-1, 1, (count, 2, 4, 3)), jnp.float32),
        "condition": jnp.asarray(rng.integers(0, 10, count), jnp.int32),
        "position": jnp.asarray(rng.choice(10_000, count, replace=False), jnp.int32),
    }


def drawn(batch, process=FlowMatching(1.0), key=KEY, label_dropout=0.5, horizontal_flip=True, learn_sigma=False):  # noqa: B008
    """What the objective drew for a batch: the image as flipped, noise, time, label, and the loss."""
    probe = Probe(learn_sigma)
    objective = denoising(probe, process, label_dropout=label_dropout, horizontal_flip=horizontal_flip)
    loss, metrics = objective({}, None, batch, key)
    assert metrics == {}
    x, t, y = probe.x, probe.t, probe.y
    objective({}, None, batch | {"image": jnp.zeros_like(batch["image"])}, key)
    noised_only = np.asarray(process.noised(jnp.zeros_like(x), jnp.ones_like(x), jnp.asarray(t)))
    noise = probe.x / noised_only
    image = (x - probe.x) / np.asarray(process.noised(jnp.ones_like(x), jnp.zeros_like(x), jnp.asarray(t)))
    return image, noise, t, y, float(loss)


@pytest.mark.parametrize("process", [FlowMatching(1.0), LinearVP()], ids=["flow", "vp"])
def test_denoising_draws_what_it_should(process):
    batch = images(400)
    image, noise, t, y, loss = drawn(batch, process, label_dropout=0.2)
    given, mirrored = np.asarray(batch["image"]), np.asarray(batch["image"])[:, :, ::-1]
    error = [np.abs(image - other).max(axis=(1, 2, 3)) for other in (given, mirrored)]
    sure = t < 0.9 * process.noise_time  # near pure noise the image cannot be told
    assert np.minimum(*error)[sure].max() < 1e-2
    flipped = error[1] < error[0]
    assert 0.4 < flipped[sure].mean() < 0.6
    dropped = y == Probe.num_classes
    assert 0.14 < dropped.mean() < 0.26  # three standard deviations
    np.testing.assert_array_equal(y[~dropped], np.asarray(batch["condition"])[~dropped])
    assert 0.45 < t.mean() / process.noise_time < 0.55 and len(np.unique(t)) > 300
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    for one, other in ((flipped, dropped), (flipped, t > np.median(t)), (dropped, t > np.median(t))):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.16  # drawn apart
    # what the network should have put out: the noise, or the velocity ε − x_0
    target = noise - np.where(flipped[:, None, None, None], mirrored, given) if process != LinearVP() else noise
    assert loss == pytest.approx(np.mean(target**2), rel=1e-3)


def test_denoising_draws_by_seed_and_position_alone():
    batch = images(24)
    whole = drawn(batch)
    rows = np.random.default_rng(2).permutation(24)[:10]  # in other places, and among other neighbours
    others = jax.tree.map(lambda array: array[14:], images(24) | {"position": jnp.arange(10_000, 10_024)})
    mixed = jax.tree.map(lambda array, other: jnp.concatenate([array[rows], other, array[:4]]), batch, others)
    for ours, expected in zip(drawn(mixed)[:4], whole[:4], strict=True):
        np.testing.assert_allclose(ours[:10], expected[rows], rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours[20:], expected[:4], rtol=0, atol=1e-6)
    for changed in (drawn(batch, key=jax.random.key(1)), drawn(batch | {"position": batch["position"] + 1})):
        assert not np.isin(changed[2], whole[2]).any()
        assert (changed[3] != whole[3]).any()


def test_denoising_without_augmentation_and_with_a_learned_variance():
    batch = images(24)
    image, *_, y, loss = drawn(batch, label_dropout=0.0, horizontal_flip=False)
    np.testing.assert_allclose(image, batch["image"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(y, batch["condition"])
    *_, y, _ = drawn(batch, label_dropout=1.0)
    np.testing.assert_array_equal(y, np.full(24, Probe.num_classes))
    assert drawn(batch, label_dropout=0.0, horizontal_flip=False, learn_sigma=True)[-1] == loss


# --- optimisers by name ---


def settings(**changed):
    return ml_collections.ConfigDict(OPTIMIZER | changed)


@pytest.mark.parametrize("name", ["adamw", "lion", "nadamw", "adan"])
def test_weight_decay_is_what_the_config_says_and_not_what_optax_would_take(name):
    params = {"w": jnp.ones(3)}

    def moved(decay):
        optimizer = make_optimizer(settings(name=name, learning_rate=0.1, weight_decay=decay), 10)
        updates, _ = optimizer.update({"w": jnp.zeros(3)}, optimizer.init(params), params)
        return optax.apply_updates(params, updates)["w"]

    np.testing.assert_array_equal(moved(0.0), params["w"])
    np.testing.assert_allclose(moved(0.5), 0.95, rtol=1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "adamm"}, {"name": "chain"}, {"name": "lbfgs"}, {"weight_decay": 0.1, "name": "adam"}, {"clip": -1.0},
        {"schedule": "linear"}, {"warmup_steps": 10}, {"warmup_steps": -1},
    ],
)  # fmt: skip
def test_bad_optimisers(changed):
    with pytest.raises(UserError) as error:
        make_optimizer(settings(**changed), 10)
    assert error.value.key == next(iter(changed))


def test_warm_up_then_constant():
    rate = learning_rate(settings(warmup_steps=4, learning_rate=1.0), 10)
    np.testing.assert_allclose([rate(step) for step in range(7)], [0, 0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)


def test_own_history_is_the_error_of_the_rollout_whose_points_are_data_to_the_gradient(networks):
    _, student, _, params = networks
    rng = np.random.default_rng(1)
    noise, states = rng.normal(size=(2, *SHAPE)), rng.normal(size=(2, 3, *SHAPE))
    batch = {"noise": noise, "x0": states, "condition": jnp.asarray([0, 2])}
    batch = jax.tree.map(jnp.asarray, batch)
    objective = ard(student, target="x0", columns=(0, 1, 2), own_history=True)
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(params, None, batch, None)

    own = sample_student(student, params, batch["noise"].astype("float32"), batch["condition"])
    errors = np.mean((np.asarray(own) - states) ** 2, axis=(0, 2, 3, 4))
    np.testing.assert_allclose([metrics[f"loss_step_{step + 1}"] for step in range(3)], errors, rtol=1e-5)
    np.testing.assert_allclose(loss, errors.mean(), rtol=1e-5)

    def given_own(params):  # the rollout as data
        inputs = jnp.concatenate([batch["noise"][:, None].astype("float32"), own[:, :-1]], axis=1)
        return jnp.mean((student.apply({"params": params}, inputs, batch["condition"]) - batch["x0"]) ** 2)

    expected = jax.grad(given_own)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected)
