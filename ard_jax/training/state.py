"""Training state, optimiser and the jitted step."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from ard_jax.errors import UserError
from ard_jax.keys import make_key, wrap_key
from ard_jax.objectives import KEPT, STUDENT, Begin, Joint, Method, Metrics, Objective
from ard_jax.parallel import (
    batch_sharding,
    on_mesh,
    replicated_sharding,
    sharding_of,
    split_in_turns,
    with_shardings,
)
from ard_jax.training.reading import WHOLE
from ard_jax.types import Batch, Params, PyTree

# Optimisers by their names in optax, and whether they take weight decay.
OPTIMIZERS = {
    "adamw": True, "adam": False, "sgd": False, "lion": True, "adafactor": False, "nadamw": True, "nadam": False,
    "adan": True, "radam": False, "adabelief": False, "adamax": False, "adamaxw": True, "amsgrad": False, "yogi": False,
    "adagrad": False, "adadelta": True, "rmsprop": False, "novograd": True, "lamb": True, "lars": True,
    "sign_sgd": False, "signum": False, "noisy_sgd": False, "fromage": False,
    "optimistic_adam_v2": False, "optimistic_gradient_descent": False, "muon": True,
}  # fmt: skip


class TrainState(NamedTuple):
    """All that a step reads and writes.

    Attributes:
        step: steps done, int32.
        params: the trained parameters of the network that gets sampled.
        ema: their running average, which is what gets sampled.
        opt_state: optax's, of all networks.
        rng: the run's key data, uint32; it never changes: randomness is a function of it and the data position.
        others: of a `Joint` objective, the other networks' parameters by name; else None.
        memory: of a `Joint` objective, what it remembers from step to step; else None.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState
    rng: jax.Array
    others: dict[str, Params] | None = None
    memory: PyTree = None

    @property
    def networks(self) -> Params:
        """What is trained: the parameters, or of a `Joint` objective those of every network by its name."""
        return self.params if self.others is None else {STUDENT: self.params, **self.others}


def learning_rate(settings: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant or cosine to 0 at the last step.

    Raises:
        UserError: unknown schedule, or a warm-up as long as the training.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if not 0 <= warmup < steps:
        raise UserError(
            f"warmup_steps is {warmup} of {steps} steps that the optimiser makes: choose fewer than all of them."
        )
    if settings.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, steps - warmup)
    else:
        raise UserError(f"schedule is {settings.schedule!r}: choose constant or cosine.")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(settings: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """Gradient clipping and one of `OPTIMIZERS`.

    Raises:
        UserError: there is no such optimiser, it takes no weight decay and one is asked for, or clip is below 0.
    """
    name, decay = settings.name, settings.weight_decay
    if name not in OPTIMIZERS:
        raise UserError(f"name is {name!r}: choose one of optax's {', '.join(OPTIMIZERS)}.")
    if decay and not OPTIMIZERS[name]:
        raise UserError(
            f"weight_decay is {decay}, but optax's {name} takes none: set it to 0, or choose another such as adamw."
        )
    # a decay of 0 is said too, since some of optax's defaults are not 0
    options = {"weight_decay": decay} if OPTIMIZERS[name] else {}
    build = _muon if name == "muon" else getattr(optax, name)
    optimizer = build(learning_rate=learning_rate(settings, steps), **options)
    if settings.clip < 0:
        raise UserError(f"clip is {settings.clip}: give a gradient norm, or 0 for no clipping.")
    return optax.chain(optax.clip_by_global_norm(settings.clip), optimizer) if settings.clip else optimizer


def _muon(learning_rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the stacked matrices of the blocks, AdamW with Nesterov's momentum for all else.

    Its updates are as large as AdamW's (Liu et al., arXiv 2502.16982, section 2.2), so that the same rates suit both.
    """

    def matrices(params):
        axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # axis 0 is the layers'

        def of(path, leaf):
            in_blocks = any(getattr(step, "key", None) == "blocks" for step in path)
            return axes if in_blocks and leaf.ndim == 3 else None

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )


def optimizer_of(method: Method, settings: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """A method's optimiser; of a `Joint`, one that gives each network its own, with its own clipping.

    Args:
        method: what is trained.
        settings: the stage's section of the config: `optimizer`, the student's, and `steps`.

    Raises:
        UserError: what `make_optimizer` raises.
    """
    if not isinstance(method.objective, Joint):
        return make_optimizer(settings.optimizer, settings.steps)
    every = {STUDENT: settings.optimizer, **method.optimizers}

    def build(name, own):
        period = method.every.get(name, 1)
        optimizer = make_optimizer(own, -(-settings.steps // period))
        return optax.conditionally_mask(optimizer, lambda step: (step + 1) % period == 0) if period > 1 else optimizer

    def names(networks):
        return {name: jax.tree.map(lambda _, name=name: name, network) for name, network in networks.items()}

    return optax.partition({name: build(name, own) for name, own in every.items()}, names)


def start_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    begin: Begin | None = None,
    frozen: PyTree = None,
) -> TrainState:
    """The state before the first step; see `Method.begin`."""
    key = make_key(seed)
    others, memory = begin(params, frozen, key) if begin else (None, None)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=None,
        rng=jax.random.key_data(key),
        others=others,
        memory=memory,
    )
    return state._replace(opt_state=optimizer.init(state.networks))


def state_shapes(
    params: Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    begin: Begin | None = None,
    frozen: PyTree = None,
) -> TrainState:
    """The shapes of `init_state`'s arrays, with their shardings: a checkpoint is read by them, and nothing computed."""
    start = functools.partial(start_state, optimizer=optimizer, seed=seed, begin=begin)
    return with_shardings(jax.eval_shape(start, params, frozen=frozen), mesh)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    begin: Begin | None = None,
    frozen: PyTree = None,
) -> TrainState:
    """`start_state` on a mesh; every array owns its memory, so that the step may be given it for good."""
    shapes = state_shapes(params, optimizer, seed, mesh, begin, frozen)
    start = functools.partial(start_state, optimizer=optimizer, seed=seed, begin=begin)
    return jax.jit(start, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))(params, frozen=frozen)


