"""The methods that ARD is compared with, against the same in NumPy and float64 on networks of three numbers."""

import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jaxprs import macs
from networks import solve_of
from pipeline_fixtures import copy, done, sentence, smoke
from quick import quick_jit
from rivals_fixtures import (
    CLASSES,
    KEY,
    PARAMS,
    PROCESSES,
    ROWS,
    SCALE,
    SHAPE,
    TEACHER,
    Exact,
    Toy,
    at,
    drawn,
    float64,
    given,
    make_batch,
    nodes_of,
    noised,
    predict,
    row,
    toy_output,
)

from ard_jax import methods
from ard_jax.build import make_student, make_teacher
from ard_jax.checks import validate
from ard_jax.config import default_config
from ard_jax.diffusion import FlowMatching, Guidance, LinearVP, few_step_process, guided_output
from ard_jax.errors import UserError
from ard_jax.models import DiT, parameter_shapes
from ard_jax.models.flops import teacher_macs
from ard_jax.objectives import (
    STUDENT,
    Joint,
    Method,
    consistency,
    distribution_matching,
    mean_flow,
    progressive,
    scores,
    trajectory_matching,
)
from ard_jax.objectives.adversarial import DISCRIMINATOR, flip_at_random, judging_flops, make_judge
from ard_jax.objectives.denoising import denoising
from ard_jax.objectives.few_steps import draw_nodes, mix_noise
from ard_jax.parallel import make_mesh
from ard_jax.sampling import NO_GUIDANCE, fresh_noise, student_rollout, teacher_predictor
from ard_jax.training.state import init_state, make_step, optimizer_of
from configs import smoke as smoke_config

OPTIMIZER = default_config().distill.optimizer.to_dict()


@pytest.fixture(scope="module")
def batch():
    return make_batch()


# ------------------------------------------------------------------------------------------------- states at nodes


def test_states_are_drawn_by_seed_and_position_alone(batch):
    positions = np.arange(4000)
    node, noise = draw_nodes(KEY, positions, range(2, 6), SHAPE)
    assert np.bincount(node, minlength=7).tolist()[:2] == [0, 0] and node.max() == 5
    np.testing.assert_allclose(np.bincount(node)[2:] / 4000, 0.25, atol=0.03)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    some = np.array([7, 3999, 12])
    again = draw_nodes(KEY, some, range(2, 6), SHAPE)
    np.testing.assert_array_equal(again[0], node[some])
    np.testing.assert_array_equal(again[1], noise[some])
    assert not np.isin(draw_nodes(jax.random.key(4), some, range(2, 6), SHAPE)[1], noise).any()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_guidance_with_a_time_a_row(process, batch):
    guidance = Guidance(3.0, 0, (0.3, 0.7))
    times = np.linspace(0, 999, ROWS).astype(np.float32)
    x, y = batch["noise"], batch["condition"]
    guided = guided_output(Toy(), TEACHER, x, jnp.asarray(times), y, guidance, process)
    scalar = jax.jit(lambda x, time, y: guided_output(Toy(), TEACHER, x, time, y, guidance, process))
    each = [scalar(x[i : i + 1], times[i], y[i : i + 1])[0] for i in range(ROWS)]
    np.testing.assert_allclose(guided, each, rtol=1e-5, atol=1e-6)
    plain = guided_output(Toy(), TEACHER, x, jnp.asarray(times), y, NO_GUIDANCE, process)
    assert 8 <= (np.abs(guided - plain).max(axis=(1, 2, 3)) > 1e-3).sum() <= 10  # two fifths of the way


# ---------------------------------------------------------------------------------------------------- progressive


