"""What the methods share that compare the student's score with the teacher's: both scores, and the student's states.

The student's samples x̂ shall be distributed as the teacher's. The gradient of the reverse KL divergence of the two,
noised to time t, is the difference of their scores; with predictions of x_0 in the scores' place (DMD, Yin et al.
2024a, equations 7 and 8)

    ∇L = E[(x̂_0,fake(x_t, t) − x̂_0,real(x_t, t)) / mean|x̂ − x̂_0,real(x_t, t)| · ∂x̂/∂θ],    x_t = α·x̂ + σ·ε.

The real score is the guided teacher. The fake one is a second network, which starts as the teacher and learns to
denoise the student's samples as they come.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.diffusion import Grid, few_step_process
from ard_jax.diffusion.solvers import Predict
from ard_jax.errors import UserError
from ard_jax.models import Backbone
from ard_jax.objectives import Given
from ard_jax.objectives.few_steps import at_node, calls_of, draw_nodes, named_grid
from ard_jax.sampling import NO_GUIDANCE, fresh_noise, teacher_predictor
from ard_jax.types import Batch, Params

FAKE = "fake"  # its name among the networks


def begin_fake(params: Params, frozen: Params, key: jax.Array) -> tuple[dict[str, Params], None]:
    """The fake score starts as the teacher; nothing is remembered."""
    return {FAKE: jax.tree.map(jnp.copy, frozen)}, None


def scoring_macs(given: Given, ratio: int) -> float:
    """Forward passes of the teacher's network that a step takes, each 2 FLOPs a multiply-accumulate.

    Every step: the student's rollout up to its node, its samples, and the fake score's learning, a pass and the two of
    its gradients; every `ratio`-th: both scores, and the way back.
    """
    rollout = (len(given.points) - 1) / 2
    return rollout + 1 + 3 + (1 + calls_of(given.solve.guidance) + 2) / ratio


def few_step_predictor(given: Given, params: Params, batch: Batch) -> tuple[Predict, Grid]:
    """The student on its own S nodes."""
    process = few_step_process(given.solve.process)
    grid, student = process.grid(len(given.points)), cast(Backbone, given.student)
    return teacher_predictor(student, params, batch["condition"], grid, process, NO_GUIDANCE), grid


def own_state(
    given: Given, params: Params, batch: Batch, key: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the student meets at one of its nodes when it samples (backward simulation, DMD2 section 4.5).

    The node is drawn for the whole batch, as in DMD2's code: so no row waits for another, and (S − 1)/2 calls are made
    on average.

    Args:
        given, params: the student, sampled as its kind says.
        batch: "condition" (leaves (batch, …)) and "position" (batch,), by which noise is drawn.
        key: random key.
        step: number of the step, by which the node is drawn.

    Returns:
        States (batch, height, width, channel), and the node.
    """
    noise_key, node_key = jax.random.split(key)
    predict, grid = few_step_predictor(given, params, batch)
    _, noise = draw_nodes(noise_key, batch["position"], range(1), given.shape)
    node = jax.random.randint(jax.random.fold_in(node_key, step), (), 0, grid.steps)

    def walk(number, x):
        x0, predicted = predict(x, number)
        following = predicted if given.kind == "deterministic" else fresh_noise(noise, number)
        return at_node(x0, following, grid, number + 1)

    return jax.lax.fori_loop(0, node, walk, noise) if grid.steps > 1 else noise, node


def score_difference(
    given: Given,
    grid: Grid,
    fake: Params,
    teacher: Params,
    batch: Batch,
    x: jax.Array,
    node: jax.Array,
    images: jax.Array,
) -> jax.Array:
    """The gradient with respect to the student's samples, each row's; see `matching_gradient`.

    Args:
        given, fake, teacher: the network and the parameters of both scores.
        grid: of times at which scores are compared.
        batch: "condition", leaves (batch, …).
        x: the samples with noise, (batch, height, width, channel), at `node` (batch,) of the grid.
        images: the samples.
    """
    process, condition = given.solve.process, batch["condition"]
    fake_x0, real_x0 = (
        teacher_predictor(given.teacher, params, condition, grid, process, guidance)(x, node).x0
        for params, guidance in ((fake, NO_GUIDANCE), (teacher, given.solve.guidance))
    )
    return matching_gradient(fake_x0, real_x0, images)


def matching_gradient(fake: jax.Array, real: jax.Array, images: jax.Array) -> jax.Array:
    """(fake − real) / mean|images − real| of each row; all (batch, height, width, channel), the x_0-predictions of
    the two scores and the samples that they were shown with noise."""
    scale = jnp.mean(jnp.abs(images - real), axis=(1, 2, 3), keepdims=True)
    return (fake - real) / jnp.maximum(scale, 1e-6)  # where the student is perfect, both are 0


def add_in_proportion(change: jax.Array, other: jax.Array, weight: float) -> jax.Array:
    """change + λ·other, where λ·other is `weight` times as long as `change`; of any one shape."""
    length = jnp.linalg.norm(other.reshape(-1))
    return change + weight * jnp.linalg.norm(change.reshape(-1)) / jnp.maximum(length, 1e-12) * other


def scored_nodes(given: Given, name: str) -> range:
    """Nodes of the grid at which scores are compared, those in `interval` of the options of the method `name`.

    Raises:
        UserError: there are none in the interval, or the process has no such grid.
    """
    process, options = given.solve.process, given.options
    times = named_grid(process, options["grid"], name).times
    # in float32, so that rounding in float64 leaves out no end of the interval
    way = ((times - process.data_time) / (process.noise_time - process.data_time)).astype(np.float32)
    low, high = options["interval"]
    nodes = np.flatnonzero((low <= way) & (way <= high))
    if not len(nodes):
        raise UserError(
            f"distill.{name}.interval is ({low}, {high}), in which none of the {options['grid']} times of its grid "
            f"lies: widen it, or raise distill.{name}.grid."
        )
    return range(nodes[0], nodes[-1] + 1)
