"""Which mesh, rematerialisation and number of microbatches make a training step fit a slice and its bound least."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import ml_collections

from ard_jax.build import make_run_mesh, make_teacher
from ard_jax.models.backbone import REMAT_POLICIES
from ard_jax.plan.cost import Cost, count_flops, measure
from ard_jax.plan.programs import Work, finetune_step, training_step
from ard_jax.plan.recipe import state_bytes
from ard_jax.plan.topology import Slice

log = logging.getLogger("ard_jax")
MAKERS: dict[str, Callable[..., Work]] = {"distill": training_step, "finetune": finetune_step}
MOST_COMPILED = 10  # a large model's step takes a minute or two
MOST_MICROBATCHES = 16
CLOSE = 0.97  # a candidate that may save less than this share is not compiled

# What libtpu's programs send, as it was counted in them: with `tensor`, so many times the tokens of a layer; and narrow
# parts are padded, see `parallel.LANES`.
TENSOR_EXCHANGES = 14
SUBLANES = 16


class Candidate(NamedTuple):
    """Settings to try: model.remat, the mesh, and microbatches."""

    remat: str
    data: int
    fsdp: int
    tensor: int
    accumulate: int

    @property
    def split(self) -> int:
        """Into how many parts the parameters are split."""
        return self.fsdp * self.tensor

    @property
    def saving(self) -> int:
        """How little the backward pass keeps."""
        return [*REMAT_POLICIES].index(self.remat)

    def apply(self, config: ml_collections.ConfigDict, stage: str) -> ml_collections.ConfigDict:
        """The config with these settings for a stage."""
        config = config.copy_and_resolve_references()
        config.model.remat, config[stage].accumulate = self.remat, self.accumulate
        config.mesh.update(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
        return config

    def flags(self, stage: str) -> str:
        """As overrides of the command line; mesh.data takes what is left."""
        return (
            f"--config.model.remat={self.remat} --config.mesh.data=-1 --config.mesh.fsdp={self.fsdp} "
            f"--config.mesh.tensor={self.tensor} --config.{stage}.accumulate={self.accumulate}"
        )


def candidate_of(config: ml_collections.ConfigDict, where: Slice, stage: str) -> Candidate:
    """The settings as a config has them."""
    sizes = make_run_mesh(config, stage, where.devices).shape
    return Candidate(config.model.remat, sizes["data"], sizes["fsdp"], sizes["tensor"], config[stage].accumulate)


def candidates(config: ml_collections.ConfigDict, where: Slice, stage: str) -> Iterator[Candidate]:
    """All settings that could be used: meshes that share the batch and split the network, 1 to 16 microbatches."""
    network, batch, devices = make_teacher(config), config[stage].batch_size, len(where.devices)
    width, heads = network.hidden_size, getattr(network, "num_heads", 1)
    for tensor in _divisors(math.gcd(len(where.host), math.gcd(heads, devices))):
        for fsdp in _divisors(math.gcd(devices // tensor, width)):
            share, rest = divmod(batch, devices // tensor)
            if rest or not share:
                continue
            # the fine-tune's discriminator and adaptive weight are of the whole batch
            most = 1 if stage == "finetune" else MOST_MICROBATCHES
            microbatches = [count for count in (1, 2, 4, 8, 16) if share % count == 0 and count <= most]
            for remat in REMAT_POLICIES:
                for accumulate in microbatches:
                    yield Candidate(remat, devices // tensor // fsdp, fsdp, tensor, accumulate)


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


class Estimates:
    """What candidates may take at least, by a formula of their FLOPs and parameters and by those compiled so far.

    Args:
        config: as given, with a platform's settings (`for_platform`).
        where: the slice.
        stage: a key of `MAKERS`.
    """

    def __init__(self, config: ml_collections.ConfigDict, where: Slice, stage: str):
        self.config, self.where, self.stage = config, where, stage
        given = MAKERS[stage](config, where)
        self.state = state_bytes(given.arguments[0])
        weights = sum(leaf.size for leaf in jax.tree.leaves(given.arguments[0].params))
        self.weights = weights * jax.numpy.dtype(config.model.dtype).itemsize
        network, data = make_teacher(config), config.data
        tokens = len(config.student.points) * (data.image_size // network.patch_size) ** 2
        self.activations = tokens * network.hidden_size * network.depth * jax.numpy.dtype(config.model.dtype).itemsize
        self.width, self.batch = network.hidden_size, config[stage].batch_size
        self.flops: dict[str, float] = {}  # of a chip, by remat
        self.moved: dict[str, float] = {}  # bytes of a chip's memory beside the state, by remat
        self.temporaries: dict[Candidate, float] = {}  # bytes of a chip, in one microbatch
        self.sent = math.inf  # how many times what the formula says is sent; at first the step as given tells

    def work(self, candidate: Candidate) -> Work:
        return MAKERS[self.stage](candidate.apply(self.config, self.stage), self.where)

    def seconds(self, candidate: Candidate) -> float:
        """The least that its bound may be; of a remat policy that was not compiled, memory's part is not known."""
        if candidate.remat not in self.flops:
            work = self.work(candidate)
            self.flops[candidate.remat] = max(count_flops(work), work.flops / work.mesh.size)
        moved = self.moved.get(candidate.remat, 0.0) + self._state_moved(candidate)
        chip = self.where.chip
        sent = (1.0 if self.sent == math.inf else self.sent) * self._sent_bytes(candidate)
        return max(self.flops[candidate.remat] / chip.flops, moved / chip.hbm_bandwidth, sent / chip.ici_bandwidth)

    def may_fit(self, candidate: Candidate) -> bool:
        """False if one that keeps no more, and splits the parameters as far, says that it does not fit."""
        known = [
            temporaries
            for other, temporaries in self.temporaries.items()
            if other.saving >= candidate.saving and other.split >= candidate.split
        ]
        needed = max(known, default=0.0) / candidate.accumulate + self._state_held(candidate)
        return needed <= self.where.chip.hbm_bytes

    def learn(self, candidate: Candidate, cost: Cost) -> None:
        """Takes account of what a compiled candidate costs."""
        # the compiler's refusal may speak of all that is needed
        temporaries = cost.memory.temporaries if cost.memory else cost.needed - self._state_held(candidate)
        self.temporaries[candidate] = temporaries * candidate.accumulate
        if cost.memory:
            moved = max(0.0, cost.bytes - self._state_moved(candidate))
            self.moved[candidate.remat] = min(moved, self.moved.get(candidate.remat, math.inf))
            sent = sum(traffic.sent for traffic in cost.traffic.values())
            if formula := self._sent_bytes(candidate):
                self.sent = min(self.sent, sent / formula)

    def _state_held(self, candidate: Candidate) -> float:
        return self.state / candidate.split

    def _state_moved(self, candidate: Candidate) -> float:
        """The optimiser reads and writes all of the state."""
        return 2 * self._state_held(candidate)

    def _sent_bytes(self, candidate: Candidate) -> float:
        """Weights gathered for each pass, gradients summed, and tokens exchanged within a layer."""
        _, data, fsdp, tensor, accumulate = candidate
        own, part = self.weights / tensor, self.width // fsdp
        gathered = 2 * own * (fsdp - 1) / fsdp * (2 if part % (SUBLANES // 2) else 1)
        scattered = own * (fsdp - 1) / fsdp * (2 if part % SUBLANES else 1)
        summed = 2 * own / fsdp * (data - 1) / data
        rows = self.batch / (data * fsdp)
        exchanged = TENSOR_EXCHANGES * rows * self.activations if tensor > 1 else 0.0
        return accumulate * (gathered + scattered + summed) + exchanged


def try_settings(
    config: ml_collections.ConfigDict,
    where: Slice,
    stage: str,
    first: Cost,
    thorough: bool,
    compiled: Callable[..., Cost] = measure,
) -> list[tuple[Candidate, Cost]]:
    """Compiles what may be best next, until the first that fits or, if `thorough`, until nothing better is in sight.

    What was compiled tells what else can fit and how fast it may be, so that few of some hundred candidates are.

    Args:
        config: as given, with a platform's settings (`for_platform`).
        where: the slice.
        stage: "distill" or "finetune".
        first: the step as given.
        thorough: look for the least bound.
        compiled: (work, chip) → its cost.

    Returns:
        All that was compiled, the step as given first.
    """
    given, estimates = candidate_of(config, where, stage), Estimates(config, where, stage)
    tried = [(given, first)]
    estimates.learn(given, first)
    left = [candidate for candidate in candidates(config, where, stage) if candidate != given]
    for number in range(MOST_COMPILED):
        bound = best[1].bound if (best := least(tried)) else math.inf
        worth = [other for other in left if estimates.may_fit(other) and estimates.seconds(other) <= CLOSE * bound]
        if not worth or (best and not thorough):
            break
        candidate = min(worth, key=lambda candidate: _order(estimates, candidate))
        left.remove(candidate)
        log.info("try %d: %s", number + 1, candidate.flags(stage))
        cost = compiled(estimates.work(candidate), first.chip)
        estimates.learn(candidate, cost)
        tried.append((candidate, cost))
    return tried


def _order(estimates: Estimates, candidate: Candidate) -> tuple[float, ...]:
    """Of those that may be as fast, first those of which most is known if they do not fit."""
    seconds = float(f"{estimates.seconds(candidate):.2g}")
    return seconds, candidate.accumulate, -candidate.split, candidate.tensor, candidate.saving


def least(tried: list[tuple[Candidate, Cost]]) -> tuple[Candidate, Cost] | None:
    """The fastest of those that fit; None if none does."""
    return min((pair for pair in tried if pair[1].fits), key=lambda pair: pair[1].bound, default=None)
