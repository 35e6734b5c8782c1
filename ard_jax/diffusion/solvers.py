"""ODE solvers of a teacher, each a pure function of one step on a `Grid`.

The probability-flow ODE of x_t = α·x_0 + σ·ε is dx = x̂_0(x, t) dα + ε̂(x, t) dσ. DDIM is its Euler step in (α, σ),
for noise-predicting and velocity networks alike; Heun is the trapezoidal step in the same variables.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ard_jax.diffusion.processes import Grid, Prediction
from ard_jax.errors import UserError

# (x, node) → prediction at the state x of that node; the node is an index into the grid, possibly traced.
Predict = Callable[[jax.Array, jax.Array | int], Prediction]


class Coefficients(NamedTuple):
    """α and σ of a step's two ends, and of the node before (of the node itself in the first step); scalars."""

    node: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    next_alpha: jax.Array
    next_sigma: jax.Array
    last_alpha: jax.Array
    last_sigma: jax.Array
    is_last: jax.Array


class Solution(NamedTuple):
    """What a solve hands back; both (batch, steps, height, width, channel), in the order of the steps walked.

    Attributes:
        x0: the x0-prediction that each step started from.
        xt: the state that each step arrived at; the last one is the sample.
    """

    x0: jax.Array
    xt: jax.Array


# (predict, x, coefficients, x0 of the step before) → (next x, x0-prediction at x)
Step = Callable[[Predict, jax.Array, Coefficients, jax.Array], tuple[jax.Array, jax.Array]]


def ddim(predict: Predict, x: jax.Array, c: Coefficients, last_x0: jax.Array) -> tuple[jax.Array, jax.Array]:
    """DDIM with η = 0 (Song et al. 2021, equation 12), order 1."""
    x0, noise = predict(x, c.node)
    return c.next_alpha * x0 + c.next_sigma * noise, x0


def heun(predict: Predict, x: jax.Array, c: Coefficients, last_x0: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Heun's method in (α, σ) (EDM, Karras et al. 2022, algorithm 1), order 2: two calls a step, one in the last."""
    x0, noise = predict(x, c.node)
    guess = c.next_alpha * x0 + c.next_sigma * noise

    def correct():
        end = predict(guess, c.node + 1)
        slope_alpha, slope_sigma = (x0 + end.x0) / 2, (noise + end.noise) / 2
        return x + (c.next_alpha - c.alpha) * slope_alpha + (c.next_sigma - c.sigma) * slope_sigma

    return jax.lax.cond(c.is_last, lambda: guess, correct), x0


def dpm_solver_pp_2m(
    predict: Predict, x: jax.Array, c: Coefficients, last_x0: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), order 2 with one call a step; first and last are of order 1.

    With λ = log(α/σ) the step is x' = (σ'/σ)·x − α'·(e^{−h} − 1)·D, D being x0 extrapolated over half a step.
    """
    x0, _ = predict(x, c.node)
    log_snr, next_log_snr, last_log_snr = (
        jnp.log(alpha) - jnp.log(sigma)
        for alpha, sigma in ((c.alpha, c.sigma), (c.next_alpha, c.next_sigma), (c.last_alpha, c.last_sigma))
    )
    # h/(2·h_last): nothing to extrapolate from in the first step (h_last = 0), nowhere to go in the last (h = ∞),
    # and a node of pure noise (α = 0, h_last = ∞) says nothing about the slope.
    first = c.node == 0
    ratio = (next_log_snr - log_snr) / (2 * jnp.where(first, 1.0, log_snr - last_log_snr))
    weight = jnp.where(first | c.is_last | ~jnp.isfinite(ratio), 0.0, ratio).astype(x.dtype)
    extrapolated = x0 + weight * (x0 - last_x0)
    # α'·(e^{−h} − 1) = σ'·α/σ − α', which is finite where α = 0 or σ' = 0
    shrink = c.next_sigma / c.sigma
    return shrink * x - (shrink * c.alpha - c.next_alpha) * extrapolated, x0


SOLVERS: dict[str, Step] = {"ddim": ddim, "heun": heun, "dpm++2m": dpm_solver_pp_2m}


def calls(solver: str, steps: int) -> int:
    """Network evaluations of a solve (each twice where guidance is on)."""
    return 2 * steps - 1 if solver == "heun" else steps


def find_solver(name: str) -> Step:
    """Raises UserError for an unknown name."""
    if name not in SOLVERS:
        raise UserError(f"solver is {name!r}, which does not exist: choose one of {', '.join(SOLVERS)}.")
    return SOLVERS[name]


def coefficients_of(grid: Grid, dtype: jax.typing.DTypeLike) -> Coefficients:
    """Those of every step, leaves (steps,)."""
    alpha, sigma = jnp.asarray(grid.alpha, dtype), jnp.asarray(grid.sigma, dtype)
    nodes = jnp.arange(grid.steps)
    before = jnp.maximum(nodes - 1, 0)
    return Coefficients(
        nodes, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], alpha[before], sigma[before], nodes == grid.steps - 1
    )


def solve(solver: str, predict: Predict, grid: Grid, noise: jax.Array) -> Solution:
    """Integrates from noise (batch, height, width, channel) over the grid.

    Raises:
        UserError: unknown solver.
    """
    step = find_solver(solver)

    def walk(
        carry: tuple[jax.Array, jax.Array], c: Coefficients
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        x, x0 = step(predict, carry[0], c, carry[1])
        return (x, x0), (x0, x)

    _, (x0, xt) = jax.lax.scan(walk, (noise, jnp.zeros_like(noise)), coefficients_of(grid, noise.dtype))
    return Solution(jnp.moveaxis(x0, 0, 1), jnp.moveaxis(xt, 0, 1))