def release(params: Params, kept: PyTree) -> None:
    """Frees the memory of arrays that nobody reads any more, though somebody names them; not of those in `kept`."""
    own = {id(leaf) for leaf in jax.tree.leaves(kept)}
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and id(leaf) not in own:
            leaf.delete()


def ramped_decay(decay: float, step: jax.Array) -> jax.Array:
    """EMA decay that forgets the start: min(decay, (1 + step) / (10 + step))."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def make_step(
    objective: Objective | Joint,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    mesh: Mesh,
    state: TrainState,
    frozen: PyTree = None,
    accumulate: int = 1,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]:
    """The jitted step (state, frozen, batch) → (state, metrics); the old state's memory is reused.

    Args:
        objective: see `ard_jax.objectives`.
        optimizer: optax's.
        ema_decay: of the averaged parameters, see `ramped_decay`.
        mesh: of devices; see `parallel` for what lies where.
        state, frozen: of the shapes that the step will be given; shapes alone will do.
        accumulate: microbatches a step, whose gradients, losses and metrics are averaged, each by its rows that count:
            less memory, the same step but for rounding.

    A batch of several hosts says whether each had its own records (`reading.WHOLE`); unless all had, and the gradient
    is finite, the state stays.
    """

    gradients = objective.gradients if isinstance(objective, Joint) else _gradients_of(objective)

    def mean_gradients(networks, memory, frozen, batch, key, step):
        turns = jax.tree.map(lambda rows: split_in_turns(rows, mesh, accumulate), batch)

        def weighed(memory, rows):
            gradient, memory, metrics = gradients(networks, memory, frozen, rows, key, step)
            kept = metrics.pop(KEPT, 1.0)
            return jax.tree.map(lambda leaf: kept * leaf, (gradient, metrics)), jnp.float32(kept), memory

        def turn(carry, rows):
            (total, count), memory = carry
            part, kept, memory = weighed(memory, rows)
            return ((jax.tree.map(jnp.add, total, part), count + kept), memory), None

        first = jax.tree.map(lambda rows: rows[0], turns)
        part, kept, _ = jax.eval_shape(weighed, memory, first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (part, kept))
        ((total, count), memory), _ = jax.lax.scan(turn, (zeros, memory), turns)
        gradient, metrics = jax.tree.map(lambda leaf: leaf / jnp.maximum(count, 1.0), total)
        return gradient, memory, metrics

    @on_mesh(mesh)
    def step(state, frozen, batch):
        whole = batch.pop(WHOLE, None)
        key, networks = wrap_key(state.rng), state.networks
        compute = gradients if accumulate == 1 else mean_gradients
        gradient, memory, metrics = compute(networks, state.memory, frozen, batch, key, state.step)
        metrics.pop(KEPT, None)
        updates, opt_state = optimizer.update(gradient, state.opt_state, networks)
        networks = optax.apply_updates(networks, updates)
        params, others = networks, None
        if state.others is not None:
            gradient, params = gradient[STUDENT], networks[STUDENT]
            others = {name: network for name, network in networks.items() if name != STUDENT}
        ema = optax.incremental_update(params, state.ema, 1.0 - ramped_decay(ema_decay, state.step))
        norms = {"gradient_norm": optax.tree.norm(gradient), "parameter_norm": optax.tree.norm(params)}
        after = TrainState(state.step + 1, params, ema, opt_state, state.rng, others, memory)
        if whole is not None:
            # after the norm: devices that meet in two places at once may wait for each other for ever
            norms[WHOLE] = jnp.all(whole & jnp.isfinite(norms["gradient_norm"]))
            after = jax.tree.map(lambda new, old: jnp.where(norms[WHOLE], new, old), after, state)
        return after, metrics | norms

    lies = sharding_of(state, mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(lies, sharding_of(frozen, mesh), batch_sharding(mesh)),
        out_shardings=(lies, replicated_sharding(mesh)),
    )


def _gradients_of(objective: Objective) -> Callable[..., tuple[PyTree, PyTree, Metrics]]:
    """The `Joint.gradients` of a single network's loss."""

    def gradients(params, memory, frozen, batch, key, step):
        (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(params, frozen, batch, key)
        return gradient, memory, {"loss": loss, **metrics}

    return gradients
