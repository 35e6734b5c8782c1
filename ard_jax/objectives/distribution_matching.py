"""Distribution matching distillation (DMD2: Yin et al. 2024b, arXiv 2405.14867).

The student's samples x̂ learn from the difference of two scores (see `objectives.scores`, which has the equation) and
from a discriminator (DMD2, section 4.3):

    ∇L = (∇L_matching + λ·∇L_G) · ∂x̂/∂θ,    L_G = −E D(x̂),    λ = weight · ‖∇L_matching‖ / ‖∇L_G‖.

The fake score learns by the teacher's own loss and must keep up: it and the discriminator move at every step, the
student at every `ratio`-th (two time-scales, section 4.2). In between the student's optimiser is not called at all:
Adam would go on moving it by its momentum, and count zeros as gradients. Its learning-rate schedule counts its own
moves. A student of S > 1 steps is trained at the states of its own rollout (section 4.5). What differs from DMD2:

- The discriminator is the fine-tune's: hinge loss, heads on the blocks of the frozen teacher (there: of the fake
  score), which sees images at one time near the data (there: at all times).
- λ follows the norms at the samples, as in the fine-tune; there it is a constant, for one data set.
- The student predicts v, so that at the noise end its first guess is not divided by α.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ard_jax.models.discriminator import power_iteration
from ard_jax.models.flops import teacher_macs
from ard_jax.objectives import STUDENT, Given, Joint, Method, Metrics, require_kind
from ard_jax.objectives.adversarial import (
    DISCRIMINATOR,
    Judge,
    begin_heads,
    flip_at_random,
    judge_both,
    judging_flops,
    make_judge,
)
from ard_jax.objectives.denoising import denoising
from ard_jax.objectives.few_steps import at_node, draw_nodes, require_store
from ard_jax.objectives.scores import (
    FAKE,
    add_in_proportion,
    begin_fake,
    few_step_predictor,
    own_state,
    score_difference,
    scored_nodes,
    scoring_macs,
)

SPECTRAL_ROUNDS = 30  # before the first step, see `models.discriminator.power_iteration`


def build(given: Given) -> Method:
    """Distribution matching; for its options see `distill.distribution_matching`.

    Raises:
        UserError: another kind of student, no store, or no time in the interval.
    """
    require_kind(given, "stochastic")
    require_store(given)
    options = given.options
    flops = 2 * scoring_macs(given, options["ratio"]) * teacher_macs(given.teacher, given.shape)
    optimizers: dict[str, Any] = {FAKE: options["optimizer"]}
    judge = None
    if options["weight"]:
        judge = make_judge(given.teacher, tuple(options["layers"]), given.solve.process, options["feature_time"])
        judging = judging_flops(judge, given.shape)
        flops += judging.features + judging.heads + judging.pull / options["ratio"]
        optimizers[DISCRIMINATOR] = options["discriminator_optimizer"]

    def begin(params, frozen, key):
        networks, vectors = begin_fake(params, frozen, key)
        if judge:
            networks[DISCRIMINATOR], vectors = begin_heads(judge, frozen, given.shape, key, SPECTRAL_ROUNDS)
        return networks, vectors

    objective, every = distribution_matching(given, judge), {STUDENT: options["ratio"]}
    real = judge is not None
    return Method(objective, flops, reads="teacher", begin=begin, optimizers=optimizers, every=every, real=real)


def distribution_matching(given: Given, judge: Judge | None = None) -> Joint:
    """Builds the objective, with the discriminator's term if there is a judge.

    The batch holds "condition" (leaves (batch, …)) and "position" (batch,); if there is a judge, "trajectory" and
    "real" hold them, and the latter "image" (batch, height, width, channel). The memory is the heads' spectral vectors,
    turned once a step.
    """
    learn_fake = jax.value_and_grad(
        denoising(given.teacher, given.solve.process, label_dropout=0.0, horizontal_flip=False), has_aux=True
    )
    nodes, grid = scored_nodes(given, "distribution_matching"), given.solve.process.grid(given.options["grid"])
    ratio, weight = given.options["ratio"], given.options["weight"]

    def gradients(networks, memory, frozen, batch, key, step):
        input_key, score_key, fake_key, judge_key = jax.random.split(key, 4)
        whole, batch = batch, batch["trajectory"] if judge else batch
        x, node = own_state(given, networks[STUDENT], batch, input_key, step)
        images, pull_back = jax.vjp(
            lambda params: few_step_predictor(given, params, batch)[0](x, node).x0, networks[STUDENT]
        )
        rows = {"image": images, "condition": batch["condition"], "position": batch["position"]}
        gradient, to_images = {}, None
        metrics: Metrics = {}
        if judge:
            memory = power_iteration(networks[DISCRIMINATOR], memory)
            seen = whole["real"]
            if given.horizontal_flip:
                flip_key = jax.random.fold_in(judge_key, 2)  # none of the two that it is split into
                seen = {**seen, "image": flip_at_random(flip_key, seen["position"], seen["image"])}
            real, fake = zip((seen, rows), jax.random.split(judge_key), strict=True)
            gradient[DISCRIMINATOR], to_images, metrics = judge_both(
                judge, networks[DISCRIMINATOR], memory, frozen, real, fake
            )

        def move():
            score_node, noise = draw_nodes(score_key, batch["position"], nodes, given.shape)
            shown = at_node(images, noise, grid, score_node)
            change = score_difference(given, grid, networks[FAKE], frozen, batch, shown, score_node, images)
            if to_images:
                change = add_in_proportion(change, to_images(), weight)
            return pull_back(change / change.size)[0]

        def stay():
            return jax.tree.map(jnp.zeros_like, networks[STUDENT])

        gradient[STUDENT] = jax.lax.cond((step + 1) % ratio == 0, move, stay)
        (value, _), gradient[FAKE] = learn_fake(networks[FAKE], None, rows, fake_key)
        return gradient, memory, {"loss": value, **metrics}

    return Joint(gradients)