@pytest.mark.parametrize("start", [None, 6], ids=["teacher", "student"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_progressive_distillation_is_two_ddim_steps_in_one(process, start, batch):
    steps = 3 if isinstance(process, FlowMatching) else 4
    start = start and 2 * steps
    objective = progressive.progressive(given(process, (3, 2, 1, 0)[-steps:], start=start, kind="deterministic"))
    loss, metrics = objective(PARAMS, TEACHER, batch, KEY)
    node, noise = drawn(KEY, batch, range(steps))
    y, x0 = batch["condition"], batch["x0"][:, 2].astype(np.float64)
    x = noised(process, steps, x0, noise, node)
    how = {"velocity": start is not None, "scale": 1.0 if start else SCALE}
    middle = noised(process, 2 * steps, *at(process, 2 * steps, TEACHER, x, y, 2 * node, **how), 2 * node + 1)
    end = noised(process, 2 * steps, *at(process, 2 * steps, TEACHER, middle, y, 2 * node + 1, **how), 2 * node + 2)
    alpha, sigma, _ = nodes_of(process, steps)
    a, s, next_a, next_s = row(alpha, node), row(sigma, node), row(alpha, node + 1), row(sigma, node + 1)
    target = (end - next_s / s * x) / (next_a - next_s / s * a)
    # one step with that x_0, and the ε that goes with it, arrives where the two do
    np.testing.assert_allclose(next_a * target + next_s * (x - a * target) / s, end, rtol=1e-9, atol=1e-9)
    error = np.mean((at(process, steps, PARAMS, x, y, node, velocity=True)[0] - target) ** 2, axis=(1, 2, 3))
    weight = np.maximum((a / s) ** 2, 1)[:, 0, 0, 0]
    assert metrics["unweighted"] == pytest.approx(error.mean(), rel=2e-4)
    assert loss == pytest.approx(np.mean(weight * error), rel=2e-4)
    assert weight.max() > 1.05 and loss > 0.01


def test_a_perfect_student_of_progressive_distillation_has_no_loss(batch):
    process = LinearVP()
    networks = {"teacher": Exact(process, False), "student": Exact(process, True)}
    objective = progressive.progressive(given(process, (1, 0), kind="deterministic", scale=1.0, **networks))
    images = {"c": jnp.array([0.5, -0.2, 0.9, 0.0])}
    assert objective(images, images, batch, KEY)[0] < 1e-6
    off = {"c": images["c"] + 0.1}
    assert objective(off, images, batch, KEY)[1]["unweighted"] == pytest.approx(0.01, rel=1e-2)


def test_progressive_distillation_learns_from_what_it_says(batch):
    built = lambda start: progressive.build(real_given("deterministic", start=start))  # noqa: E731
    assert built(None).reads == "teacher" and built(4).reads == "start"
    for start in (2, 3, 8):
        with pytest.raises(UserError, match=f"a student of {start} steps, .*: start from a student of 4 steps, or"):
            built(start)


# ---------------------------------------------------------------------------------------------------- consistency

OPTIONS = {"grid": 6, "decay": 0.9, "huber": 0.1}


@pytest.mark.parametrize("huber", [0.0, 0.1])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_consistency_loss_and_its_gradient(process, huber, batch):
    method = consistency.consistency(given(process, (1, 0), options=OPTIONS | {"huber": huber, "grid": 8}))
    memory = {"target": TARGET, "step": jnp.int32(7)}
    gradient, after, metrics = method.gradients({STUDENT: PARAMS}, memory, TEACHER, batch, KEY, jnp.int32(7))
    node, noise = drawn(KEY, batch, range(8))
    y, x0 = batch["condition"], batch["x0"][:, 2].astype(np.float64)
    x = noised(process, 8, x0, noise, node)
    following = noised(process, 8, *at(process, 8, TEACHER, x, y, node, velocity=False, scale=SCALE), node + 1)
    aim = at(process, 8, TARGET, following, y, node + 1, velocity=True)[0]

    def loss(params):
        error = at(process, 8, params, x, y, node, velocity=True)[0] - aim
        square = np.mean(error**2, axis=(1, 2, 3))
        return np.mean(np.sqrt(square + huber**2) - huber if huber else square)

    assert metrics["loss"] == pytest.approx(loss(PARAMS), rel=1e-4) and loss(PARAMS) > 0.01
    np.testing.assert_array_equal(aim[node == 7], following[node == 7])  # the boundary
    for name in ("a", "b"):  # the target stays where it is
        up, down = (PARAMS | {name: PARAMS[name] + step} for step in (1e-4, -1e-4))
        slope = (loss(float64(up)) - loss(float64(down))) / (float(up[name]) - float(down[name]))
        assert gradient[STUDENT][name] == pytest.approx(slope, rel=2e-3)
    jax.tree.map(np.testing.assert_array_equal, after["target"], TARGET)


TARGET = {"a": np.float32(0.5), "b": np.float32(0.1), "c": np.array([-0.3, 0.1, 0.5, 2.0], np.float32)}


def test_a_student_that_is_constant_along_trajectories_has_no_consistency_loss(batch):
    process = LinearVP()
    networks = {"teacher": Exact(process, False), "student": Exact(process, True)}
    method = consistency.consistency(given(process, (1, 0), scale=1.0, options=OPTIONS | {"huber": 0.0}, **networks))
    images = {"c": jnp.array([0.5, -0.2, 0.9, 0.0])}
    # of the same trajectories: rows whose store says what the teacher says
    exact = batch | {
        "x0": np.broadcast_to(images["c"][batch["condition"]][:, None, None, None, None], (ROWS, 3, *SHAPE))
    }

    def loss(params, target):
        memory = {"target": target, "step": jnp.int32(0)}
        return method.gradients({STUDENT: params}, memory, images, exact, KEY, jnp.int32(0))[2]["loss"]

    assert loss(images, images) < 1e-6
    off = {"c": images["c"] + 0.1}
    node, _ = drawn(KEY, batch, range(6))
    assert loss(off, images) == pytest.approx(0.01, rel=1e-2)
    # a wrong constant is found out at the boundary alone, where the target is the state itself
    assert loss(off, off) == pytest.approx(0.01 * np.mean(node == 5), rel=1e-2)


def test_the_consistency_target_follows_the_student_once_a_step(batch):
    method = consistency.consistency(given(LinearVP(), (1, 0), options=OPTIONS))
    others, memory = consistency.begin(PARAMS, TEACHER, KEY)
    assert others == {}

    def target(params, memory, step):
        memory = method.gradients({STUDENT: params}, memory, TEACHER, batch, KEY, jnp.int32(step))[1]
        return memory, memory["target"]

    memory, start = target(PARAMS, memory, 0)
    jax.tree.map(np.testing.assert_array_equal, start, PARAMS)
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, PARAMS, TARGET)
    for _ in range(3):  # the turns of one accumulated step
        memory, moved = target(TARGET, memory, 1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, expected)
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, expected, PARAMS)
    _, moved = target(PARAMS, memory, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, expected)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_at_the_data_every_student_gives_back_what_it_sees(process, batch):
    grid = consistency.fine_grid(given(process, (1, 0), options=OPTIONS), "consistency")
    wild = jax.tree.map(lambda leaf: 100 * leaf, PARAMS)
    see = teacher_predictor(Toy(), wild, batch["condition"], grid, few_step_process(process), NO_GUIDANCE)
    x = jnp.asarray(batch["noise"])
    np.testing.assert_array_equal(see(x, jnp.full(ROWS, 6)).x0, x)
    assert np.abs(see(x, jnp.full(ROWS, 5)).x0 - x).min() > 1e-3


