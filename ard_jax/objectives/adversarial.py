"""The adversarial fine-tune of a trained student (ARD, section 3.3; docs/METHOD.md section 6).

The student goes on with its regression loss and, on the last prediction alone, learns to look real to heads on the
frozen teacher's blocks, which learn beside it to tell its predictions from data:

    L_D = E relu(1 − D(real)) + E relu(1 + D(fake))        (hinge; means over tokens and heads)
    L_G = −E D(fake)
    L   = L_regression + λ·L_G,   λ = weight · clip(‖∇_W L_regression‖ / (‖∇_W L_G‖ + 1e-4), 0, 1e4)

with W the last head's linear kernel (the adaptive weight of VQGAN, arXiv 2012.09841, equation 7). All of it is one
jitted step on the whole batch, so λ is one number for all devices. Both gradients of the student are taken at its
heads, and their sum goes once through its trunk.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ard_jax.diffusion import LinearVP, Process
from ard_jax.models import ARDStudent, Backbone, Condition, Discriminator
from ard_jax.models.backbone import condition_like
from ard_jax.models.discriminator import Vectors, normalise_kernels, power_iteration, random_vectors
from ard_jax.models.flops import discriminator_macs, student_macs, teacher_macs
from ard_jax.objectives import STUDENT, Joint, Method, Metrics
from ard_jax.objectives.ard import summarise
from ard_jax.types import Batch, Params, PyTree

DISCRIMINATOR = "discriminator"  # its name among the networks


class Judge(NamedTuple):
    """The teacher's features and the heads on them.

    Attributes:
        teacher: the frozen network.
        heads: the discriminator.
        layers: indices of the teacher's blocks that the heads stand on.
        process: the teacher's.
        time: network time that the teacher is told. At the data's own it sees images as they are, at a later one noised
            as it was trained on them (as in LADD, arXiv 2403.12015).
    """

    teacher: Backbone
    heads: Discriminator
    layers: tuple[int, ...]
    process: Process
    time: float

    def features(
        self, params: Params, images: jax.Array, condition: Condition, key: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Backbone.features`; `params` are the teacher's; noise is drawn by the key and the position (batch,)."""
        time = jnp.full(len(images), self.time)
        if self.time != self.process.data_time:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, position)
            # in float32 whatever the images are: bfloat16 noise has 128 values, by which fakes would be known
            noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], jnp.float32))(keys)
            images = self.process.noised(images.astype(jnp.float32), noise, time)
        seen = images, time, condition, self.layers
        # see layers.layer_norm, here and below
        return self.teacher.apply({"params": params}, *seen, method="features")  # type: ignore[return-value]

    def logits(self, params: Params, vectors: Vectors, tokens: jax.Array, summary: jax.Array) -> jax.Array:
        """(head, batch, token); `params` are the heads'."""
        return self.heads.apply({"params": normalise_kernels(params, vectors)}, tokens, summary)  # type: ignore[return-value]


def make_judge(teacher: Backbone, layers: tuple[int, ...], process: Process, share: float) -> Judge:
    """A judge with a head on each of the given blocks, () for all, at a share of the way from data to noise; of a
    process with timesteps, at the nearest of them."""
    layers = layers or tuple(range(teacher.depth))
    time = process.data_time + share * (process.noise_time - process.data_time)
    if isinstance(process, LinearVP):
        time = float(round(time))  # between two timesteps there is no noise level
    return Judge(teacher, Discriminator(len(layers), dtype=teacher.dtype), layers, process, time)


def begin_heads(
    judge: Judge, frozen: Params, shape: tuple[int, int, int], key: jax.Array, rounds: int
) -> tuple[Params, Vectors]:
    """The heads before the first step, and their spectral vectors after so many power iterations."""
    init_key, vector_key = jax.random.split(jax.random.fold_in(key, 2))
    one = condition_like(judge.teacher, 1)
    seen = judge.features(frozen, jnp.zeros((1, *shape)), one, key, jnp.zeros(1, jnp.int32))
    heads = judge.heads.init(init_key, *seen)["params"]
    return heads, power_iteration(heads, random_vectors(heads, vector_key), rounds)


class JudgingFlops(NamedTuple):
    """FLOPs an example, 2 a multiply-accumulate for a forward pass and for each of its gradients.

    Attributes:
        features: the teacher sees real and fake.
        heads: learn from both, and hand a gradient back to the fake's tokens.
        pull: the teacher hands it on to the fake.
    """

    features: float
    heads: float
    pull: float


def judging_flops(judge: Judge, shape: tuple[int, int, int]) -> JudgingFlops:
    """What it costs to judge a real and a fake example of (height, width, channel)."""
    teacher = teacher_macs(judge.teacher, shape) * (max(judge.layers) + 1) / judge.teacher.depth
    return JudgingFlops(4 * teacher, 14 * discriminator_macs(judge.teacher, len(judge.layers), shape), 2 * teacher)


