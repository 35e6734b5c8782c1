"""Consistency distillation (Song et al. 2023, algorithm 2).

A student f that is constant along the teacher's trajectories maps each of their states to their end. With x at node n
of a grid of K steps, a guided DDIM step of the teacher from there to x', and the target f⁻, the running average of the
student (equations 7 and 8; its gradient is not taken),

    L = d(f(x, t_n), f⁻(x', t_{n+1})),    f⁻ ← μ·f⁻ + (1 − μ)·f.

The boundary condition f(x, 0) = x, without which a constant would do, holds for any network that predicts v or the
velocity: x̂_0 = α·x − σ·v, and σ = 0 at the data. So c_skip and c_out of the paper's equation 5 are α and −σ here.
Samples of S > 1 steps are the paper's algorithm 1, at S of the grid's nodes. What differs from the paper:

- The teacher's step is DDIM's, on a uniform grid of few nodes (the paper: Heun on 18 or 40 of EDM's), and it is guided,
  as all methods' teacher is.
- The examples that are noised are the teacher's samples out of the store, not data.
- The distance is the pseudo-Huber one of Song and Dhariwal (2024), or the mean square: LPIPS needs a network that was
  trained on photographs.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ard_jax.diffusion import Grid, few_step_process
from ard_jax.errors import UserError
from ard_jax.models import Backbone
from ard_jax.models.flops import teacher_macs
from ard_jax.objectives import STUDENT, Given, Joint, Method, require_kind
from ard_jax.objectives.few_steps import (
    at_node,
    calls_of,
    distance,
    draw_nodes,
    named_grid,
    require_store,
    teacher_samples,
)
from ard_jax.sampling import NO_GUIDANCE, teacher_predictor


def build(given: Given) -> Method:
    """Consistency distillation; for its options see `distill.consistency`.

    Raises:
        UserError: another kind of student, no store, or a grid without the student's nodes.
    """
    require_kind(given, "stochastic")
    require_store(given)
    # the student's call and its backward pass, the target's call, and the teacher's
    flops = (6 + 2 + 2 * calls_of(given.solve.guidance)) * teacher_macs(given.teacher, given.shape)
    return Method(consistency(given), flops, reads="teacher", begin=begin)


def begin(params, frozen, key):
    """No other network learns; the target starts as the student, which no step has moved yet."""
    return {}, {"target": jax.tree.map(jnp.copy, params), "step": jnp.zeros((), jnp.int32)}


def _follow(memory, params, decay: float, step: jax.Array):
    """The target after the student's last move; within a step that is done in turns, it moves in the first alone."""
    moved = optax.incremental_update(params, memory["target"], 1.0 - decay)
    target = jax.tree.map(lambda new, old: jnp.where(memory["step"] == step, old, new), moved, memory["target"])
    return {"target": target, "step": step}


def consistency(given: Given) -> Joint:
    """Builds the objective.

    The batch holds "x0" (batch, point, height, width, channel), "condition" (leaves (batch, …)) and
    "position" (batch,).
    """
    options, process, guidance = given.options, few_step_process(given.solve.process), given.solve.guidance
    grid, student = fine_grid(given, "consistency"), cast(Backbone, given.student)  # of the kind "stochastic"

    def loss(params, target, frozen, batch, key):
        x0, condition = teacher_samples(given, batch), batch["condition"]
        node, noise = draw_nodes(key, batch["position"], range(grid.steps - 1), given.shape)
        x = at_node(x0, noise, grid, node)
        teacher = teacher_predictor(given.teacher, frozen, condition, grid, given.solve.process, guidance)
        following = at_node(*teacher(x, node), grid, node + 1)
        aim = teacher_predictor(student, target, condition, grid, process, NO_GUIDANCE)(following, node + 1).x0
        prediction = teacher_predictor(student, params, condition, grid, process, NO_GUIDANCE)(x, node).x0
        return jnp.mean(distance(prediction, aim, options["huber"]))

    def gradients(networks, memory, frozen, batch, key, step):
        memory = _follow(memory, networks[STUDENT], options["decay"], step)
        value, gradient = jax.value_and_grad(loss)(networks[STUDENT], memory["target"], frozen, batch, key)
        return {STUDENT: gradient}, memory, {"loss": value}

    return Joint(gradients)


def fine_grid(given: Given, name: str) -> Grid:
    """The grid of K steps, and the data itself as its last node, where x̂_0 is the state whatever the network says.

    K is `grid` of the options of the method `name`.

    Raises:
        UserError: K is no multiple of the student's steps, whose nodes would not all be trained then, or more than the
            process has timesteps.
    """
    steps, count = len(given.points), given.options["grid"]
    count = count or -(-given.solve.steps // steps) * steps
    if count % steps:
        raise UserError(
            f"distill.{name}.grid is {count}, which is no multiple of the student's {steps} steps: "
            f"choose one that is, or 0 for the first from the teacher's steps on."
        )
    process = few_step_process(given.solve.process)
    grid = named_grid(process, count, name)
    return grid._replace(times=np.append(grid.times, process.data_time))
