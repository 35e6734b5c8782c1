"""Trajectory distribution matching (TDM: Luo et al. 2025, arXiv 2503.06674).

The student's deterministic trajectory shall pass through the teacher's marginals: after the step from t_k to t_{k+1},
nearer to the data, what it arrives at is noised on from there to a time τ of that step alone (the paper's
"sampling-steps-aware" objective), so that each step answers for the noise levels that it removed,

    x_τ = (α_τ/α)·x_{k+1} + β·ε = α_τ·x̂_0 + σ_τ·ε',    β² = σ_τ² − (α_τ/α)²·σ²,    t_{k+1} ≤ τ ≤ t_k,

and x̂_0 learns from the difference of the scores there, as in `objectives.scores`. The fake score is one network for all
steps. It learns to tell x̂_0 and the mixed noise ε' = ((α_τ/α)·σ·ε̂ + β·ε)/σ_τ from x_τ, each row with the importance
weight exp(−mean ε'²/2) / exp(−mean ε²/2), as in the authors' code: ε' is not quite normal, since ε̂ is the student's.
No images are read. What differs from the paper:

- The fake score's loss is the teacher's own; there it is of x_0 with the weight min(SNR, 5).
- Adam has its usual momentum; there β_1 is 0.
- The node is one for the whole batch, see `scores.own_state`; there each row has its own, after a whole rollout.
- The student predicts v, so that at the noise end its first guess is not divided by α.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.diffusion import Grid, few_step_process
from ard_jax.diffusion.processes import Prediction
from ard_jax.errors import UserError
from ard_jax.models.flops import teacher_macs
from ard_jax.objectives import STUDENT, Given, Joint, Method, require_kind
from ard_jax.objectives.few_steps import Span, at_node, draw_nodes, mix_noise, named_grid
from ard_jax.objectives.scores import (
    FAKE,
    begin_fake,
    few_step_predictor,
    own_state,
    score_difference,
    scored_nodes,
    scoring_macs,
)

NAME = "trajectory_matching"


def build(given: Given) -> Method:
    """Trajectory matching; for its options see `distill.trajectory_matching`.

    Raises:
        UserError: another kind of student, or a step without a time at which scores are compared.
    """
    require_kind(given, "deterministic")
    ratio, optimizers = given.options["ratio"], {FAKE: given.options["optimizer"]}
    flops = 2 * scoring_macs(given, ratio) * teacher_macs(given.teacher, given.shape)
    objective, every = trajectory_matching(given), {STUDENT: ratio}
    return Method(objective, flops, reads="teacher", begin=begin_fake, optimizers=optimizers, every=every)


def trajectory_matching(given: Given) -> Joint:
    """Builds the objective. The batch holds "condition" (leaves (batch, …)) and "position" (batch,)."""
    process, ratio = given.solve.process, given.options["ratio"]
    grid = named_grid(process, given.options["grid"], NAME)
    times, spans = jnp.asarray(grid.times, jnp.float32), jnp.asarray(spans_of_steps(given, grid))

    def generate(params, batch, x, node):
        return few_step_predictor(given, params, batch)[0](x, node)

    def learn_fake(params, batch, shown, time, prediction, weight):
        output: Any = given.teacher.apply({"params": params}, shown, time, batch["condition"])
        error = output[..., : given.teacher.channels].astype(jnp.float32) - process.target(*prediction)
        return jnp.mean(weight * jnp.mean(error**2, axis=(1, 2, 3)))

    def gradients(networks, memory, frozen, batch, key, step):
        input_key, score_key = jax.random.split(key)
        x, node = own_state(given, networks[STUDENT], batch, input_key, step)
        _, own = few_step_predictor(given, networks[STUDENT], batch)
        made, pull_back = jax.vjp(lambda params: generate(params, batch, x, node), networks[STUDENT])
        later, fresh = draw_nodes(score_key, batch["position"], Span(*spans[node]), given.shape)
        mixed, weight = mix_noise(made.noise, fresh, own, node + 1, grid, later)
        shown = at_node(made.x0, mixed, grid, later)

        def move():
            change = score_difference(given, grid, networks[FAKE], frozen, batch, shown, later, made.x0)
            return pull_back(Prediction(change / change.size, jnp.zeros_like(change)))[0]

        def stay():
            return jax.tree.map(jnp.zeros_like, networks[STUDENT])

        gradient = jax.lax.cond((step + 1) % ratio == 0, move, stay)
        value, fake = jax.value_and_grad(learn_fake)(
            networks[FAKE], batch, shown, times[later], Prediction(made.x0, mixed), weight
        )
        return {STUDENT: gradient, FAKE: fake}, memory, {"loss": value}

    return Joint(gradients)


def spans_of_steps(given: Given, grid: Grid) -> np.ndarray:
    """First and last but one node of `grid` that lie within each of the student's steps and in the interval, (S, 2).

    Raises:
        UserError: a step has none.
    """
    own, nodes = few_step_process(given.solve.process).grid(len(given.points)), scored_nodes(given, NAME)
    # rising with the noise; in float32, in which nodes that two grids share are the same
    ends, noise = (np.arctan2(part.sigma, part.alpha).astype(np.float32) for part in (own, grid))
    spans = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        inside = [node for node in nodes if end <= noise[node] <= start]
        if not inside:
            raise UserError(
                f"distill.{NAME}.grid is {given.options['grid']}, of which no time in its interval lies in one of the "
                f"student's {own.steps} steps: raise it, or widen distill.{NAME}.interval."
            )
        spans.append((inside[0], inside[-1] + 1))
    return np.array(spans)