@pytest.mark.parametrize("points, grid, steps", [((0,), 0, 5), ((1, 0), 0, 6), ((3, 2, 1, 0), 0, 8), ((1, 0), 4, 4)])
def test_the_consistency_grid_has_the_nodes_that_sampling_visits(points, grid, steps):
    for process in PROCESSES.values():
        fine = consistency.fine_grid(given(process, points, options=OPTIONS | {"grid": grid}), "consistency")
        own = few_step_process(process).grid(len(points))
        stride = steps // len(points)
        assert len(fine.times) == steps + 1 and fine.times[-1] == process.data_time
        np.testing.assert_allclose(fine.times[:-1:stride], own.times)
        np.testing.assert_allclose(fine.alpha[::stride], own.alpha)


# --------------------------------------------------------------------------------------- distribution matching

MATCHING = {"ratio": 1, "grid": 50, "interval": (0.1, 0.9), "weight": 0.0, "optimizer": OPTIMIZER}
FAKE = jax.tree.map(lambda leaf: 0.8 * leaf, TEACHER)


@pytest.mark.parametrize("kind", ["stochastic", "deterministic"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_a_student_is_trained_at_the_states_of_its_own_rollout(process, kind, batch):
    built, seen = given(process, (3, 2, 1, 0), kind=kind), set()
    noise = drawn(jax.random.split(KEY)[0], batch, range(1))[1]
    points = student_rollout(kind, Toy(), 4, process)(PARAMS, jnp.asarray(noise, jnp.float32), batch["condition"])
    for step in range(12):
        x, node = scores.own_state(built, PARAMS, batch, KEY, jnp.int32(step))
        says = scores.few_step_predictor(built, PARAMS, batch)[0](x, node).x0
        np.testing.assert_allclose(says, points[:, node], rtol=1e-5, atol=1e-5)
        seen.add(int(node))
    assert seen == {0, 1, 2, 3}


def matched(process, x0, given_noise, score_node, y):
    """The gradient at the student's samples and what the scores are shown, in NumPy."""
    grid = process.grid(50)
    a, s = row(grid.alpha, score_node), row(grid.sigma, score_node)
    shown = a * x0 + s * given_noise
    fake, real = (
        predict(process, float64(params), shown, y, a, s, grid.times[score_node], velocity=False, scale=scale)[0]
        for params, scale in ((FAKE, 1.0), (TEACHER, SCALE))
    )
    return (fake - real) / np.abs(x0 - real).mean(axis=(1, 2, 3), keepdims=True) / x0.size, shown


def pulled(process, steps, x, y, node, change):
    """The gradient of the Toy student whose x_0 at a node gets `change`: ∂x̂_0/∂v is −σ."""
    _, sigma, times = nodes_of(process, steps)
    pull = -sigma[node] * change
    gradient = {"a": np.sum(pull * x), "b": np.sum(pull) * times[node] / 1000, "c": np.zeros(CLASSES + 1)}
    np.add.at(gradient["c"], y, pull.sum(axis=(1, 2, 3)))
    return gradient


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_gradients_of_distribution_matching(process, step, batch):
    built = given(process, (1, 0), options=MATCHING)
    method, step = distribution_matching.distribution_matching(built), jnp.int32(step)
    networks = {STUDENT: PARAMS, "fake": FAKE}
    gradient, memory, metrics = method.gradients(networks, None, TEACHER, batch, KEY, step)
    input_key, score_key, fake_key, _ = jax.random.split(KEY, 4)
    x, node = (np.asarray(part) for part in scores.own_state(built, PARAMS, batch, input_key, step))
    y, nodes = batch["condition"], np.full(ROWS, node)
    images = at(process, 2, PARAMS, x.astype(np.float64), y, nodes, velocity=True)[0]
    # both scores, at the teacher's own grid
    grid = process.grid(50)
    way = grid.times / process.noise_time
    allowed = np.flatnonzero((way > 0.1 - 1e-9) & (way < 0.9 + 1e-9))  # both ends count
    score_node, score_noise = drawn(score_key, batch, range(allowed[0], allowed[-1] + 1))
    assert set(score_node) <= set(allowed) and len(set(score_node)) > 10
    change, _ = matched(process, images, score_noise, score_node, y)
    for name, value in pulled(process, 2, x, y, node, change).items():
        np.testing.assert_allclose(gradient[STUDENT][name], value, rtol=1e-3, atol=1e-5)
    # the fake score learns to denoise those very images
    rows = {"image": jnp.asarray(images, jnp.float32), "condition": y, "position": batch["position"]}
    learn = denoising(Toy(), process, label_dropout=0.0, horizontal_flip=False)
    (loss, _), fake_gradient = jax.value_and_grad(learn, has_aux=True)(FAKE, None, rows, fake_key)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-4) and memory is None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient["fake"], fake_gradient)


def test_a_student_that_matches_gets_no_gradient(batch):
    method = distribution_matching.distribution_matching(given(LinearVP(), (1, 0), scale=1.0, options=MATCHING))

    def student(fake):
        networks = {STUDENT: PARAMS, "fake": fake}
        return method.gradients(networks, None, TEACHER, batch, KEY, jnp.int32(0))[0][STUDENT]

    assert optax.tree.norm(student(TEACHER)) == 0 and optax.tree.norm(student(FAKE)) > 1e-3


def test_the_matching_gradient_points_from_real_to_fake_and_is_normalised():
    images, real, fake = (jnp.full((2, *SHAPE), value) for value in (0.0, 0.4, 0.1))
    change = scores.matching_gradient(fake, real, images)
    np.testing.assert_allclose(change, (0.1 - 0.4) / 0.4, rtol=1e-6)  # descent raises the images, towards the real
    both = scores.matching_gradient(10 * fake, 10 * real, 10 * images)
    np.testing.assert_allclose(both, change, rtol=1e-6)  # however large the errors are at that time
    assert not np.any(scores.matching_gradient(real, real, real))


