"""Autoregressive distillation: L = 1/S · Σ_s mean‖G(x_{τS:s}, s) − x_{τs−1}‖² (ARD, section 3.1).

`distill.ard` may give the steps weights, a pseudo-Huber distance in the place of the mean square, and the student's own
points as its history in the place of the teacher's, which the paper does not. With one block it is knowledge
distillation; with the diagonal mask or no history layers it is step distillation, the baseline.
"""

from typing import cast

import jax
import jax.numpy as jnp

from ard_jax.errors import UserError
from ard_jax.models import ARDStudent, Backbone, Condition
from ard_jax.models.flops import student_macs, teacher_macs
from ard_jax.objectives import KEPT, Given, Method, Metrics, Objective, require_kind
from ard_jax.objectives.few_steps import distance
from ard_jax.sampling import (
    Solve,
    draw_noise,
    is_within_bounds,
    network_calls,
    sample_student,
    sample_teacher,
    take_points,
    trajectory_key,
)
from ard_jax.types import Params


def build(given: Given) -> Method:
    """ARD from a store, or with the teacher inside the training step where there is none; for its options see
    `distill.ard`.

    Raises:
        UserError: another kind of student, or weights that are not one above 0 for each of its steps.
    """
    require_kind(given, "history")
    weights, own_history = tuple(given.options["step_weights"]), given.options["own_history"]
    if weights and (len(weights) != len(given.points) or min(weights) <= 0):
        raise UserError(
            f"distill.ard.step_weights is {weights}, but the student has {len(given.points)} steps: give a number "
            "above 0 for each of them, or () for equal ones."
        )
    if own_history and len(given.points) == 1:
        raise UserError("distill.ard.own_history is True, but a student of one step has no history: set it to False.")
    options = dict(weights=weights, huber=given.options["huber"], own_history=own_history)
    student = cast(ARDStudent, given.student)
    flops = (8 if own_history else 6) * student_macs(student, given.shape)  # forward 2, backward 4
    if given.columns is not None:
        objective = ard(student, target=given.target, columns=given.columns, **options)
        return Method(objective, flops)
    objective = online_ard(
        student,
        given.teacher,
        target=given.target,
        points=given.points,
        shape=given.shape,
        seed=given.seed,
        max_abs=given.max_abs,
        how=given.solve,
        **options,
    )
    flops += 2 * network_calls(given.solve) * teacher_macs(given.teacher, given.shape)
    return Method(objective, flops, reads="teacher")


def teacher_forcing(
    student: ARDStudent, params: Params, noise: jax.Array, points: jax.Array, condition: Condition
) -> jax.Array:
    """Predictions of every point from the teacher's own earlier points.

    Args:
        student, params: an `ARDStudent` and its parameters.
        noise: x_T, (batch, height, width, channel).
        points: x_{τS−1}, …, x_{τ0}, (batch, step, height, width, channel).
        condition: leaves (batch, …).

    Returns:
        Of the shape of `points`.
    """
    inputs = jnp.concatenate([noise[:, None], points[:, :-1]], axis=1)
    return student.apply({"params": params}, inputs, condition)  # type: ignore[return-value]  # see layers.layer_norm


def _loss_per_step(
    student: ARDStudent,
    params: Params,
    noise: jax.Array,
    points: jax.Array,
    condition: Condition,
    kept: jax.Array,
    huber: float,
    own_history: bool,
) -> jax.Array:
    """Error of each step, the mean of the rows that are kept (1, else 0), (step,); see `teacher_forcing`.

    With `own_history` the predictions are from the student's own earlier points, which are taken as given.
    """
    history = points
    if own_history:
        history = jax.lax.stop_gradient(sample_student(student, params, noise, condition))
    prediction = teacher_forcing(student, params, noise, history, condition).astype(jnp.float32)
    per_row = distance(prediction, points, huber)
    return jnp.sum(per_row * kept[:, None], axis=0) / jnp.maximum(jnp.sum(kept), 1.0)


def summarise(per_step: jax.Array, weights: tuple[float, ...] = ()) -> tuple[jax.Array, Metrics]:
    """The steps' mean, weighted if there are weights, and each step's for the log."""
    loss = jnp.average(per_step, weights=jnp.asarray(weights, per_step.dtype)) if weights else jnp.mean(per_step)
    return loss, {f"loss_step_{step + 1}": value for step, value in enumerate(per_step)}


def ard(
    student: ARDStudent,
    *,
    target: str,
    columns: tuple[int, ...],
    weights: tuple[float, ...] = (),
    huber: float = 0.0,
    own_history: bool = False,
) -> Objective:
    """Builds the objective on stored trajectories.

    Args:
        student: the student.
        target: "x0" or "xt", which of the record's arrays to learn.
        columns: where the student's points stand among the record's.
        weights: of the steps' losses, of which only the proportions tell; () for equal ones.
        huber: constant of the pseudo-Huber distance; 0 for the mean square.
        own_history: predict from the student's own points, by its parameters of the moment, instead of the teacher's.

    The batch holds "noise" (batch, height, width, channel), `target` (batch, point, height, width, channel) and
    "condition" (leaves (batch, …)).
    """

    def loss(params, frozen, batch, key):
        noise = batch["noise"].astype(jnp.float32)
        points = batch[target][:, jnp.asarray(columns)].astype(jnp.float32)
        kept = jnp.ones(len(noise))
        per_step = _loss_per_step(student, params, noise, points, batch["condition"], kept, huber, own_history)
        return summarise(per_step, weights)

    return loss


def online_ard(
    student: ARDStudent,
    teacher: Backbone,
    *,
    target: str,
    points: tuple[int, ...],
    shape: tuple[int, int, int],
    seed: int,
    max_abs: float,
    how: Solve,
    weights: tuple[float, ...] = (),
    huber: float = 0.0,
    own_history: bool = False,
) -> Objective:
    """Builds the objective whose teacher runs inside the training step; no store is needed.

    Args:
        student, teacher: the two networks; `frozen` holds the teacher's parameters.
        target: "x0" or "xt".
        points: respaced indices of the student's points.
        shape: (height, width, channel).
        seed: of the trajectories: position i is the trajectory that the job would store as record i.
        max_abs: trajectories that leave [-max_abs, max_abs] get no weight; 0 keeps all.
        how: the teacher is sampled.
        weights, huber, own_history: as in `ard`.

    The batch holds "position" (batch,) and "condition" (leaves (batch, …)).
    """

    def loss(params, frozen, batch, key):
        noise, condition = draw_noise(trajectory_key(seed), batch["position"], shape), batch["condition"]
        solution = sample_teacher(teacher, frozen, noise, condition, how)
        kept = is_within_bounds(take_points(solution.x0, points, how.steps), max_abs)
        states = take_points(getattr(solution, target), points, how.steps)
        # a dropped row may hold anything, and 0 · inf is not 0
        states = jnp.where(kept[:, None, None, None, None], jax.lax.stop_gradient(states), 0.0)
        kept = kept.astype(jnp.float32)
        per_step = _loss_per_step(student, params, noise, states, condition, kept, huber, own_history)
        value, metrics = summarise(per_step, weights)
        return value, {**metrics, KEPT: jnp.sum(kept)}

    return loss
