import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import products
from networks import draw_noise_and_labels, solve_of
from quick import quick_jit
from scipy.integrate import solve_ivp

from ard_jax.convert import from_torch
from ard_jax.diffusion import SOLVERS, FlowMatching, Grid, Guidance, LinearVP, calls, guided_output, solve
from ard_jax.errors import UserError
from ard_jax.models import DiT, parameter_shapes
from ard_jax.sampling import (
    is_within_bounds,
    network_calls,
    sample_teacher,
    sampling_key,
    take_points,
    trajectory_key,
)

# --- reference numbers ---


@pytest.mark.parametrize("kind", ["tiny", "strong"])
def test_schedule_and_respacing_equal_the_published_implementation(golden, kind):
    arrays, process = golden(f"ddim_{kind}"), LinearVP()
    np.testing.assert_allclose(process.alphas_cumprod(), arrays["alphas_cumprod_1000"], rtol=1e-13)
    for steps in (10, 50, 100, 250):
        np.testing.assert_array_equal(process.timestep_map(steps), arrays[f"timestep_map_{steps}"])
    np.testing.assert_array_equal(process.timestep_map(25), arrays["timestep_map"])
    np.testing.assert_array_equal(process.timestep_map(1000), np.arange(1000))
    np.testing.assert_array_equal(process.timestep_map(1), [999])
    assert list(process.timestep_map(25)[[15, 10, 5]]) == [624, 416, 208]  # the paper's points
    grid = process.grid(25)
    np.testing.assert_array_equal(grid.times, arrays["timestep_map"][::-1])
    np.testing.assert_allclose(grid.alpha[:-1] ** 2, arrays["alphas_cumprod"][::-1], rtol=1e-12)
    np.testing.assert_allclose(grid.alpha**2 + grid.sigma**2, 1.0, rtol=1e-15)
    assert (grid.steps, grid.alpha[-1], grid.sigma[-1]) == (25, 1.0, 0.0)


def ddim_of_the_golden_model(golden, kind, dtype):
    weights, arrays = golden(f"dit_{kind}"), golden(f"ddim_{kind}")
    model, params = from_torch(weights.state_dict(dtype), num_heads=int(weights["cfg/num_heads"]))
    noise, y = arrays.images("noise")[:2].astype(dtype), arrays["y"][:2]  # rows 2 and 3 are the unconditional halves
    return arrays, quick_jit(sample_teacher, static_argnums=(0, 4))(model, params, noise, y, solve_of())


@pytest.mark.parametrize("kind", ["tiny", "strong"])
def test_ddim_equals_the_published_implementation(golden, kind):
    arrays, solution = ddim_of_the_golden_model(golden, kind, np.float32)
    for ours, name in ((solution.x0, "pred_xstart"), (solution.xt, "sample")):
        expected = np.moveaxis(arrays.images(name)[:, :2], 0, 1)
        error = np.abs(ours - expected).max(axis=(0, 2, 3, 4)) / np.abs(expected).max(axis=(0, 2, 3, 4))
        assert ours.shape == (2, 25, 8, 8, 4) and error.max() < 5e-5


@pytest.mark.parametrize("kind", ["tiny", "strong"])
def test_ddim_equals_the_published_implementation_in_float64(golden, x64, kind):
    arrays, solution = ddim_of_the_golden_model(golden, kind, np.float64)
    for ours, name in ((solution.x0, "pred_xstart_f64"), (solution.xt, "sample_f64")):
        np.testing.assert_allclose(ours, np.moveaxis(arrays.images(name)[:, :2], 0, 1), rtol=1e-10, atol=1e-10)


# --- solvers on teachers whose ODE is known ---

