"""Mean flow by interval splitting, distilled from the teacher (SplitMeanFlow: Guo et al. 2025, arXiv 2507.16884).

F(x_t, t) is the mean velocity of the trajectory from t to r, that which takes one step there. Between them any s splits
the way, and the mean velocities add up by their lengths. With the teacher's first piece, one guided DDIM step from x_t
to x_s, and F⁻, the student without gradient, for the rest,

    (t − r)·F = (t − s)·v + (s − r)·F⁻(x_s, s)          (interval splitting; s → t makes it MeanFlow's identity,
                                                        Geng et al. 2025, arXiv 2505.13447)
    cos(t − r)·x_t − sin(t − r)·F = x_r                 on the circle α = cos t, σ = sin t of a VP process, where the
                                                        step is a turn as in TrigFlow (sCM, Lu and Song 2025,
                                                        arXiv 2410.11081), and x_r is where both pieces lead

and L = d(F, what solves that), d the pseudo-Huber distance of `objectives.consistency`. What differs:

- MeanFlow's own form has dF/dt in the place of the second piece, and was tried first: training ran away
  (benchmarks/RESULTS.md), perhaps by the teacher's time features, which turn by up to a radian a timestep; sCM warns of
  such.
- F⁻ is the student as it is, as in the papers. On digits that learns four steps, and runs away at one.
- The network is told t alone. r follows: for a deterministic student the next of its S nodes, so that training knows
  the very steps of sampling, for a stochastic one the data. In the papers any r < t is learned.
- s is the next of K times, `grid`; in the paper it is anywhere between.
- The teacher's samples are noised, and its velocity is guided; MeanFlow trains on data with x_0's and ε's.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.diffusion import FlowMatching, Grid, few_step_process, per_row
from ard_jax.diffusion.processes import Prediction
from ard_jax.models import Backbone
from ard_jax.models.flops import teacher_macs
from ard_jax.objectives import Given, Method, Objective, require_kind
from ard_jax.objectives.consistency import fine_grid
from ard_jax.objectives.few_steps import at_node, calls_of, distance, draw_nodes, require_store, teacher_samples
from ard_jax.sampling import NO_GUIDANCE, teacher_predictor


def build(given: Given) -> Method:
    """Mean flow; for its options see `distill.mean_flow`.

    Raises:
        UserError: another kind of student, no store, or a grid without the student's nodes.
    """
    require_kind(given, "deterministic", "stochastic")
    require_store(given)
    # the student's call and its backward pass, its call without gradient, and the teacher's
    flops = (6 + 2 + 2 * calls_of(given.solve.guidance)) * teacher_macs(given.teacher, given.shape)
    return Method(mean_flow(given), flops, reads="teacher")


def mean_flow(given: Given) -> Objective:
    """Builds the objective.

    The batch holds "x0" (batch, point, height, width, channel), "condition" (leaves (batch, …)) and
    "position" (batch,).
    """
    process, student = few_step_process(given.solve.process), cast(Backbone, given.student)
    straight, options, guidance = isinstance(process, FlowMatching), given.options, given.solve.guidance
    grid = fine_grid(given, "mean_flow")
    steps = grid.steps - 1  # the last node is the data
    ends, clock = jnp.asarray(ends_of(given, steps), jnp.int32), clock_of(grid, straight)

    def loss(params, frozen, batch, key):
        condition = batch["condition"]
        node, noise = draw_nodes(key, batch["position"], range(steps), given.shape)
        x, end, times = (
            at_node(teacher_samples(given, batch), noise, grid, node),
            ends[node],
            jnp.asarray(clock, "float32"),
        )
        own = teacher_predictor(student, params, condition, grid, process, NO_GUIDANCE)
        teacher = teacher_predictor(given.teacher, frozen, condition, grid, given.solve.process, guidance)
        split = at_node(*teacher(x, node), grid, node + 1)
        rest = at_node(*own(split, node + 1), grid, end)
        # where the next node is the end there is no rest
        arrived = jnp.where(per_row(node + 1 == end, x), split, rest)
        target = mean_velocity(x, arrived, per_row(times[node] - times[end], x), straight)
        alpha, sigma = (per_row(jnp.asarray(values, x.dtype)[node], x) for values in (grid.alpha, grid.sigma))
        velocity = velocity_of(own(x, node), alpha, sigma, straight)
        return jnp.mean(distance(velocity, jax.lax.stop_gradient(target), options["huber"])), {}

    return loss


def velocity_of(prediction: Prediction, alpha: jax.Array, sigma: jax.Array, straight: bool) -> jax.Array:
    """dx/dt of predictions at a state: ε̂ − x̂_0, or on the circle α·ε̂ − σ·x̂_0."""
    return prediction.noise - prediction.x0 if straight else alpha * prediction.noise - sigma * prediction.x0


def mean_velocity(x: jax.Array, arrived: jax.Array, length: jax.Array, straight: bool) -> jax.Array:
    """The velocity with which one step of a length t − r leads from x to where it arrives; all broadcast together."""
    if straight:
        return (x - arrived) / length
    return (jnp.cos(length) * x - arrived) / jnp.sin(length)


def clock_of(grid: Grid, straight: bool) -> np.ndarray:
    """t of each of the grid's nodes and of the data: σ on straight lines, else the angle."""
    return grid.sigma if straight else np.arctan2(grid.sigma, grid.alpha)


def ends_of(given: Given, steps: int) -> np.ndarray:
    """Where each node's step ends, (K,): the next of the student's S nodes, or the data, which is node K."""
    length = steps if given.kind == "stochastic" else steps // len(given.points)
    return (np.arange(steps) // length + 1) * length
