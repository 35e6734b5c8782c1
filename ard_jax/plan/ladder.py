"""What to change when a training step does not fit: the cheapest of remat policies, microbatches and fsdp sizes."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_collections

from ard_jax.models.backbone import REMAT_POLICIES
from ard_jax.parallel import batch_shards, make_mesh
from ard_jax.plan.cost import Cost, count_flops, measure
from ard_jax.plan.programs import training_step
from ard_jax.plan.topology import Slice

log = logging.getLogger("ard_jax")
MOST_COMPILED = 6  # a large model's step takes a minute or two


class Rung(NamedTuple):
    """Settings to try: model.remat, mesh.fsdp, distill.accumulate."""

    remat: str
    fsdp: int
    accumulate: int

    def apply(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """The config with these settings; mesh.data takes what is left."""
        config = config.copy_and_resolve_references()
        config.model.remat, config.distill.accumulate = self.remat, self.accumulate
        config.mesh.update(data=-1, fsdp=self.fsdp)
        return config

    @property
    def flags(self) -> str:
        """As overrides of the command line."""
        return (
            f"--config.model.remat={self.remat} --config.mesh.data=-1 --config.mesh.fsdp={self.fsdp} "
            f"--config.distill.accumulate={self.accumulate}"
        )


def rung_of(config: ml_collections.ConfigDict, where: Slice) -> Rung:
    """The settings as a config has them."""
    mesh = make_mesh(config.mesh, where.devices)
    return Rung(config.model.remat, mesh.shape["fsdp"], config.distill.accumulate)


def _rungs(config: ml_collections.ConfigDict, where: Slice) -> Iterator[Rung]:
    """All settings worth trying: fsdp as it is or over all chips that tensor leaves, microbatches of a row and up."""
    mesh = make_mesh(config.mesh, where.devices)
    share = config.distill.batch_size // batch_shards(mesh)
    for remat in REMAT_POLICIES:
        for fsdp in sorted({mesh.shape["fsdp"], batch_shards(mesh)}):
            for accumulate in (count for count in (1, 2, 4, 8, 16) if share % count == 0):
                yield Rung(remat, fsdp, accumulate)


def cheapest(
    config: ml_collections.ConfigDict, where: Slice, failed: Cost, compiled: Callable[..., Cost] = measure
) -> tuple[Rung, Cost] | None:
    """Climbs from settings that should be fast to those that save more memory; the first that fits is taken.

    How fast they are is told by the FLOPs of each remat policy, counted without compiling, and by how often parameters
    are gathered; what is known of memory already leaves out those that cannot fit.

    Args:
        config: as given, with a platform's settings (`for_platform`).
        where: the slice.
        failed: the step as given.
        compiled: (work, chip) → its cost.

    Returns:
        The settings and their cost, None if nothing fits.
    """
    given = rung_of(config, where)
    candidates = [rung for rung in _rungs(config, where) if rung != given]
    flops = {
        remat: count_flops(training_step(given._replace(remat=remat).apply(config), where)) for remat in REMAT_POLICIES
    }
    candidates.sort(key=lambda rung: (flops[rung.remat] * (1 + 0.02 * (rung.accumulate - 1)), -rung.fsdp))
    activations = {given.remat: _temporaries(failed) * given.accumulate}
    for tried in range(MOST_COMPILED):
        candidates = [
            rung for rung in candidates if activations.get(rung.remat, 0) / rung.accumulate <= failed.chip.hbm_bytes
        ]
        if not candidates:
            return None
        rung = candidates.pop(0)
        log.info("it does not fit; try %d: %s", tried + 1, rung.flags)
        cost = compiled(training_step(rung.apply(config), where), failed.chip)
        if cost.fits:
            return rung, cost
        activations[rung.remat] = min(_temporaries(cost) * rung.accumulate, activations.get(rung.remat, math.inf))
    return None


def _temporaries(cost: Cost) -> float:
    """Bytes that a step needs beside its arguments, as far as it is known."""
    return cost.memory.temporaries if cost.memory else cost.needed
