"""Sampling: the teacher's ODE, and the student's few cached steps."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.diffusion import (
    Grid,
    Guidance,
    LinearVP,
    Process,
    Solution,
    calls,
    coefficients_of,
    few_step_process,
    find_solver,
    per_row,
    prepare_condition,
    prepared_output,
    solve,
)
from ard_jax.diffusion.solvers import Predict
from ard_jax.errors import UserError
from ard_jax.keys import make_key
from ard_jax.models import ARDStudent, Backbone, Condition, Network
from ard_jax.types import Params, PyTree

NO_GUIDANCE = Guidance(scale=1.0)


def teacher_predictor(
    model: Backbone, params: Params, condition: Condition, grid: Grid, process: Process, guidance: Guidance
) -> Predict:
    """A guided teacher as what a solver calls; its node may also be one a row, (batch,)."""
    prepared = prepare_condition(model, params, condition, guidance)
    return _prepared_predictor(model, params, prepared, grid, process, guidance)


def _prepared_predictor(
    model: Backbone, params: Params, prepared: PyTree, grid: Grid, process: Process, guidance: Guidance
) -> Predict:
    """`teacher_predictor` of what `prepare_condition` made of the condition."""
    times, alpha, sigma = (jnp.asarray(values) for values in grid)

    def predict(x, node):
        output = prepared_output(model, params, x, times[node].astype(x.dtype), prepared, guidance, process)
        return process.predict(output, x, *(per_row(values[node].astype(x.dtype), x) for values in (alpha, sigma)))

    return predict


@dataclasses.dataclass(frozen=True)
class Solve:
    """How a teacher is sampled.

    Attributes:
        process: what the network predicts.
        solver: "ddim", "heun" or "dpm++2m".
        steps: of the solver on the respaced grid.
        guidance: see `Guidance`.

    Raises:
        UserError: unknown solver, or steps out of range.
    """

    process: Process = LinearVP()
    solver: str = "ddim"
    steps: int = 25
    guidance: Guidance = Guidance()

    def __post_init__(self):
        find_solver(self.solver)
        self.process.grid(self.steps)


def sample_teacher(model: Backbone, params: Params, noise: jax.Array, condition: Condition, how: Solve) -> Solution:
    """Solves the teacher's probability-flow ODE.

    Args:
        model, params: a backbone and its parameters.
        noise: x_T, (batch, height, width, channel).
        condition: what the network is told, leaves (batch, …).
        how: process, solver, steps and guidance.

    Returns:
        `x0` and `xt`, each (batch, steps, height, width, channel), in the order of time walked; `xt[:, -1]` is the
        sample.
    """
    params, noise, condition = jax.tree.map(jnp.asarray, (params, noise, condition))
    grid = how.process.grid(how.steps)
    predict = teacher_predictor(model, params, condition, grid, how.process, how.guidance)
    return solve(how.solver, predict, grid, noise)


class TeacherSteps(NamedTuple):
    """`sample_teacher` cut up at its steps, for those who show how far it is and may stop it; to be jitted.

    Attributes:
        prepare: (params, condition) → what `step` takes of them: the work that is the same at all steps.
        step: (params, prepared, x, x0 of the step before, number of the step) → (next x, x0-prediction at x); x and x0
            are (batch, height, width, channel), and in step 0 any x0 will do.
    """

    prepare: Callable[[Params, Condition], PyTree]
    step: Callable[[Params, PyTree, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def teacher_steps(model: Backbone, how: Solve) -> TeacherSteps:
    """The parts of `sample_teacher`, which come to the same when they are called one after another."""
    grid, advance = how.process.grid(how.steps), find_solver(how.solver)

    def prepare(params, condition):
        return prepare_condition(model, params, condition, how.guidance)

    def step(params, prepared, x, last_x0, number):
        predict = _prepared_predictor(model, params, prepared, grid, how.process, how.guidance)
        c = jax.tree.map(lambda leaf: leaf[number], coefficients_of(grid, x.dtype))
        return advance(predict, x, c, last_x0)

    return TeacherSteps(prepare, step)


def network_calls(how: Solve) -> int:
    """Network evaluations of one image; guidance doubles those in its interval."""
    total = calls(how.solver, how.steps)
    if how.guidance.scale == 1:
        return total
    times = how.process.grid(how.steps).times.astype(np.float32)  # as programs have them: ends of an interval count
    nodes = [*range(how.steps), *range(1, total - how.steps + 1)]  # Heun's second calls are at the ends of its steps
    return total + sum(bool(how.guidance.acts_at(times[node], how.process)) for node in nodes)


def trajectory_key(seed: int) -> jax.Array:
    """Key of the noises and conditions that students are trained on."""
    return jax.random.fold_in(make_key(seed), 0)


def sampling_key(seed: int) -> jax.Array:
    """Key of the noises and conditions that are sampled from: never those of training, even at the same seed."""
    return jax.random.fold_in(make_key(seed), 1)


def draw_noise(key: jax.Array, indices: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Noise number i, a function of (key, i) alone; `conditions.draw_numbers` draws the condition's number beside it.

    Args:
        key: `trajectory_key` or `sampling_key`.
        indices: (batch,), unsigned integers.
        shape: (height, width, channel).

    Returns:
        (batch, height, width, channel), float32.
    """

    def draw(index):
        noise_key, _ = jax.random.split(jax.random.fold_in(key, index))
        return jax.random.normal(noise_key, shape, jnp.float32)

    return jax.vmap(draw)(indices)