def test_between_its_moves_the_student_gets_no_gradient_but_the_fake_score_does(batch):
    method = distribution_matching.distribution_matching(given(LinearVP(), (1, 0), options=MATCHING | {"ratio": 3}))
    networks = {STUDENT: PARAMS, "fake": FAKE}
    norms = [
        {name: float(optax.tree.norm(tree)) for name, tree in gradient.items()}
        for gradient in (method.gradients(networks, None, TEACHER, batch, KEY, jnp.int32(step))[0] for step in range(6))
    ]
    assert [norm[STUDENT] > 0 for norm in norms] == [False, False, True, False, False, True]
    assert all(norm["fake"] > 0 for norm in norms)


def test_a_network_that_moves_seldom_has_an_optimiser_that_sees_its_own_gradients_alone():
    """Two moves in six steps are two steps of Adam, with momentum and a cosine over two steps."""
    start = {STUDENT: jnp.float32(1.0), "fake": jnp.float32(1.0)}
    settings = ml_collections.ConfigDict(
        {
            "steps": 6,
            "optimizer": OPTIMIZER | {"learning_rate": 0.1, "schedule": "cosine"},
        }
    )
    joint = Method(Joint(None), 1.0, optimizers={"fake": settings.optimizer}, every={STUDENT: 3})
    optimizer = optimizer_of(joint, settings)
    values = np.array([9.0, 9.0, 0.5, 9.0, 9.0, -0.2], np.float32)

    def run(optimizer, params, gradients):
        state, path = optimizer.init(params), []
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            path.append(params)
        return path

    path = run(optimizer, start, [{STUDENT: value, "fake": value} for value in values])
    alone = run(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 2), weight_decay=0.0)),
        jnp.float32(1.0),
        values[[2, 5]],
    )
    expected = [1.0, 1.0, alone[0], alone[0], alone[0], alone[1]]
    np.testing.assert_allclose([networks[STUDENT] for networks in path], expected, rtol=1e-6)
    assert len({float(networks["fake"]) for networks in path}) == 6


@pytest.mark.parametrize("interval, grid", [((0.5, 0.5), 4), ((0.1, 0.2), 3)])
def test_scores_need_a_time(interval, grid):
    sentence = "interval is .* in which none of the .* times of its grid lies: widen it, or raise"
    with pytest.raises(UserError, match=sentence):
        distribution_matching.build(real_given("stochastic", **MATCHING | {"interval": interval, "grid": grid}))


@pytest.mark.parametrize("steps", [10, 100])
@pytest.mark.parametrize("reverse", [False, True])
def test_scores_are_compared_at_the_ends_of_the_interval_too(reverse, steps):
    """Times are i / steps, of which those with 1/5 ≤ i / steps ≤ 4/5 count, whatever rounding makes of them."""
    inside = given(FlowMatching(1.0, reverse), (0,), options={"grid": steps, "interval": (0.2, 0.8)})
    expected = [node for node in range(steps) if steps <= 5 * (steps - node) <= 4 * steps]
    assert list(scores.scored_nodes(inside, "distribution_matching")) == expected


@pytest.mark.parametrize("name", ["consistency", "distribution_matching", "trajectory_matching", "mean_flow"])
def test_a_grid_of_more_steps_than_there_are_timesteps_is_called_by_its_name(name):
    wrong = real_given(METHODS[name], **{**DEFAULTS[name], "grid": 100})
    wrong = wrong._replace(solve=solve_of(5, process=LinearVP(train_steps=50)))
    with pytest.raises(UserError, match="grid has 100 steps, but the process has 50 timesteps: choose .* 1 to 50") as e:
        MODULES[name].build(wrong)
    assert e.value.key == f"distill.{name}.grid"


def test_the_discriminator_s_share_of_a_gradient():
    change, other = jnp.array([[3.0, 0.0], [0.0, 4.0]]), jnp.array([[0.0, 0.2], [0.0, 0.0]])
    np.testing.assert_allclose(scores.add_in_proportion(change, other, 2.0), [[3, 10], [0, 4]])
    np.testing.assert_allclose(scores.add_in_proportion(change, 0 * other, 2.0), change)


@pytest.mark.slow
def test_the_discriminator_pushes_samples_to_where_it_takes_them_for_real(networks, records):
    """Beside the scores' gradient the student gets that of −E D at its samples, in proportion, and D the hinge's."""
    model, params = networks
    far = jax.tree.map(lambda leaf: 0.9 * leaf, params)  # a fake score that differs from the teacher

    def run(weight):
        options = DEFAULTS.distribution_matching.to_dict() | {"ratio": 1, "weight": weight, "layers": (1,)}
        built = real_given("stochastic", **options)
        method = distribution_matching.build(built)
        others, vectors = jax.jit(method.begin)(params, params, KEY)
        both = {STUDENT: params, **others, "fake": far}
        batch = beside_real(records) if method.real else records
        gradient, after, _ = quick_jit(method.objective.gradients)(both, vectors, params, batch, KEY, jnp.int32(0))
        return built, others, vectors, gradient, after

    alone = run(0.0)[3]
    assert alone.keys() == {STUDENT, "fake"}
    built, others, vectors, gradient, after = run(2.0)
    assert gradient.keys() == {STUDENT, "fake", DISCRIMINATOR}
    pushed = jax.tree.map(jnp.subtract, gradient[STUDENT], alone[STUDENT])
    judge = make_judge(model, (1,), LinearVP(), 0.0)
    input_key, _, _, judge_key = jax.random.split(KEY, 4)
    x, node = scores.own_state(built, params, records, input_key, jnp.int32(0))
    real_key, fake_key = jax.random.split(judge_key)

    def logits(heads, images, key):
        seen = judge.features(params, images, records["condition"], key, records["position"])
        return judge.logits(heads, after, *seen)

    @quick_jit
    @jax.grad
    def generator(student):
        images = scores.few_step_predictor(built, student, records)[0](x, node).x0
        return -jnp.mean(logits(others[DISCRIMINATOR], images, fake_key))

    @quick_jit
    @jax.grad
    def hinge(heads):
        images = scores.few_step_predictor(built, params, records)[0](x, node).x0
        real, fake = logits(heads, records["x0"][:, 0], real_key), logits(heads, images, fake_key)
        return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))

    expected = generator(params)
    cosine = optax.tree.vdot(pushed, expected) / optax.tree.norm(pushed) / optax.tree.norm(expected)
    assert cosine == pytest.approx(1, abs=1e-4)
    heads = hinge(others[DISCRIMINATOR])
    difference = jax.tree.map(jnp.subtract, gradient[DISCRIMINATOR], heads)
    assert optax.tree.norm(difference) < 1e-3 * optax.tree.norm(heads)
    assert not np.array_equal(after["u"]["pointwise"], vectors["u"]["pointwise"])  # which turn once a step