def adversarial_method(
    student: ARDStudent,
    judge: Judge,
    *,
    shape: tuple[int, int, int],
    target: str,
    columns: tuple[int, ...],
    horizontal_flip: bool,
    weight: float,
    warmup: int,
    spectral_rounds: int,
    optimizer: Mapping[str, Any],
) -> Method:
    """The objective, how its discriminator starts, and what it costs.

    Args:
        student, judge: the networks; `frozen` holds the teacher's parameters.
        shape: (height, width, channel) of an example.
        target, columns, horizontal_flip, weight, warmup: see `adversarial`.
        spectral_rounds: power iterations before the first step.
        optimizer: the discriminator's settings.
    """

    def begin(params, frozen, key):
        heads, vectors = begin_heads(judge, frozen, shape, key, spectral_rounds)
        return {DISCRIMINATOR: heads}, vectors

    judging = judging_flops(judge, shape)
    flops = 6 * student_macs(student, shape) + judging.features + judging.pull + judging.heads
    objective = adversarial(
        student, judge, target=target, columns=columns, horizontal_flip=horizontal_flip, weight=weight, warmup=warmup
    )
    return Method(objective, flops, reads="teacher", begin=begin, optimizers={DISCRIMINATOR: optimizer})


def adversarial(
    student: ARDStudent,
    judge: Judge,
    *,
    target: str,
    columns: tuple[int, ...],
    horizontal_flip: bool,
    weight: float,
    warmup: int,
) -> Joint:
    """Builds the objective.

    Args:
        student, judge: the networks; `frozen` holds the teacher's parameters.
        target: "x0" or "xt", which of the record's arrays the student learns.
        columns: where the student's points stand among the record's.
        horizontal_flip: mirror half of the real images.
        weight: of the generator's gradient over the regression's, at W.
        warmup: steps in which only the discriminator and the regression learn.

    The batch holds "trajectory", as `objectives.ard` reads it, and "real": "image" (batch, height, width, channel),
    both with "condition" (leaves (batch, …)) and "position" (batch,). The memory is the heads' spectral vectors, turned
    once a step.
    """

    def gradients(networks, memory, frozen, batch, key, step):
        vectors = power_iteration(networks[DISCRIMINATOR], memory)
        flip_key, real_key, fake_key = jax.random.split(jax.random.fold_in(key, 3), 3)
        real, trajectory = batch["real"], batch["trajectory"]
        images = flip_at_random(flip_key, real["position"], real["image"]) if horizontal_flip else real["image"]

        student_pass = _student_forward(student, networks[STUDENT], trajectory, target, columns)
        params, seen = networks[DISCRIMINATOR], {**real, "image": images}
        shown = {**trajectory, "image": student_pass.fake}
        heads, pull, judged = judge_both(judge, params, vectors, frozen, (seen, real_key), (shown, fake_key))
        to_fake = pull()
        gradient, factor = _combine_gradients(student_pass, to_fake, weight * (step >= warmup))
        loss = student_pass.loss + factor * judged["loss_generator"]
        regression = {"loss_regression": student_pass.loss, **student_pass.metrics}
        metrics = {"loss": loss, "adaptive_weight": factor, **regression, **judged}
        return {STUDENT: gradient, DISCRIMINATOR: heads}, vectors, metrics

    return Joint(gradients)


def judge_both(
    judge: Judge,
    params: Params,
    vectors: Vectors,
    frozen: Params,
    real: tuple[Batch, jax.Array],
    fake: tuple[Batch, jax.Array],
) -> tuple[Params, Callable[[], jax.Array], Metrics]:
    """Shows both to the teacher and the heads.

    Args:
        judge, params, vectors: the heads' parameters and spectral vectors.
        frozen: the teacher's parameters.
        real, fake: "image" (batch, height, width, channel), "condition" and "position", and a key for noise.

    Returns:
        The gradient of L_D at the heads' parameters, a function that makes that of L_G at the fake images by a backward
        pass through the teacher, and the metrics.
    """

    def look(image, rows, key):
        return judge.features(frozen, image, rows["condition"], key, rows["position"])

    tokens, pull, summary = jax.vjp(lambda image: look(image, *fake), fake[0]["image"], has_aux=True)
    seen = look(real[0]["image"], *real)
    heads, to_tokens, metrics = _discriminator_gradient(judge, params, vectors, seen, (tokens, summary))
    return heads, lambda: pull(to_tokens)[0], metrics