def take_points(states: jax.Array, points: tuple[int, ...], steps: int) -> jax.Array:
    """Picks respaced indices out of a `Solution`'s field.

    Args:
        states: (batch, steps, height, width, channel), in the order walked, which counts respaced indices down.
        points: respaced indices, steps − 1 … 0.
        steps: steps of the solve.

    Returns:
        (batch, point, height, width, channel). For x0-predictions and noisy points alike, index 0 is the sample.
    """
    return states[:, jnp.asarray([steps - 1 - point for point in points])]


def is_within_bounds(points: jax.Array | np.ndarray, max_abs: float) -> jax.Array:
    """Which trajectories are finite and stay within [-max_abs, max_abs] (0: any finite value) at their points.

    A few in a thousand of a teacher's solves blow up, because x̂_0 = (x − σ·ε̂)/α divides by α = 0.006 at the noise end;
    unfiltered, they swamp every mean of squares.
    """
    largest = jnp.max(jnp.abs(points), axis=tuple(range(1, points.ndim)))
    return largest <= (max_abs or jnp.finfo(points.dtype).max)


def sample_student(
    model: ARDStudent,
    params: Params,
    noise: jax.Array,
    condition: Condition,
    given: Mapping[int, jax.Array] | None = None,
) -> jax.Array:
    """The student's steps from noise, each prediction the next block's input; history keys and values are cached.

    Args:
        model, params: an `ARDStudent` and its parameters.
        noise: x_T, (batch, height, width, channel).
        condition: what the network is told, leaves (batch, …).
        given: points that take the place of the student's own, by their step, 1 … S: what image editing
            (docs/METHOD.md section 4) and error accumulation need.

    Returns:
        (batch, steps, height, width, channel); the last step is the sample.
    """
    given = given or {}
    return _run_steps(model, params, noise, condition, lambda step, prediction: given.get(step, prediction))[1]


def predict_student(
    model: ARDStudent,
    params: Params,
    noise: jax.Array,
    condition: Condition,
    points: jax.Array,
    is_given: jax.Array,
) -> jax.Array:
    """What each step predicts where some of the points before it are given: one program for whichever they are.

    With none given it is `sample_student`, with all of them `objectives.ard.teacher_forcing`, step by step.

    Args:
        model, params, noise, condition: as in `sample_student`.
        points: to stand in the place of the student's own, (batch, step, height, width, channel).
        is_given: which of them do, (batch, step); whether the last does makes no difference.

    Returns:
        (batch, step, height, width, channel), the predictions and not what stood in their place.
    """

    def choose(step, prediction):
        return jnp.where(per_row(is_given[:, step - 1], prediction), points[:, step - 1], prediction)

    return _run_steps(model, params, noise, condition, choose)[0]


def _run_steps(
    model: ARDStudent,
    params: Params,
    noise: jax.Array,
    condition: Condition,
    choose: Callable[[int, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The sampler's loop; `choose` makes the next point of the step, 1 … S, and its prediction: predictions, points."""
    params, noise, condition = jax.tree.map(jnp.asarray, (params, noise, condition))
    condition = model.apply({"params": params}, condition, method="prepare")
    cache: PyTree = ()
    predictions, points, x = [], [], noise
    for step in range(1, model.steps + 1):
        prediction, cache = model.apply({"params": params}, x, condition, cache, method="step")
        predictions.append(prediction.astype(noise.dtype))
        x = choose(step, prediction).astype(noise.dtype)
        points.append(x)
    return jnp.stack(predictions, axis=1), jnp.stack(points, axis=1)


# How a student is sampled, `config.student.kind`: an `ARDStudent` from its history; a network that is told the time by
# DDIM, or with fresh noise after each step.
KINDS = ("history", "deterministic", "stochastic")

# (params, noise, condition) → the predictions, (batch, steps, height, width, channel); the last is the sample
Rollout = Callable[[Params, jax.Array, Condition], jax.Array]


@functools.cache
def student_rollout(kind: str, model: Network, steps: int, process: Process) -> Rollout:
    """How a kind of student is sampled; one function for equal students, so that what is jitted of it is too.

    Args:
        kind: one of `KINDS`.
        model: an `ARDStudent` for "history", else a backbone whose output is as `few_step_process` says.
        steps: S.
        process: the teacher's.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"student.kind is {kind!r}: choose one of {', '.join(KINDS)}.")
    if kind == "history":
        return functools.partial(sample_student, cast(ARDStudent, model))
    network = cast(Backbone, model)
    process = few_step_process(process)
    grid = process.grid(steps)
    if kind == "deterministic":

        def deterministic(params, noise, condition):
            return solve(
                "ddim", teacher_predictor(network, params, condition, grid, process, NO_GUIDANCE), grid, noise
            ).x0

        return deterministic

    def stochastic(params, noise, condition):
        predict = teacher_predictor(network, params, condition, grid, process, NO_GUIDANCE)
        x, points = noise, []
        for node in range(steps):
            points.append(predict(x, node).x0)
            alpha, sigma = (jnp.asarray(values[node + 1], x.dtype) for values in (grid.alpha, grid.sigma))
            x = alpha * points[-1] + sigma * fresh_noise(noise, node)
        return jnp.stack(points, axis=1)

    return stochastic


def fresh_noise(noise: jax.Array, step: int) -> jax.Array:
    """More noise of the shape of `noise` (batch, …), each row's drawn from its first number's bits and the step.

    So a sample is a function of its own noise and condition alone, in whichever batch it is drawn.
    """
    first = noise.reshape(len(noise), -1)[:, 0].astype(jnp.float32)
    key = jax.random.fold_in(make_key(0), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jax.lax.bitcast_convert_type(first, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, noise.shape[1:], noise.dtype))(keys)
