"""Sampling: the teacher's ODE, and the student's few cached steps."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ard_jax.diffusion import Grid, Guidance, LinearVP, Process, Solution, guided_output, solve
from ard_jax.diffusion.solvers import Predict
from ard_jax.models import ARDStudent, DiT


def teacher_predictor(model: DiT, params, y: jax.Array, grid: Grid, process: Process, guidance: Guidance) -> Predict:
    """A guided teacher as what a solver calls."""
    times, alpha, sigma = (jnp.asarray(values) for values in grid)

    def predict(x, node):
        output = guided_output(model, params, x, times[node].astype(x.dtype), y, guidance, process)
        return process.predict(output, x, alpha[node].astype(x.dtype), sigma[node].astype(x.dtype))

    return predict


def sample_teacher(
    model: DiT,
    params,
    noise: jax.Array,
    y: jax.Array,
    *,
    steps: int = 25,
    guidance_scale: float = 1.5,
    guided_channels: int = 3,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    solver: str = "ddim",
    process: Process | None = None,
) -> Solution:
    """Solves the teacher's probability-flow ODE.

    Args:
        model, params: a `DiT` and its parameters.
        noise: x_T, (batch, height, width, channel).
        y: labels, (batch,).
        steps: steps of the solver on the respaced grid.
        guidance_scale, guided_channels, guidance_interval: see `Guidance`; 0 channels guides all.
        solver: "ddim", "heun" or "dpm++2m".
        process: what the network predicts; `LinearVP()` if None.

    Returns:
        `x0` and `xt`, each (batch, steps, height, width, channel), in the order of time walked; `xt[:, -1]` is the
        sample.

    Raises:
        UserError: unknown solver, steps or guidance out of range.
    """
    process = process or LinearVP()
    guidance = Guidance(guidance_scale, guided_channels, tuple(guidance_interval))
    grid = process.grid(steps)
    return solve(solver, teacher_predictor(model, params, y, grid, process, guidance), grid, noise)


def trajectory_key(seed: int) -> jax.Array:
    """Key of the noises and labels that students are trained on."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def sampling_key(seed: int) -> jax.Array:
    """Key of the noises and labels that are sampled from: never those of training, even at the same seed."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def draw_noise_and_labels(
    key: jax.Array, indices: jax.Array, shape: tuple[int, int, int], num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Noise and label number i, functions of (key, i) alone.

    Args:
        key: `trajectory_key` or `sampling_key`.
        indices: (batch,), unsigned integers.
        shape: (height, width, channel).
        num_classes: labels are uniform over them.

    Returns:
        Noise (batch, height, width, channel), float32, and labels (batch,), int32.
    """

    def draw(index):
        noise_key, label_key = jax.random.split(jax.random.fold_in(key, index))
        return jax.random.normal(noise_key, shape), jax.random.randint(label_key, (), 0, num_classes)

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


def within_bounds(points: jax.Array, max_abs: float) -> jax.Array:
    """Which trajectories are finite and stay within [-max_abs, max_abs] (0: any finite value) at their points.

    A few in a thousand of a teacher's solves blow up, because x̂_0 = (x − σ·ε̂)/α divides by α = 0.006 at the noise end;
    unfiltered, they swamp every mean of squares.
    """
    largest = jnp.max(jnp.abs(points), axis=tuple(range(1, points.ndim)))
    return largest <= (max_abs or jnp.finfo(points.dtype).max)


def sample_student(
    model: ARDStudent, params, noise: jax.Array, y: jax.Array, given: Mapping[int, jax.Array] | None = None
) -> jax.Array:
    """The student's steps from noise, each prediction the next block's input; history keys and values are cached.

    Args:
        model, params: an `ARDStudent` and its parameters.
        noise: x_T, (batch, height, width, channel).
        y: labels, (batch,).
        given: points that take the place of the student's own, by their step, 1 … S: what image editing
            (docs/METHOD.md section 4) and error accumulation need.

    Returns:
        (batch, steps, height, width, channel); the last step is the sample.
    """
    given, cache, points, x = given or {}, (), [], noise
    for step in range(1, model.steps + 1):
        prediction, cache = model.apply({"params": params}, x, y, cache, method="step")
        x = given.get(step, prediction).astype(noise.dtype)
        points.append(x)
    return jnp.stack(points, axis=1)
