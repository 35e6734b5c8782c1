"""Progressive distillation: one DDIM step out of two of the teacher's (Salimans and Ho 2022, algorithm 2).

From z at time t two DDIM steps of half the length, by way of t', lead to z'' at t''. The x_0 with which one step of
DDIM arrives there too is

    x̃ = (z'' − (σ''/σ)·z) / (α'' − (σ''/σ)·α),    and    L = max(α²/σ², 1)·‖x̃ − x̂_0(z, t)‖².

The first round learns from the guided diffusion teacher at 2S steps, each later one from the student of 2S steps that
`distill.start` names, which it also starts from. Three things differ from the paper:

- The examples that are noised are the teacher's samples out of the store, not data: all methods are given the same.
- Guidance is distilled in the first round, together with the first halving; later rounds need none. Meng et al. (2023)
  spend a round of its own on it.
- The teacher predicts ε, and z at the noise end says next to nothing of x̂_0 then. The students predict v (the paper's
  appendix D), so that holds for the first round alone: give it as many steps as the budget allows.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.diffusion import Grid, few_step_process, per_row
from ard_jax.diffusion.solvers import Predict
from ard_jax.errors import UserError
from ard_jax.models import Backbone
from ard_jax.models.flops import teacher_macs
from ard_jax.objectives import Given, Method, Objective, require_kind
from ard_jax.objectives.few_steps import at_node, calls_of, draw_nodes, require_store, teacher_samples
from ard_jax.sampling import NO_GUIDANCE, teacher_predictor


def build(given: Given) -> Method:
    """One round.

    Raises:
        UserError: another kind of student, no store, or a start of other than twice the steps.
    """
    require_kind(given, "deterministic")
    require_store(given)
    steps = len(given.points)
    if given.start not in (None, 2 * steps):
        raise UserError(
            f"distill.start is a student of {given.start} steps, but progressive distillation makes one step of two: "
            f"start from a student of {2 * steps} steps, or from the teacher."
        )
    guidance = given.solve.guidance if given.start is None else NO_GUIDANCE
    macs = teacher_macs(given.teacher, given.shape)
    return Method(
        progressive(given), (6 + 2 * 2 * calls_of(guidance)) * macs, reads="teacher" if given.start is None else "start"
    )


def progressive(given: Given) -> Objective:
    """Builds the objective.

    The batch holds "x0" (batch, point, height, width, channel), "condition" (leaves (batch, …)) and
    "position" (batch,).
    """
    process = few_step_process(given.solve.process)
    steps, student = len(given.points), cast(Backbone, given.student)  # of the kind "deterministic"
    grid, halves = process.grid(steps), process.grid(2 * steps)
    seen = (given.solve.process, given.solve.guidance) if given.start is None else (process, NO_GUIDANCE)
    weights = jnp.asarray(np.maximum((grid.alpha[:-1] / grid.sigma[:-1]) ** 2, 1.0), jnp.float32)

    def loss(params, frozen, batch, key):
        x0, condition = teacher_samples(given, batch), batch["condition"]
        node, noise = draw_nodes(key, batch["position"], range(steps), given.shape)
        x = at_node(x0, noise, grid, node)
        target = _two_step_target(
            teacher_predictor(given.teacher, frozen, condition, halves, *seen), x, halves, 2 * node
        )
        prediction = teacher_predictor(student, params, condition, grid, process, NO_GUIDANCE)(x, node).x0
        error = jnp.mean((prediction - target) ** 2, axis=(1, 2, 3))
        return jnp.mean(weights[node] * error), {"unweighted": jnp.mean(error)}

    return loss


def _two_step_target(predict: Predict, x: jax.Array, grid: Grid, node: jax.Array) -> jax.Array:
    """x̃: the x_0 with which one DDIM step arrives where two do.

    Args:
        predict: the teacher, on `grid`.
        x: states, (batch, height, width, channel).
        grid: with the node in the middle.
        node: where each state is, (batch,).

    Returns:
        Of the shape of `x`.
    """
    middle = at_node(*predict(x, node), grid, node + 1)
    end = at_node(*predict(middle, node + 1), grid, node + 2)
    alpha, sigma = (jnp.asarray(values, x.dtype) for values in (grid.alpha, grid.sigma))
    shrink = sigma[node + 2] / sigma[node]
    return (end - per_row(shrink, x) * x) / per_row(alpha[node + 2] - shrink * alpha[node], x)