MEANS = np.array([[-1.5, 0.5, 0.3], [0.8, -1.0, 0.3], [1.2, 1.4, -0.9]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
NOISE = np.array([[0.3, -0.6, 1.1], [-1.2, 0.4, 0.5], [0.9, 0.8, -0.7], [2.0, -1.5, 0.1]])
ORDERS = {"ddim": 1, "heun": 2, "dpm++2m": 2}


def posterior_mean(x, alpha, sigma, means, weights, deviation):
    """E[x_0 | x_t] of a mixture of Gaussians of one spread, x (batch, axis), from Bayes' rule."""
    spread = alpha**2 * deviation**2 + sigma**2
    distance = x[:, None] - alpha * means
    logits = np.log(weights) - 0.5 * (distance**2).sum(-1) / spread
    probability = jax.nn.softmax(jnp.asarray(logits), axis=-1)[..., None]
    return (probability * (means + alpha * deviation**2 / spread * distance)).sum(1)


def exact_predictor(process, grid: Grid, means, weights, deviation):
    """What `solve` calls: a perfect network of the process, its output turned into predictions by the process."""
    alphas, sigmas = jnp.asarray(grid.alpha), jnp.asarray(grid.sigma)

    def predict(x, node):
        alpha, sigma = alphas[node], sigmas[node]
        flat = x.reshape(len(x), -1)
        x0 = posterior_mean(flat, alpha, sigma, means, weights, deviation).reshape(x.shape)
        noise = (x - alpha * x0) / sigma
        output = noise - x0 if isinstance(process, FlowMatching) else noise
        return process.predict(output, x, alpha, sigma)

    return predict


def reference_end(start, end, x, means, weights, deviation):
    """The state at (α, σ) = end from that at start, by another solver; any path from one to the other would do."""

    def slope(u, flat):
        alpha, sigma = (1 - u) * start[0] + u * end[0], (1 - u) * start[1] + u * end[1]
        state = flat.reshape(x.shape)
        x0 = np.asarray(posterior_mean(state, alpha, sigma, means, weights, deviation))
        noise = (state - alpha * x0) / sigma
        return ((end[0] - start[0]) * x0 + (end[1] - start[1]) * noise).ravel()

    return solve_ivp(slope, (0, 1), x.ravel(), "DOP853", rtol=1e-11, atol=1e-12).y[:, -1].reshape(x.shape)


def errors(solver, process, counts, until, means, weights, deviation):
    """Largest error at a fixed node for each number of steps; `until` is the share of the solve that it ends."""
    noise = jnp.asarray(NOISE).reshape(4, 1, 1, 3)
    found = []
    for count in counts:
        grid = process.grid(count)
        at = round(until * (count - 1)) if until < 1 else count
        solution = solve(solver, exact_predictor(process, grid, means, weights, deviation), grid, noise)
        start, end = (grid.alpha[0], grid.sigma[0]), (grid.alpha[at], grid.sigma[at])
        if len(means) == 1:  # x_t = α·m + √(α²s² + σ²)·z with the same z at all times
            z = (NOISE - start[0] * means) / np.sqrt(start[0] ** 2 * deviation**2 + start[1] ** 2)
            exact = end[0] * means + np.sqrt(end[0] ** 2 * deviation**2 + end[1] ** 2) * z
        else:
            end = (end[0], max(end[1], 1e-7))
            exact = reference_end(start, end, NOISE, means, weights, deviation)
        found.append(np.abs(np.asarray(solution.xt[:, at - 1]).reshape(4, 3) - exact).max())
    return np.array(found)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("teacher", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_order_of_convergence(x64, solver, teacher, name):
    means, weights, deviation = (MEANS[:1], WEIGHTS[:1], 0.5) if teacher == "gaussian" else (MEANS, WEIGHTS, 0.5)
    if name == "flow":
        # λ = log(α/σ) is infinite at both ends, which leaves DPM-Solver++(2M) h²·log(1/h): order 1.73, rising
        process, counts, until = FlowMatching(), np.array([80, 160, 320]), 1
    else:
        # So many timesteps that respacing rounds nothing. σ goes like the root of time at the data end, so a uniform
        # grid loses order there whatever the solver: errors are taken where a quarter of the time is left.
        process, until = LinearVP(train_steps=3201, beta_start=1e-4 / 3.2, beta_end=0.02 / 3.2), 0.75
        counts = np.array([80, 160, 320]) + 1
    found = errors(solver, process, counts, until, means, weights, deviation)
    orders = np.log2(found[:-1] / found[1:])
    assert np.all(np.abs(orders - ORDERS[solver]) < 0.3), (found, orders)
    assert found[-1] < (2e-2 if ORDERS[solver] == 1 else 2e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("process", [LinearVP(), FlowMatching()], ids=["vp", "flow"])
def test_solution_holds_every_step_in_the_order_walked(x64, process, solver):
    grid = process.grid(6)
    predict = exact_predictor(process, grid, MEANS, WEIGHTS, 0.5)
    noise = jnp.asarray(NOISE).reshape(4, 1, 1, 3)
    solution = solve(solver, predict, grid, noise)
    assert solution.x0.shape == solution.xt.shape == (4, 6, 1, 1, 3)
    states = [noise, *jnp.moveaxis(solution.xt, 1, 0)]
    for node in range(6):  # x0[i] is predicted at the state that step i starts from, xt[i] is where it arrives
        np.testing.assert_allclose(solution.x0[:, node], predict(states[node], node).x0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(solution.xt[:, -1], solution.x0[:, -1], rtol=0, atol=1e-13)
    assert np.abs(np.diff(solution.xt, axis=1)).min(axis=(0, 2, 3, 4)).all()


def test_number_of_calls_and_unknown_solver():
    grid = LinearVP().grid(4)
    for solver in SOLVERS:
        count = 0

        def predict(x, node):
            nonlocal count
            count += 1
            return LinearVP().predict(x, x, 0.5, 0.5)

        with jax.disable_jit():
            solve(solver, predict, grid, jnp.ones((1, 1, 1, 1)))
        assert count == calls(solver, 4) == (7 if solver == "heun" else 4)
    with pytest.raises(
        UserError, match=r"solver is 'euler', which does not exist: choose one of ddim, heun, dpm\+\+2m."
    ):
        solve("euler", predict, grid, jnp.ones((1, 1, 1, 1)))


# --- processes ---


@pytest.mark.parametrize(
    "process",
    [LinearVP(), LinearVP(spacing="trailing"), FlowMatching(), FlowMatching(time_scale=1.0, reversed=True)],
    ids=["vp", "trailing", "flow", "sit"],
)
def test_a_process_agrees_with_itself(x64, process):
    """Noising, what the network is trained on, and what is predicted from its output belong together on the grid."""
    rng = np.random.default_rng(0)
    x0, noise = jnp.asarray(rng.normal(size=(2, 5, 2, 2, 3)))
    grid = process.grid(5)
    towards_data = np.sign(process.data_time - process.noise_time)
    assert grid.times[0] == process.noise_time and np.all(towards_data * np.diff(grid.times) > 0)
    x = process.noised(x0, noise, jnp.asarray(grid.times))
    column = (-1, 1, 1, 1)
    alpha, sigma = grid.alpha[:-1].reshape(column), grid.sigma[:-1].reshape(column)
    np.testing.assert_allclose(x, alpha * x0 + sigma * noise, rtol=0, atol=1e-14)
    prediction = process.predict(process.target(x0, noise), x, alpha, sigma)
    np.testing.assert_allclose(prediction.x0, x0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(prediction.noise, noise, rtol=0, atol=1e-12)
    times = process.sample_times(jax.random.key(0), 4000)
    longest = max(process.noise_time, process.data_time)
    assert times.min() >= 0 and times.max() <= longest
    assert abs(times.mean() / longest - 0.5) < 0.02


def test_spacings_in_the_words_of_diffusers():
    """At 10 of 1000 timesteps, as arXiv 2305.08891, table 2, has them (counted from 0 here)."""
    assert list(LinearVP(spacing="leading").timestep_map(10)) == list(range(0, 1000, 100))
    assert list(LinearVP(spacing="trailing").timestep_map(10)) == list(range(99, 1000, 100))
    assert list(LinearVP(spacing="dpm").timestep_map(5)) == [200, 400, 599, 799, 999]
    assert list(LinearVP().timestep_map(10)) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    with pytest.raises(UserError, match="^spacing is 'log': choose one of linspace, leading, trailing, dpm."):
        LinearVP(spacing="log")


@pytest.mark.oracle
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_spaced_ddim_equals_diffusers(x64, spacing):
    import diffusers
    import torch

    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing)  # its defaults are the linear β
    scheduler.set_timesteps(8)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    process = LinearVP(spacing=spacing)
    grid = process.grid(8)
    np.testing.assert_array_equal(grid.times, scheduler.timesteps.numpy())
    rng = np.random.default_rng(0)
    noise, outputs = rng.normal(size=(1, 2, 2, 3)), rng.normal(size=(8, 1, 2, 2, 3))

    def predict(x, node):
        return process.predict(
            jnp.asarray(outputs)[node], x, jnp.asarray(grid.alpha)[node], jnp.asarray(grid.sigma)[node]
        )

    x = torch.from_numpy(noise)
    for time, output in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(torch.from_numpy(output), time, x).prev_sample
    ours = solve("ddim", predict, grid, jnp.asarray(noise)).xt[:, -1]
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-4, atol=1e-4)  # its ᾱ are float32 products


class CountingNetwork:
    """Stands where a network does and counts the images that it is called with."""

    num_classes = 5

    def __init__(self):
        self.rows = 0

    def unconditional(self, condition):
        return jnp.full_like(condition, self.num_classes)

    def apply(self, variables, x, times=None, y=None, method=None):
        if method == "prepare":
            return x
        self.rows += len(x)
        return x


def test_network_calls_of_a_guidance_interval():
    """What is counted is what is called."""
    flow = {"process": FlowMatching(), "guided_channels": 0}
    sit = {"process": FlowMatching(1.0, reversed=True), "guided_channels": 0}
    for solver, scale, interval, kind, expected in (
        ("ddim", 1.5, (0.1, 0.9), flow | {"steps": 10}, 19),  # of times 1, …, 0.1 all but the first, in any precision
        ("ddim", 1.5, (0.0, 1.0), flow, 8),
        ("ddim", 1.0, (0.0, 0.3), flow, 4),
        ("ddim", 1.5, (0.4, 0.8), flow, 6),  # of times 1, ¾, ½, ¼: two
        ("ddim", 1.5, (0.8, 1.0), sit, 5),  # of times 0, ¼, ½, ¾: the first, being noise
        ("heun", 1.5, (0.0, 1.0), flow, 14),
        ("heun", 1.5, (0.9, 1.0), flow, 8),  # the first step's second call is outside
        ("heun", 1.5, (0.4, 0.8), flow, 11),  # ¾ and ½, each as a start and as an end
    ):
        settings = {"solver": solver, "steps": 4, "guidance_scale": scale, "guidance_interval": interval, **kind}
        assert network_calls(solve_of(**settings)) == expected, settings
        network = CountingNetwork()
        with jax.disable_jit():
            sample_teacher(network, None, jnp.ones((2, 4, 4, 3)), jnp.zeros(2, jnp.int32), solve_of(**settings))
        assert network.rows == 2 * expected, settings


def test_noising_keeps_the_small_noise_of_the_first_timestep():
    noised = LinearVP().noised(jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.zeros(1))
    np.testing.assert_allclose(noised[0, 0], 0.01, rtol=1e-6)  # √β_0; 1 − ᾱ in float32 is off by 3e-4


def test_bad_processes_and_guidance():
    for process, steps in itertools.product([LinearVP(), FlowMatching()], [0, -3]):
        with pytest.raises(UserError, match=f"^steps is {steps}.*choose a number"):
            process.grid(steps)
    with pytest.raises(UserError, match="^steps is 1001, but the process has 1000 timesteps: .* from 1 to 1000."):
        LinearVP().grid(1001)
    for interval in ((0.5, 0.2), (-0.1, 1.0), (0.0, 1.5), (0.8,)):
        with pytest.raises(UserError, match="^guidance_interval is .*: give two rising numbers from 0 .* to 1"):
            Guidance(interval=interval)
    with pytest.raises(UserError, match="^guided_channels is -1: give a number of channels, or 0 for all of them."):
        Guidance(channels=-1)


# --- guidance ---


@pytest.fixture(scope="module")
def teacher():
    model = DiT(channels=4, patch_size=2, hidden_size=8, depth=1, num_heads=2, num_classes=5)
    x, y = jnp.zeros((2, 4, 4, 4)), jnp.zeros(2, jnp.int32)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, parameter_shapes(model, x, jnp.zeros(2), y))
    return model, params, jnp.asarray(rng.normal(size=x.shape), jnp.float32), jnp.asarray([1, 4])


def test_guidance_of_three_and_of_all_channels_and_within_an_interval(teacher):
    model, params, x, y = teacher
    process, call = LinearVP(), jax.jit(model.apply, static_argnames="method")
    compiled = SimpleNamespace(apply=call, unconditional=model.unconditional)  # once for all settings

    def run(*settings):
        return guided_output(compiled, params, x, *settings)

    time, scale = 999.0, 2.5
    conditional, unconditional = (
        call({"params": params}, x, jnp.full(2, time), labels)[..., :4] for labels in (y, jnp.full(2, 5))
    )
    moved = unconditional + scale * (conditional - unconditional)
    three = np.concatenate([moved[..., :3], conditional[..., 3:]], axis=-1)
    assert np.abs(moved - conditional).max() > 1e-2
    for guidance, expected in (
        (Guidance(scale, 3), three),
        (Guidance(scale, 0), moved),
        (Guidance(scale, 4), moved),
        (Guidance(scale, 0, (0.4, 1.0)), moved),  # both ends of the interval belong to it
        (Guidance(scale, 0, (0.4, 0.99)), conditional),
    ):
        np.testing.assert_allclose(run(time, y, guidance, process), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        run(0.0, y, Guidance(0.0, 0, (0.0, 0.5)), process),
        call({"params": params}, x, jnp.zeros(2), jnp.full(2, 5))[..., :4],
        rtol=0,
        atol=1e-5,
    )


def test_guidance_of_one_calls_the_network_once(teacher):
    model, params, x, y = teacher

    def rows(scale):
        def run(params):
            return guided_output(model, params, x, jnp.float32(10.0), y, Guidance(scale, 3), LinearVP())

        return {left[0] for left, right, _, _ in products(run, params) if right == (8, 48)}  # of the modulation

    assert (rows(1.0), rows(1.5)) == ({2}, {4})


def test_sample_teacher_knows_its_settings(teacher):
    model, params, x, y = teacher

    def run(**settings):
        with jax.disable_jit():
            return sample_teacher(model, params, x, y, solve_of(steps=3, **settings)).xt

    base = run()
    for changed in ({"guidance_scale": 3.0}, {"guided_channels": 0}, {"guidance_interval": (0.3, 0.7)},
                    {"solver": "heun"}, {"process": FlowMatching()}):  # fmt: skip
        assert np.abs(run(**changed) - base).max() > 1e-3, changed


# --- noises, labels, points ---


def test_noise_and_label_are_functions_of_the_index_alone():
    draw = functools.partial(draw_noise_and_labels, shape=(2, 2, 3), num_classes=10)
    noise, label = draw(trajectory_key(7), jnp.arange(400, dtype=jnp.uint32))
    assert noise.shape == (400, 2, 2, 3) and noise.dtype == jnp.float32 and label.dtype == np.int32
    for indices in (np.array([399, 3, 3, 17]), np.array([17, 0, 399, 3]), np.array([3])):
        again, labels = draw(trajectory_key(7), jnp.asarray(indices, jnp.uint32))
        np.testing.assert_array_equal(again, noise[indices])
        np.testing.assert_array_equal(labels, label[indices])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05  # of 4800 numbers: three deviations are 0.04
    assert set(np.unique(label)) == set(range(10))
    for other in (trajectory_key(8), sampling_key(7)):
        assert np.abs(draw(other, jnp.arange(4, dtype=jnp.uint32))[0] - noise[:4]).min() > 0


def test_points_are_picked_by_respaced_index():
    states = jnp.arange(2 * 25).reshape(2, 25, 1, 1, 1)
    picked = take_points(states, (15, 10, 5, 0), 25)[..., 0, 0, 0]
    np.testing.assert_array_equal(picked, [[9, 14, 19, 24], [34, 39, 44, 49]])


def test_trajectories_out_of_bounds():
    points = np.zeros((5, 2, 1, 1, 1), np.float32)
    points[1:, 1, 0, 0, 0] = (-4.0, 4.1, np.nan, -np.inf)
    np.testing.assert_array_equal(is_within_bounds(jnp.asarray(points), 4.0), [True, True, False, False, False])
    np.testing.assert_array_equal(is_within_bounds(jnp.asarray(points), 0.0), [True, True, True, False, False])
