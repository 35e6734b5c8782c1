"""Processes, guidance and ODE solvers: pure functions."""

from ard_jax.diffusion.guidance import Guidance, guided_output, prepare_condition, prepared_output
from ard_jax.diffusion.processes import FlowMatching, Grid, LinearVP, Prediction, Process, few_step_process, per_row
from ard_jax.diffusion.solvers import SOLVERS, Solution, calls, coefficients_of, find_solver, solve

__all__ = [
    "SOLVERS",
    "FlowMatching",
    "Grid",
    "Guidance",
    "LinearVP",
    "Prediction",
    "Process",
    "Solution",
    "calls",
    "coefficients_of",
    "few_step_process",
    "find_solver",
    "guided_output",
    "per_row",
    "prepare_condition",
    "prepared_output",
    "solve",
]