@pytest.mark.parametrize("horizontal_flip", [False, True])
def test_the_discriminator_sees_real_images_mirrored_as_the_teacher_did(horizontal_flip, batch, monkeypatch):
    """Half of them, by key and position, as in the adversarial fine-tune; the keys of the noise stay what they are."""
    shown = []

    def judge_both(judge, params, vectors, frozen, real, fake):
        shown.extend((real, fake))
        return {}, lambda: jnp.zeros((ROWS, *SHAPE)), {}

    monkeypatch.setattr(distribution_matching, "judge_both", judge_both)
    monkeypatch.setattr(distribution_matching, "power_iteration", lambda params, vectors: vectors)
    built = given(LinearVP(), (1, 0), options=MATCHING | {"weight": 1.0}, horizontal_flip=horizontal_flip)
    method = distribution_matching.distribution_matching(built, judge="anyone")
    real = {name: batch[name][::-1] for name in ("condition", "position")} | {"image": batch["x0"][:, 0]}
    networks = {STUDENT: PARAMS, "fake": FAKE, DISCRIMINATOR: {}}
    method.gradients(networks, (), TEACHER, {"trajectory": batch, "real": real}, KEY, jnp.int32(0))
    judge_key = jax.random.split(KEY, 4)[3]
    (seen, real_key), (_, fake_key) = shown
    assert [real_key, fake_key] == list(jax.random.split(judge_key))
    assert seen.keys() == real.keys() and all(seen[name] is real[name] for name in ("condition", "position"))
    if not horizontal_flip:
        assert seen["image"] is real["image"]
        return
    expected = flip_at_random(jax.random.fold_in(judge_key, 2), real["position"], real["image"])
    np.testing.assert_array_equal(seen["image"], expected)
    is_mirrored = (seen["image"] != real["image"]).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(seen["image"][is_mirrored], real["image"][is_mirrored][:, :, ::-1])
    assert 5 < is_mirrored.sum() < ROWS - 5


@pytest.mark.parametrize("horizontal_flip", [False, True])
def test_methods_are_told_whether_the_teacher_s_images_were_mirrored(horizontal_flip, monkeypatch):
    config = smoke_config.get_config()
    config.data.horizontal_flip = horizontal_flip
    monkeypatch.setattr(methods, "find_method", lambda name: lambda given: given)
    teacher, student = make_teacher(config), make_student(config)
    assert methods.make_method(config, student, teacher, (0,)).horizontal_flip is horizontal_flip


# ---------------------------------------------------------------------------------------- trajectory matching


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_noise_is_mixed_as_the_process_would_go_on(process):
    built = given(process, (1, 0), kind="deterministic", options=MATCHING)
    own, fresh, x0 = (np.random.default_rng(seed).normal(size=(ROWS, *SHAPE)).astype(np.float32) for seed in range(3))
    fine, steps = process.grid(50), few_step_process(process).grid(2)
    later = np.arange(ROWS) % 20 + 3  # of the first step, nearer to the noise than node 1
    mixed, weight = mix_noise(jnp.asarray(own), jnp.asarray(fresh), steps, 1, fine, later)
    arrived = steps.alpha[1] * x0 + steps.sigma[1] * own
    ratio = row(fine.alpha, later) / steps.alpha[1]
    added = np.sqrt(row(fine.sigma, later) ** 2 - (ratio * steps.sigma[1]) ** 2)
    shown = row(fine.alpha, later) * x0 + row(fine.sigma, later) * np.asarray(mixed, np.float64)
    np.testing.assert_allclose(shown, ratio * arrived + added * fresh, rtol=1e-4, atol=1e-5)
    lengths = [np.mean(np.asarray(part, np.float64) ** 2, axis=(1, 2, 3)) for part in (mixed, fresh)]
    np.testing.assert_allclose(weight, np.exp(-lengths[0] / 2) / np.exp(-lengths[1] / 2), rtol=1e-4)
    # after the last step there is no noise of the student's own
    last, weight = mix_noise(jnp.asarray(own), jnp.asarray(fresh), steps, 2, fine, later)
    np.testing.assert_allclose(last, fresh, rtol=1e-6)
    np.testing.assert_allclose(weight, 1, rtol=1e-6)
    spans = trajectory_matching.spans_of_steps(built, fine)
    noise, ends = (np.arctan2(part.sigma, part.alpha) for part in (fine, steps))
    assert spans.shape == (2, 2) and spans[0, 1] <= spans[1, 0] + 1
    for (first, stop), start, end in zip(spans, ends[:-1], ends[1:], strict=True):
        assert stop - first > 10 and np.all((noise[first:stop] <= start) & (noise[first:stop] >= end))


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_gradients_of_trajectory_matching(process, step, batch):
    built = given(process, (1, 0), kind="deterministic", options=MATCHING)
    method, step = trajectory_matching.trajectory_matching(built), jnp.int32(step)
    networks = {STUDENT: PARAMS, "fake": FAKE}
    gradient, memory, metrics = method.gradients(networks, None, TEACHER, batch, KEY, step)
    input_key, score_key = jax.random.split(KEY)
    x, node = (np.asarray(part) for part in scores.own_state(built, PARAMS, batch, input_key, step))
    y, grid = batch["condition"], process.grid(50)
    x0, epsilon = at(process, 2, PARAMS, x.astype(np.float64), y, np.full(ROWS, node), velocity=True)
    later, fresh = drawn(score_key, batch, range(*trajectory_matching.spans_of_steps(built, grid)[node]))
    steps = few_step_process(process).grid(2)
    kept = row(grid.alpha, later) / steps.alpha[node + 1] * steps.sigma[node + 1]
    mixed = (kept * epsilon + np.sqrt(row(grid.sigma, later) ** 2 - kept**2) * fresh) / row(grid.sigma, later)
    change, shown = matched(process, x0, mixed, later, y)
    for name, value in pulled(process, 2, x, y, node, change).items():
        np.testing.assert_allclose(gradient[STUDENT][name], value, rtol=2e-3, atol=1e-5)

    def loss(params):
        error = toy_output(params, shown, grid.times[later], y) - process.target(x0, mixed)
        lengths = [np.mean(part**2, axis=(1, 2, 3)) for part in (mixed, fresh)]
        return np.mean(np.exp((lengths[1] - lengths[0]) / 2) * np.mean(error**2, axis=(1, 2, 3)))

    assert metrics["loss"] == pytest.approx(loss(float64(FAKE)), rel=1e-3) and memory is None
    for name in ("a", "b"):
        up, down = (float64(FAKE) | {name: FAKE[name] + by} for by in (1e-4, -1e-4))
        slope = (loss(up) - loss(down)) / (up[name] - down[name])
        assert gradient["fake"][name] == pytest.approx(slope, rel=2e-3, abs=1e-5)