def _discriminator_gradient(
    judge: Judge,
    params: Params,
    vectors: Vectors,
    real: tuple[jax.Array, jax.Array],
    fake: tuple[jax.Array, jax.Array],
) -> tuple[Params, jax.Array, Metrics]:
    """Both sides' gradients, from one forward pass of the heads over each of real and fake.

    Args:
        judge, params, vectors: the heads' parameters and spectral vectors.
        real, fake: tokens and summary of `Judge.features`.

    Returns:
        The gradient of L_D at the heads' parameters, that of L_G at the fake tokens, and the metrics.
    """

    def logits_of_fake(params, tokens):
        return judge.logits(params, vectors, tokens, fake[1])

    def loss_on_real(params):
        logits = judge.logits(params, vectors, *real)
        return jnp.mean(jax.nn.relu(1 - logits)), logits

    def loss_on_fake(logits):
        return jnp.mean(jax.nn.relu(1 + logits))

    (real_loss, real_logits), from_real = jax.value_and_grad(loss_on_real, has_aux=True)(params)
    logits, pull = jax.vjp(logits_of_fake, params, fake[0])
    fake_loss, to_logits = jax.value_and_grad(loss_on_fake)(logits)
    from_fake, _ = pull(to_logits)
    _, to_tokens = pull(jnp.full_like(logits, -1 / logits.size))
    metrics = {
        "loss_generator": -jnp.mean(logits),
        "loss_discriminator": real_loss + fake_loss,
        "right_real": jnp.mean(real_logits > 0),
        "right_fake": jnp.mean(logits < 0),
    }
    return jax.tree.map(jnp.add, from_real, from_fake), to_tokens, metrics


class StudentPass(NamedTuple):
    """A student's forward pass under teacher forcing, and the ways back.

    Attributes:
        loss, metrics: of the regression.
        fake: the last prediction, (batch, height, width, channel).
        to_predictions: the regression's gradient there, (batch, step, height, width, channel).
        pull_heads: a gradient at the predictions → at (the heads' parameters, the trunk's output).
        pull_trunk: a gradient at the trunk's output → at the other parameters.
    """

    loss: jax.Array
    metrics: Metrics
    fake: jax.Array
    to_predictions: jax.Array
    pull_heads: Callable[[jax.Array], tuple[Params, PyTree]]
    pull_trunk: Callable[[PyTree], tuple[Params]]


def _student_forward(
    student: ARDStudent, params: Params, batch: Batch, target: str, columns: tuple[int, ...]
) -> StudentPass:
    """Runs the student on the teacher's points; arguments as of `adversarial`."""
    noise = batch["noise"].astype(jnp.float32)
    points = batch[target][:, jnp.asarray(columns)].astype(jnp.float32)
    inputs = jnp.concatenate([noise[:, None], points[:, :-1]], axis=1)
    heads = {"final_layer": params["final_layer"]}
    trunk = {name: part for name, part in params.items() if name not in heads}

    def run_trunk(trunk):
        return student.apply({"params": trunk}, inputs, batch["condition"], method="trunk")

    def run_heads(heads, hidden):
        return student.apply({"params": heads}, *hidden, inputs, method="read_out")

    def regression(predictions):
        per_step = jnp.mean((predictions.astype(jnp.float32) - points) ** 2, axis=(0, 2, 3, 4))
        return summarise(per_step)

    hidden, pull_trunk = jax.vjp(run_trunk, trunk)
    predictions, pull_heads = jax.vjp(run_heads, heads, hidden)
    (loss, metrics), to_predictions = jax.value_and_grad(regression, has_aux=True)(predictions)
    return StudentPass(loss, metrics, predictions[:, -1], to_predictions, pull_heads, pull_trunk)


def _combine_gradients(student_pass: StudentPass, to_fake: jax.Array, weight: jax.Array) -> tuple[Params, jax.Array]:
    """The student's gradient of L_regression + λ·L_G, and λ.

    Args:
        student_pass: what `_student_forward` made.
        to_fake: the gradient of L_G at the last prediction.
        weight: of λ, see `adversarial`.
    """
    last = jnp.zeros_like(student_pass.to_predictions).at[:, -1].set(to_fake)
    regression, generator = (student_pass.pull_heads(at) for at in (student_pass.to_predictions, last))
    norms = [jnp.linalg.norm(_last_kernel(heads).astype(jnp.float32)) for heads, _ in (regression, generator)]
    factor = jax.lax.stop_gradient(weight * jnp.clip(norms[0] / (norms[1] + 1e-4), 0.0, 1e4))

    def combine(a, b):  # what a context has of whole numbers, such as the lengths of captions, has no gradient
        return a if a.dtype == jax.dtypes.float0 else a + factor.astype(b.dtype) * b

    heads, hidden = jax.tree.map(combine, regression, generator)
    (trunk,) = student_pass.pull_trunk(hidden)
    return {**trunk, **heads}, factor


def _last_kernel(heads: Params) -> jax.Array:
    """W, (width, features): of the last step's head, or of the one that all steps share."""
    kernel = heads["final_layer"]["linear"]["kernel"]
    return kernel[-1] if kernel.ndim == 3 else kernel


def flip_at_random(key: jax.Array, positions: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors half of the images (batch, height, width, channel), by the key and their positions in the data."""

    def flip(position, image):
        return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, position)), image[:, ::-1], image)

    return jax.vmap(flip)(positions, images)
