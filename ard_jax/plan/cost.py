"""What one run of a compiled program costs a chip, and how long it takes at least."""

import logging
import re
import time
from typing import NamedTuple

import jax

from ard_jax.chips import GIB, Chip
from ard_jax.errors import UserError, first_line
from ard_jax.models import jaxprs
from ard_jax.plan import hlo
from ard_jax.plan.programs import Work

log = logging.getLogger("ard_jax")


class Memory(NamedTuple):
    """Bytes of a chip's memory that a program needs; results that take an argument's place need none."""

    arguments: float
    temporaries: float
    results: float
    code: float

    @property
    def total(self) -> float:
        return sum(self)


class Cost(NamedTuple):
    """Of one run of a program.

    Attributes:
        work: the program.
        chip: that it was compiled for.
        memory: of a chip; None if the compiler gave up.
        needed: bytes of a chip's memory, or what the compiler says of the temporaries alone before it gives up.
        flops: of a chip, counted in the trace: of all matrix products, with those done again in the backward pass, but
            not those inside of a fused kernel.
        bytes: between a chip's memory and its cores.
        traffic: between chips, by kind.
        compile_seconds: that compiling took.
    """

    work: Work
    chip: Chip
    memory: Memory | None
    needed: float
    flops: float
    bytes: float
    traffic: dict[str, hlo.Traffic]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.needed <= self.chip.hbm_bytes

    @property
    def seconds(self) -> dict[str, float]:
        """What one run takes at least, by what it may be bound by."""
        return {
            # a fused kernel's products are not seen in the trace, so that the formula may know of more
            "compute": max(self.flops, self.work.flops / self.work.mesh.size) / self.chip.flops,
            "memory": self.bytes / self.chip.hbm_bandwidth,
            "links": hlo.traffic_in_all(self.traffic.values()) / self.chip.ici_bandwidth,
        }

    @property
    def bound(self) -> float:
        """The roofline: seconds that one run takes at least, if everything overlaps."""
        return max(self.seconds.values())

    @property
    def utilisation(self) -> float:
        """Share of the chips' peak that the model's own FLOPs are, at the bound."""
        return self.work.flops / self.work.mesh.size / self.chip.flops / self.bound


def count_flops(work: Work) -> float:
    """FLOPs of a chip in one run, without compiling."""
    return 2 * jaxprs.macs(work.function.trace(*work.arguments).jaxpr) / work.mesh.size


def measure(work: Work, chip: Chip) -> Cost:
    """Compiles a program and reads what it costs.

    Raises:
        UserError: the compiler fails, for any reason but too little memory.
    """
    log.info("compiling the %s for %d devices …", work.name, work.mesh.size)
    started = time.monotonic()
    traced = work.function.trace(*work.arguments)
    flops = 2 * jaxprs.macs(traced.jaxpr) / work.mesh.size
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if not needed:
            raise UserError(
                f"the {work.name} cannot be compiled for this topology ({first_line(error)}): change the config's mesh "
                f"or choose another topology."
            ) from None
        return Cost(work, chip, None, needed, flops, 0.0, {}, time.monotonic() - started)
    seconds = time.monotonic() - started
    sizes = compiled.memory_analysis()
    memory = Memory(
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        results=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )
    program = hlo.parse(compiled.as_text())
    moved, traffic = hlo.memory_bytes(program), hlo.collectives(program)
    log.info("compiled in %.0f s.", seconds)
    return Cost(work, chip, memory, memory.total, flops, moved, traffic, seconds)


def needed_bytes(message: str) -> float:
    """Bytes of memory that a compiler's error says the program needs, 0 if it is about something else."""
    said = re.search(r"temporaries \(([\d.]+)([KMG])\) exceeds|Used ([\d.]+)([KMG]) of", message)
    if not said or "RESOURCE_EXHAUSTED" not in message:
        return 0.0
    number, unit = [group for group in said.groups() if group]
    return float(number) * {"K": 2**10, "M": 2**20, "G": GIB}[unit]