def test_a_trajectory_that_matches_gets_no_gradient(batch):
    built = given(LinearVP(), (1, 0), kind="deterministic", scale=1.0, options=MATCHING)
    method = trajectory_matching.trajectory_matching(built)

    def student(fake):
        networks = {STUDENT: PARAMS, "fake": fake}
        return method.gradients(networks, None, TEACHER, batch, KEY, jnp.int32(0))[0][STUDENT]

    assert optax.tree.norm(student(TEACHER)) == 0 and optax.tree.norm(student(FAKE)) > 1e-3


def test_a_time_between_two_steps_of_trajectory_matching_is_either_s():
    """Times are i / 100; each of the five steps has 20 of them and both its ends, whatever rounding makes of them."""
    five = given(FlowMatching(), (4, 3, 2, 1, 0), options={"grid": 100, "interval": (0.0, 1.0)})
    spans = trajectory_matching.spans_of_steps(five, FlowMatching().grid(100))
    assert spans.tolist() == [[0, 21], [20, 41], [40, 61], [60, 81], [80, 100]]  # the data is no time of the grid


def test_every_step_of_trajectory_matching_needs_a_time():
    with pytest.raises(UserError, match="of which no time in its interval lies in one of the student's 3 steps: raise"):
        options = MATCHING | {"grid": 4}
        trajectory_matching.build(real_given("deterministic", points=(2, 1, 0), **options))


# -------------------------------------------------------------------------------------------------- mean flow


@pytest.mark.parametrize("straight", [True, False], ids=["straight", "circle"])
def test_mean_velocities_add_up_between_gaussians(straight):
    """Of data N(0, s²) trajectories are x ∝ √(α²s² + σ²): the exact mean velocity is known, and its limit; float64."""
    with jax.enable_x64():
        s, r, t = 0.5, 0.2, jnp.float64(0.8 if straight else 1.1)

        def width(t):
            alpha, sigma = (1 - t, t) if straight else (jnp.cos(t), jnp.sin(t))
            return jnp.sqrt(alpha**2 * s**2 + sigma**2)

        def go(x, start, end):
            return x * width(end) / width(start)

        x = jnp.linspace(-2, 2, 5)
        whole = mean_flow.mean_velocity(x, go(x, t, r), t - r, straight)
        for middle in (0.3, 0.7):  # a step to s, and the student's from there
            split = go(x, t, middle)
            rest = mean_flow.mean_velocity(split, go(split, middle, r), middle - r, straight)
            if straight:
                np.testing.assert_allclose((t - r) * whole, (x - split) + (middle - r) * rest, rtol=1e-12, atol=1e-14)
            arrived = split - (middle - r) * rest
            if not straight:
                arrived = jnp.cos(middle - r) * split - jnp.sin(middle - r) * rest
            again = mean_flow.mean_velocity(x, arrived, t - r, straight)
            np.testing.assert_allclose(again, whole, rtol=1e-12, atol=1e-14)
        slope = x / width(t) * jax.grad(width)(t)
        short = mean_flow.mean_velocity(x, go(x, t, t - 1e-6), 1e-6, straight)
        np.testing.assert_allclose(short, slope, rtol=1e-4, atol=1e-8)
        assert np.abs(whole - slope).max() > 1e-2


