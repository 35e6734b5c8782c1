"""Distribution matching distillation (DMD2: Yin et al. 2024b; the gradient is that of DMD, Yin et al. 2024a).

The student's samples x̂ shall be distributed as the teacher's. The gradient of the reverse KL divergence of the two,
noised to time t, is the difference of their scores; with predictions of x_0 in the scores' place (DMD, equations 7, 8)

    ∇L = E[(x̂_0,fake(x_t, t) − x̂_0,real(x_t, t)) / mean|x̂ − x̂_0,real(x_t, t)| · ∂x̂/∂θ],    x_t = α·x̂ + σ·ε.

The real score is the guided teacher. The fake one is a second network, which starts as the teacher and learns to
denoise the student's samples as they come, by the teacher's own loss. It must keep up: it moves at every step, the
student at every `ratio`-th (two time-scales, DMD2 section 4.2). In between the student's optimiser is not called at
all: Adam would go on moving it by its momentum, and count zeros as gradients. Its learning-rate schedule counts its own
moves. What differs from DMD2:

- The GAN term (section 4.3) is left out: it needs real images, and heads upon the fake score.
- A student of S > 1 steps is trained at inputs that are noised from the teacher's samples in the store, at its own S
  nodes. DMD2 takes them from the student's own rollout (section 4.5), which costs (S − 1)/2 more calls on average; its
  aim is that training sees what sampling sees, and the better the student, the less the two differ.
- The student predicts v, so that at the noise end its first guess is not divided by α.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from ard_jax.diffusion import few_step_process
from ard_jax.errors import UserError
from ard_jax.models import Backbone
from ard_jax.models.flops import teacher_macs
from ard_jax.objectives import STUDENT, Given, Joint, Method, require_kind
from ard_jax.objectives.denoising import denoising
from ard_jax.objectives.few_steps import at_node, calls_of, draw_nodes, require_store, teacher_samples
from ard_jax.sampling import NO_GUIDANCE, teacher_predictor
from ard_jax.types import Batch, Params

FAKE = "fake"


def build(given: Given) -> Method:
    """Distribution matching; for its options see `distill.distribution_matching`.

    Raises:
        UserError: another kind of student, no store, or no time in the interval.
    """
    require_kind(given, "stochastic")
    require_store(given)
    ratio = given.options["ratio"]
    # every step: the student's samples and the fake score's learning; every ratio-th: both scores, and the way back
    each, seldom = 2 + 6, 2 * calls_of(given.solve.guidance) + 2 + 4
    flops = (each + seldom / ratio) * teacher_macs(given.teacher, given.shape)
    return Method(
        distribution_matching(given),
        flops,
        reads="teacher",
        begin=_begin,
        optimizers={FAKE: given.options["optimizer"]},
        every={STUDENT: ratio},
    )


def _begin(params: Params, frozen: Params, key: jax.Array) -> tuple[dict[str, Params], None]:
    """The fake score starts as the teacher; nothing is remembered."""
    return {FAKE: jax.tree.map(jnp.copy, frozen)}, None


def distribution_matching(given: Given) -> Joint:
    """Builds the objective.

    The batch holds "x0" (batch, point, height, width, channel), "condition" (leaves (batch, …)) and
    "position" (batch,).
    """
    learn_fake = jax.value_and_grad(
        denoising(given.teacher, given.solve.process, label_dropout=0.0, horizontal_flip=False), has_aux=True
    )
    grid, nodes = given.solve.process.grid(given.options["grid"]), _scored_nodes(given)
    guidance, ratio = given.solve.guidance, given.options["ratio"]

    def difference(images, fake, teacher, batch, key):
        """The gradient with respect to the student's samples, each row's."""
        node, noise = draw_nodes(key, batch["position"], nodes, given.shape)
        x = at_node(images, noise, grid, node)
        fake, real = (
            teacher_predictor(given.teacher, params, batch["condition"], grid, given.solve.process, guided)(x, node).x0
            for params, guided in ((fake, NO_GUIDANCE), (teacher, guidance))
        )
        return matching_gradient(fake, real, images)

    def gradients(networks, memory, frozen, batch, key, step):
        input_key, score_key, fake_key = jax.random.split(key, 3)
        images, pull_back = jax.vjp(lambda params: _generate(given, params, batch, input_key), networks[STUDENT])

        def move():
            change = difference(images, networks[FAKE], frozen, batch, score_key)
            return pull_back(change / change.size)[0]

        def stay():
            return jax.tree.map(jnp.zeros_like, networks[STUDENT])

        gradient = jax.lax.cond((step + 1) % ratio == 0, move, stay)
        rows = {"image": images, "condition": batch["condition"], "position": batch["position"]}
        (value, _), fake = learn_fake(networks[FAKE], None, rows, fake_key)
        return {STUDENT: gradient, FAKE: fake}, memory, {"loss": value}

    return Joint(gradients)


def _generate(given: Given, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """The student's x̂_0 from the teacher's samples noised at one of its nodes, (batch, height, width, channel)."""
    student = cast(Backbone, given.student)  # of the kind "stochastic"
    process = few_step_process(given.solve.process)
    grid = process.grid(len(given.points))
    node, noise = draw_nodes(key, batch["position"], range(grid.steps), given.shape)
    x = at_node(teacher_samples(given, batch), noise, grid, node)
    return teacher_predictor(student, params, batch["condition"], grid, process, NO_GUIDANCE)(x, node).x0


def matching_gradient(fake: jax.Array, real: jax.Array, images: jax.Array) -> jax.Array:
    """(fake − real) / mean|images − real| of each row; all (batch, height, width, channel), the x_0-predictions of
    the two scores and the samples that they were shown with noise."""
    scale = jnp.mean(jnp.abs(images - real), axis=(1, 2, 3), keepdims=True)
    return (fake - real) / jnp.maximum(scale, 1e-6)  # where the student is perfect, both are 0


def _scored_nodes(given: Given) -> range:
    """Nodes of the grid at which scores are compared.

    Raises:
        UserError: there are none in the interval.
    """
    process, options = given.solve.process, given.options
    times = process.grid(options["grid"]).times
    way = (times - process.data_time) / (process.noise_time - process.data_time)
    low, high = options["interval"]
    nodes = np.flatnonzero((low <= way) & (way <= high))
    if not len(nodes):
        raise UserError(
            f"distill.distribution_matching.interval is ({low}, {high}), in which none of the "
            f"{options['grid']} times of its grid lies: widen it, or raise distill.distribution_matching.grid."
        )
    return range(nodes[0], nodes[-1] + 1)
