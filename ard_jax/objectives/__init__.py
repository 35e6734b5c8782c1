"""Training objectives, one small file each.

The teacher's is `denoising`. The file of a distillation method has a function `build`, which makes a `Method` from what
is `Given`; `config.distill.objective` names one here, or a module of anybody's by its dotted name.

An objective is built once from its settings and is then a pure function
(params, frozen, batch, key) → (loss, metrics): `frozen` holds parameters that are read but not trained (None where
there are none), `key` is the run's random key, the same at every step, and whatever is drawn for an example is drawn
from that key and the example's position in the endless stream of data. Its loss is a mean over the examples; where some
do not count, how many do stands among the metrics as `KEPT`, by which the parts of a step are weighed.

Where other networks learn beside the one that will be sampled, each from a loss of its own, or where something is
remembered from step to step, it is a `Joint`.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ard_jax.errors import UserError, first_line
from ard_jax.models import Backbone, Network
from ard_jax.sampling import Solve
from ard_jax.types import Batch, Params, PyTree

Metrics = dict[str, jax.Array]
Objective = Callable[[Params, PyTree, Batch, jax.Array], tuple[jax.Array, Metrics]]
# (params, frozen, key) → the other networks' parameters by name, and the memory, of a `Joint`
Begin = Callable[[Params, PyTree, jax.Array], tuple[dict[str, Params], PyTree]]


class Joint(NamedTuple):
    """An objective of several networks.

    Attributes:
        gradients: (networks, memory, frozen, batch, key, step) → (gradients, memory, metrics). `networks` is a dict of
            parameters, "student" for the one that is averaged and sampled, and its gradients are of the same form;
            `memory` is a pytree that no gradient moves, such as spectral-norm vectors or a slow copy of the student;
            `step` is the number of steps done; among the metrics is "loss".
    """

    gradients: Callable[..., tuple[dict[str, Params], PyTree, Metrics]]


STUDENT = "student"  # its name among the networks of a `Joint`
KEPT = "kept"  # the metric, which no log shows


class Given(NamedTuple):
    """What a distillation method is built from.

    Attributes:
        student: the network that learns; see `build.make_student`.
        kind: of the student, `config.student.kind`.
        teacher: the teacher's network.
        solve: how the teacher is sampled; its `process` is the teacher's.
        shape: (height, width, channel) of an example.
        points: respaced indices of the student's points, S of them.
        target: "x0" or "xt", which of the points' states the student learns.
        columns: where the points stand among those of a record; None where there is no store (`distill.online`).
        start: what the training starts from: None for the teacher, or how an earlier student is sampled, its number of
            steps.
        max_abs: trajectories that leave [-max_abs, max_abs] do not count; 0 for any. A store has dropped them.
        seed: of the run.
        options: the method's own settings, `config.distill.<objective>`; empty if it has none.
        horizontal_flip: mirror half of the real images, if the method is shown any: the teacher learnt from such.
    """

    student: Network
    kind: str
    teacher: Backbone
    solve: Solve
    shape: tuple[int, int, int]
    points: tuple[int, ...]
    target: str
    columns: tuple[int, ...] | None
    start: int | None
    max_abs: float
    seed: int
    options: Mapping[str, Any]
    horizontal_flip: bool = False


class Method(NamedTuple):
    """What is trained, and what that needs.

    Attributes:
        objective: the loss, or the gradients.
        flops: of a training step, an example; all methods are given the same number of them.
        reads: whose parameters `frozen` holds: "teacher", "start" (what the training starts from), or "" for none.
        begin: (params, frozen, key) → (others, memory) of a `Joint`, before the first step.
        optimizers: of a `Joint`, the settings of the other networks' optimisers by name.
        every: of a `Joint`, by a network's name, that it moves at every so-manieth step alone. Its optimiser does not
            see the steps in between, nor count them.
        real: whether it is shown real images: the batch then has "trajectory", the records, and "real", as the
            adversarial fine-tune's.
    """

    objective: Objective | Joint
    flops: float
    reads: str = ""
    begin: Begin | None = None
    optimizers: Mapping[str, Any] = {}
    every: Mapping[str, int] = {}
    real: bool = False


METHODS = ("ard", "progressive", "consistency", "distribution_matching", "trajectory_matching", "mean_flow")


def find_method(name: str) -> Callable[[Given], Method]:
    """The function `build` of a method.

    Args:
        name: one of `METHODS`, or the dotted name of a module.

    Raises:
        UserError: there is no such module, or it has no function `build`.
    """
    try:
        module = importlib.import_module(f"ard_jax.objectives.{name}" if name in METHODS else name)
        return module.build
    except Exception as error:  # whatever somebody's module raises
        raise UserError(
            f"distill.objective {name!r} cannot be used ({first_line(error)}): choose one of {', '.join(METHODS)}, or "
            f"give the dotted name of a module with a function build."
        ) from error


def require_kind(given: Given, *kinds: str) -> None:
    """Raises UserError if a method is asked to train a kind of student that it cannot."""
    if given.kind not in kinds:
        raise UserError(f"student.kind is {given.kind!r}, but this objective trains {' or '.join(kinds)}: choose that.")