@pytest.mark.parametrize("kind", ["stochastic", "deterministic"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_mean_flow_loss_and_its_gradient(process, kind, batch):
    huber = 0.1
    objective = mean_flow.mean_flow(given(process, (1, 0), kind=kind, options={"grid": 8, "huber": huber}))
    straight, y = isinstance(process, FlowMatching), batch["condition"]
    value, gradient = jax.value_and_grad(lambda params: objective(params, TEACHER, batch, KEY)[0])(PARAMS)
    node, noise = drawn(KEY, batch, range(8))
    end = np.full(ROWS, 8) if kind == "stochastic" else np.where(node < 4, 4, 8)
    x = noised(process, 8, batch["x0"][:, 2].astype(np.float64), noise, node)
    alpha, sigma, _ = nodes_of(process, 8)
    split = noised(process, 8, *at(process, 8, TEACHER, x, y, node, velocity=False, scale=SCALE), node + 1)
    rest = noised(process, 8, *at(process, 8, PARAMS, split, y, node + 1, velocity=True), end)
    arrived = np.where((node + 1 == end)[:, None, None, None], split, rest)
    clock = sigma if straight else np.arctan2(sigma, alpha)
    left = row(clock, node) - row(clock, end)
    target = (x - arrived) / left if straight else (np.cos(left) * x - arrived) / np.sin(left)

    def loss(params):
        x0, epsilon = at(process, 8, params, x, y, node, velocity=True)
        velocity = epsilon - x0 if straight else row(alpha, node) * epsilon - row(sigma, node) * x0
        square = np.mean((velocity - target) ** 2, axis=(1, 2, 3))
        return np.mean(np.sqrt(square + huber**2) - huber)

    assert value == pytest.approx(loss(PARAMS), rel=1e-4) and value > 0.01
    assert set((node + 1 == end).tolist()) == {True, False}
    for name in ("a", "b"):  # the student at the split stays where it is
        up, down = (float64(PARAMS) | {name: PARAMS[name] + by} for by in (1e-4, -1e-4))
        slope = (loss(up) - loss(down)) / (up[name] - down[name])
        assert gradient[name] == pytest.approx(slope, rel=2e-3, abs=1e-5)


# ------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_few_steps_of_sampling_in_numpy(process, batch):
    noise, y = batch["noise"], batch["condition"]
    for kind in ("deterministic", "stochastic"):
        points = student_rollout(kind, Toy(), 4, process)(PARAMS, jnp.asarray(noise), y)
        x = noise.astype(np.float64)
        for node in range(4):
            nodes = np.full(ROWS, node)
            x0, predicted = at(process, 4, PARAMS, x, y, nodes, velocity=True)
            np.testing.assert_allclose(points[:, node], x0, rtol=1e-4, atol=1e-5)
            fresh = predicted if kind == "deterministic" else np.asarray(fresh_noise(jnp.asarray(noise), node))
            x = noised(process, 4, x0, fresh, nodes + 1)


def test_fresh_noise_is_fresh_and_normal():
    noise = jax.random.normal(KEY, (500, *SHAPE))
    drawn = np.stack([noise, fresh_noise(noise, 0), fresh_noise(noise, 1)])
    assert abs(drawn[1:].mean()) < 0.05 and abs(drawn[1:].std() - 1) < 0.05
    assert np.abs(np.corrcoef(drawn.reshape(3, -1)) - np.eye(3)).max() < 0.07
    assert len(np.unique(drawn[1])) == drawn[1].size


def test_a_stochastic_sample_does_not_depend_on_its_batch(networks):
    model, params = networks
    rollout = quick_jit(student_rollout("stochastic", model, 3, LinearVP()))
    noise, y = jax.random.normal(KEY, (6, 4, 4, 1)), jnp.arange(6) % CLASSES
    whole = rollout(params, noise, y)
    rows = np.array([4, 1])
    np.testing.assert_allclose(rollout(params, noise[rows], y[rows]), whole[rows], rtol=0, atol=1e-5)
    assert np.abs(whole[4] - whole[1]).max() > 0.1


# ----------------------------------------------------------------------------------------- networks of the package

METHODS = {
    "progressive": "deterministic",
    "consistency": "stochastic",
    "distribution_matching": "stochastic",
    "trajectory_matching": "deterministic",
    "mean_flow": "deterministic",
}
MODULES = {
    "progressive": progressive,
    "consistency": consistency,
    "distribution_matching": distribution_matching,
    "trajectory_matching": trajectory_matching,
    "mean_flow": mean_flow,
}
DEFAULTS = default_config().distill


def real_given(kind, start=None, points=(1, 0), **options):
    model = DiT(channels=1, patch_size=2, hidden_size=8, depth=2, num_heads=2, num_classes=CLASSES, learn_sigma=False)
    made = given(LinearVP(), points, teacher=model, student=model, start=start, kind=kind, options=options)
    return made._replace(shape=(4, 4, 1), columns=(0, 2)[-len(points) :])


@pytest.fixture(scope="module")
def networks():
    """A network, and parameters large enough to matter."""
    model = real_given("stochastic").teacher
    shapes = parameter_shapes(model, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(1)
    return {
        "x0": rng.uniform(-1, 1, (8, 3, 4, 4, 1)).astype(np.float32),
        "condition": rng.integers(0, CLASSES, 8).astype(np.int32),
        "position": np.arange(8, dtype=np.int32),
    }


def beside_real(records):
    """What a discriminator is shown: records, and real images of the same conditions."""
    return {"trajectory": records, "real": {**records, "image": records["x0"][:, 0]}}


def method_of(name, points=(2, 1, 0), **changed):
    options = {**DEFAULTS.get(name, {}), **changed}
    return MODULES[name].build(real_given(METHODS[name], points=points, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_the_student_moves(name, networks, records):
    _, params = networks
    method = method_of(name, **({"ratio": 2} if name == "distribution_matching" else {}))
    records = beside_real(records) if method.real else records
    settings = ml_collections.ConfigDict({"steps": 4, "optimizer": OPTIMIZER})
    optimizer, mesh = optimizer_of(method, settings), make_mesh()
    state = init_state(params, optimizer, 0, mesh, method.begin, params)
    step = make_step(method.objective, optimizer, 0.9, mesh, state, params)
    for _ in range(2):
        state, metrics = step(state, params, records)
    assert np.isfinite(metrics["loss"])
    # how a discriminator learns, the adversarial fine-tune's tests say
    others = [network for name, network in (state.others or {}).items() if name != DISCRIMINATOR]
    for moved in (state.params, *others):
        still = [
            jax.tree_util.keystr(path)
            for (path, new), old in zip(
                jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(params), strict=True
            )
            if np.array_equal(new, old)
        ]
        assert not still


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_flops_are_those_of_their_steps(name, networks, records):
    _, params = networks
    # what judging takes is counted in the adversarial fine-tune's tests
    method = method_of(name, **({"ratio": 1, "weight": 0.0} if name == "distribution_matching" else {}))
    if isinstance(method.objective, Joint):
        others, memory = method.begin(params, params, KEY)

        def step(params):
            networks = {STUDENT: params, **others}
            return method.objective.gradients(networks, memory, params, records, KEY, jnp.int32(0))

    else:

        def step(params):
            return jax.grad(method.objective, has_aux=True)(params, jax.lax.stop_gradient(params), records, KEY)

    counted = 2 * macs(step, params) / len(records["condition"])
    # no gradient goes to the images and to the time's sinusoids, which is some of so small a network
    assert 0.9 * method.flops < counted <= method.flops
    if name == "distribution_matching":
        unit = 2 * teacher_macs(real_given("stochastic").teacher, (4, 4, 1))
        one, three = ((0,), (2, 1, 0))
        flops = [method_of(name, weight=0.0, points=s, ratio=r).flops for s, r in ((one, 1), (one, 5), (three, 5))]
        assert flops == [9 * unit, 5 * unit, 6 * unit]
        assert method_of(name).every == {STUDENT: 5}
        judging = judging_flops(make_judge(real_given("stochastic").teacher, (0,), LinearVP(), 0.0), (4, 4, 1))
        more = method_of(name, weight=1.0, ratio=5, layers=(0,)).flops - 6 * unit
        assert more == pytest.approx(judging.features + judging.heads + judging.pull / 5)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_refuses_what_it_cannot_train(name):
    other = (
        "history" if name == "mean_flow" else {"deterministic": "stochastic", "stochastic": "history"}[METHODS[name]]
    )
    options = DEFAULTS.get(name, {})
    with pytest.raises(UserError, match=f"student.kind is '{other}', but this objective trains {METHODS[name]}"):
        MODULES[name].build(real_given(other, **options))
    online = real_given(METHODS[name], **options)._replace(columns=None)
    if name == "trajectory_matching":  # which reads no images
        assert MODULES[name].build(online).flops > 0
        return
    with pytest.raises(UserError, match="distill.online is set, but this objective reads the samples of a"):
        MODULES[name].build(online)


def test_a_consistency_grid_without_the_student_s_nodes():
    with pytest.raises(UserError, match="grid is 5, which is no multiple of the student's 2 steps: choose one that is"):
        method_of("consistency", points=(1, 0), grid=5)


@pytest.mark.parametrize(
    "key, value",
    [
        ("consistency.decay", 1.5),
        ("consistency.grid", -1),
        ("consistency.huber", float("nan")),
        ("distribution_matching.ratio", 0),
        ("distribution_matching.interval", (0.9, 0.1)),
        ("distribution_matching.interval", (0.0, 0.1, 0.2)),
        ("distribution_matching.optimizer.name", "adamm"),
        ("distribution_matching.discriminator_optimizer.name", "adamm"),
        ("distribution_matching.feature_time", 1.5),
        ("trajectory_matching.interval", (0.9, 0.1)),
        ("trajectory_matching.optimizer.clip", -1.0),
        ("mean_flow.grid", -1),
    ],
)
def test_bad_options(key, value):
    config = default_config()
    with config.unlocked():
        config.distill.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        validate(config)
    assert error.value.key == f"distill.{key}"


# ------------------------------------------------------------------------------------------------ on configs/smoke.py


def settings_of(name, **more):
    flags = {"student.name": name, "student.kind": METHODS[name], "distill.objective": name, **more}
    return [f"{key}={value}" for key, value in flags.items()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["consistency", "distribution_matching"])
def test_a_joint_training_that_was_stopped_goes_on_as_if_it_had_not_been(pipeline, tmp_path, name):
    """All networks, their optimisers and what is remembered come back: of step 15, hashes of step 20 are the same."""
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories")
    assert smoke("distill", workdir, *settings_of(name)).status == 0
    folder = workdir / "distill" / name
    whole = done(folder)
    shutil.rmtree(folder / "checkpoints" / "20")
    (folder / "done.json").unlink()
    outcome = smoke("distill", workdir, *settings_of(name))
    assert outcome.status == 0 and "resuming at step 15 of 20" in outcome.err
    assert done(folder)["sha256"] == whole["sha256"] and done(folder)["step"] == 20
    assert whole["sha256"]["params"] != whole["sha256"]["ema"]


@pytest.mark.slow
def test_rounds_of_progressive_distillation_up_to_the_report(pipeline, tmp_path):
    workdir = copy(pipeline, tmp_path, "teacher", "trajectories")
    first = settings_of("progressive", **{"student.points": "(1,0)", "student.name": "two"})
    assert smoke("distill", workdir, *first).status == 0
    second = settings_of("progressive", **{"student.points": "(0,)", "student.name": "one", "distill.start": "two"})
    assert smoke("distill", workdir, *second).status == 0
    assert done(workdir / "distill" / "one")["sha256"]["ema"] != done(workdir / "distill" / "two")["sha256"]["ema"]
    third = settings_of("progressive", **{"student.points": "(1,0)", "student.name": "three", "distill.start": "one"})
    said = sentence(smoke("distill", workdir, *third), "distill")
    assert "distill.start is a student of 1 steps" in said and not (workdir / "distill" / "three").exists()
    for stage in ("sample", "evaluate", "report"):
        outcome = smoke(stage, workdir, "sample.models=('teacher','two','one')")
        assert outcome.status == 0, outcome.err
    page = (workdir / "report" / "index.html").read_text()
    assert "Progressive distillation (one)" in page and "Progressive distillation (two)" in page
